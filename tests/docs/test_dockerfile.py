"""No engine here runs the Dockerfile, so it is read: targets, user, entry point, sources, the demo's steps."""

import fnmatch
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
Stages = dict[str, list[tuple[str, str]]]


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments), with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages(text: str) -> tuple[dict[str, str], Stages]:
    """Stage -> what it is FROM, and stage -> its instructions."""
    bases: dict[str, str] = {}
    found: Stages = {}
    name = ""
    for word, rest in instructions(text):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            bases[name], found[name] = base, []
        elif name:
            found[name].append((word, rest))
    return bases, found


TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
BASES, STAGES = stages(TEXT)
TARGETS = ("cpu", "gpu")


def last(target: str, word: str) -> str:
    return [rest for found, rest in STAGES[target] if found == word][-1]


def test_only_known_instructions() -> None:
    assert {word for word, _ in instructions(TEXT)} <= KNOWN


def test_targets_and_their_base() -> None:
    assert tuple(BASES) == ("base", *TARGETS), "gpu is last, so it is the default"
    assert all(BASES[target] == "base" for target in TARGETS)
    image, _, tag = BASES["base"].partition(":")
    assert image == "python"
    assert tag == "${PYTHON_VERSION}-slim-bookworm"
    (version,) = [rest for word, rest in instructions(TEXT) if word == "ARG" and rest.startswith("PYTHON_VERSION=")]
    assert re.fullmatch(r"PYTHON_VERSION=3\.(1[1-9])\.\d+", version), "pinned to a patch release"


@pytest.mark.parametrize("target", TARGETS)
def test_non_root_with_bnexport_as_entry_point(target: str) -> None:
    words = [word for word, _ in STAGES[target]]
    assert last(target, "USER") == "10001"
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN"), (
        "installing needs the owner of /opt"
    )
    assert json.loads(last(target, "ENTRYPOINT")) == ["bnexport"]
    assert ("RUN", "useradd --create-home --uid 10001 bnexport") in STAGES["base"]


@pytest.mark.parametrize("target", TARGETS)
def test_steps_are_those_of_the_demo(target: str) -> None:
    (install,) = [rest for word, rest in STAGES[target] if word == "RUN"]
    step = "scripts/make_venv ."
    assert step in (ROOT / "scripts" / "demo").read_text(encoding="utf-8").splitlines()
    assert install.endswith(step)
    words = shlex.split(install)
    assert "PIP_NO_CACHE_DIR=1" in words
    venv = next(word.partition("=")[2] for word in words if word.startswith("BNEXPORT_VENV="))
    path = next(rest for word, rest in STAGES["base"] if word == "ENV")
    assert f"PATH={venv}/bin:$PATH" in path


def test_copied_files_exist_and_are_not_ignored() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    copies = [rest.split()[:-1] for found in STAGES.values() for word, rest in found if word == "COPY"]
    sources = [source for group in copies for source in group]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        ignored = False
        for rule in rules:
            if fnmatch.fnmatch(source, rule.lstrip("!")):
                ignored = not rule.startswith("!")
        assert not ignored, source


def test_files_that_the_wheel_needs_are_copied() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    sources = {source for word, rest in STAGES["base"] if word == "COPY" for source in rest.split()[:-1]}
    needed = {"pyproject.toml", "bnexport", "scripts", *re.findall(r'"?(README\.md|LICENSE)"?', project)}
    assert needed <= sources
