"""Python environments of their own, for packages whose versions do not go with ours."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any


def environment(folder: Path, *requirements: str) -> Path:
    """Make an environment with what pip finds for some requirements.

    Args:
        folder: Created; about as large as the packages.
        requirements: As pip takes them.

    Returns:
        Its Python.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # Compiling every module takes as long as downloading them all; a program compiles the few that it imports.
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return python


def run_program(python: Path, program: Path, task: object) -> Any:
    """What a program says about its task, both in JSON, through standard input and output."""
    environ = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [str(python), str(program)],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environ,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
