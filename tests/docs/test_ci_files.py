"""The public CI file and the pre-commit configuration: they parse, and they agree with pyproject.toml and the scripts."""

import os
import tomllib
from pathlib import Path
from typing import Any

import yaml
from support.schemas import violations

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(name: str) -> dict[Any, Any]:
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_the_workflow_runs_both_commands_on_every_python() -> None:
    workflow = read(".github/workflows/check.yml")
    # YAML 1.1 reads the key "on" as true.
    assert set(workflow) == {"name", True, "permissions", "concurrency", "jobs"}
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow["jobs"]) == {"check", "docs"}
    job = workflow["jobs"]["check"]
    assert job["timeout-minutes"] <= 90
    matrix = job["strategy"]["matrix"]
    assert matrix["command"] == ["scripts/check", "scripts/check --all"]
    assert matrix["python"] == ["3.11", "3.12", "3.13", "3.14"], "as texts: 3.10 would be the number 3.1"
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    for command in matrix["command"]:
        assert os.access(ROOT / command.split()[0], os.X_OK)
    steps = job["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert all("@v" in step["uses"] for step in steps if "uses" in step)
    assert [step["run"] for step in steps if "run" in step] == ["${{ matrix.command }}"]


def test_the_workflow_builds_the_reference() -> None:
    job = read(".github/workflows/check.yml")["jobs"]["docs"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["scripts/make_venv -e '.[docs]'", "scripts/build_docs"]
    assert all(os.access(ROOT / command.split()[0], os.X_OK) for command in commands)
    assert PROJECT["optional-dependencies"]["docs"]


def test_the_workflow_fits_the_published_schema() -> None:
    text = (ROOT / ".github" / "workflows" / "check.yml").read_text(encoding="utf-8")
    assert violations(text, "github-workflows") == []
    assert violations(text.replace("runs-on:", "runs-in:"), "github-workflows")


def test_the_workflow_uses_what_the_matrix_defines() -> None:
    job = read(".github/workflows/check.yml")["jobs"]["check"]
    used = {part.split("}}")[0].strip() for part in yaml.safe_dump(job).split("${{")[1:]}
    assert used == {"matrix.command", "matrix.python"}


def test_pre_commit_runs_the_ruff_of_the_development_set() -> None:
    (repository,) = read(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format"}
    check = (ROOT / "scripts" / "check").read_text(encoding="utf-8")
    for name, hook in hooks.items():
        command = name.replace("-", " ")
        assert hook["entry"] == f"python -m {command} --force-exclude"
        assert f"-m {command}" in check, "the same commands as scripts/check"
        assert hook["language"] == "python"
        assert set(hook["additional_dependencies"]) <= set(PROJECT["optional-dependencies"]["dev"])
