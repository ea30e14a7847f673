"""Separate Python environments, for packages whose versions conflict with those of bnexport."""

import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any


def environment(folder: Path, *requirements: str) -> Path:
    """Make a folder with an environment in which pip has installed the requirements; return its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # Compiling every module takes as long as downloading them all; a program compiles the few that it imports.
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    done = subprocess.run([*pip, *requirements], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return python


def run_program(python: Path, program: Path, task: object) -> Any:
    """Return a program's answer to a task, both in JSON, through standard input and output."""
    environ = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [str(python), str(program)], input=json.dumps(task), capture_output=True, text=True, timeout=120, check=False,
        env=environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
