"""Results for programs: into a file, or on standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

#: As a file's name: standard output.
STDOUT = "-"


def write_json(target: str, value: dict[str, Any]) -> None:
    """Write a document to a file, or print it where the target is STDOUT."""
    write_result(target, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_result(target: str, content: bytes) -> None:
    """Write bytes to a file, or print them where the target is STDOUT.

    Raises:
        OutputError: The file can't be written.
    """
    from bnexport.files import forget_reader, write_atomically

    if target == STDOUT:
        try:
            click.echo(content.decode(), nl=False)
        except BrokenPipeError:  # the exit code still has to tell the verdict
            forget_reader()
    else:
        write_atomically(Path(target), content)
