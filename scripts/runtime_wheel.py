"""Build bnexport-runtime, the distribution for serving machines: the same package without torch, onnx and their dependencies.

Use: python scripts/runtime_wheel.py FOLDER     Needs pip, and a package index for the build backend.
Its dependencies and extras are those of pyproject.toml that [tool.bnexport] names. Install it instead of bnexport.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DESCRIPTION = "Verify and run models exported by bnexport: the part of bnexport for serving machines, without torch."


def toml(value: object) -> str:
    """Return a value as TOML; texts have the same form as in JSON."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def derived(source: dict) -> str:
    """Return the pyproject.toml of bnexport-runtime."""
    full, wanted = source["project"], source["tool"]["bnexport"]["runtime-dependencies"]
    light = {name: text for text in full["dependencies"] if (name := re.match(r"[\w.-]+", text).group()) in wanted}
    if missing := set(wanted) - set(light):
        sys.exit(f"runtime_wheel: {', '.join(sorted(missing))} is not a dependency of bnexport.")
    project = full | {"name": "bnexport-runtime", "description": DESCRIPTION, "dependencies": list(light.values())}
    extras = source["tool"]["bnexport"]["runtime-extras"]
    project["optional-dependencies"] = {name: full["optional-dependencies"][name] for name in extras}
    tables = {"build-system": source["build-system"], "project": project, "tool": {"hatch": source["tool"]["hatch"]}}
    return "".join(f"{name} = {toml(table)}\n" for name, table in tables.items())


if len(sys.argv) != 2:
    print("use: python scripts/runtime_wheel.py FOLDER", file=sys.stderr)
    sys.exit(2)
with tempfile.TemporaryDirectory() as folder:
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "bnexport", Path(folder, "bnexport"), ignore=shutil.ignore_patterns("__pycache__"))
    source = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    Path(folder, "pyproject.toml").write_text(derived(source), "utf-8")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", sys.argv[1], folder]
    sys.exit(subprocess.run(pip, check=False).returncode or print(f"written: a wheel in {sys.argv[1]}"))
