"""Checks of Dockerfiles and Compose files, which tests apply to all that is written."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import yaml

COMPOSE = json.loads(Path(__file__).with_name("compose.schema.json").read_text(encoding="utf-8"))
#: Instruction -> whether its argument must be a JSON list, as one without a shell is.
_INSTRUCTIONS = {
    "FROM": False, "ARG": False, "ENV": False, "RUN": False, "COPY": False, "USER": False, "EXPOSE": False,
    "HEALTHCHECK": False, "ENTRYPOINT": True, "CMD": True,
}  # fmt: skip


class Refused(Exception):
    """A file that Docker would not take, or should not."""


def check_compose(text: str) -> None:
    """Refuse a Compose file that the schema, the part of the specification that bnexport writes, does not allow."""
    try:
        jsonschema.Draft202012Validator(COMPOSE).validate(yaml.safe_load(text))
    except jsonschema.ValidationError as error:
        raise Refused(f"compose: {error.message}") from error


def check_dockerfile(text: str, context: Path) -> None:
    """Refuse a Dockerfile that can't be built from a folder, or whose server would run as root.

    Args:
        text: Of the Dockerfile; no continued lines.
        context: The folder that it is built from.

    Raises:
        Refused: Naming the line.
    """
    found = [line.partition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#")]
    words = [word for word, _ in found]
    for word, rest in found:
        if word not in _INSTRUCTIONS or not rest:
            raise Refused(f"the Dockerfile has an unknown line {word!r}")
        if _INSTRUCTIONS[word] and not _is_list(rest):
            raise Refused(f"the Dockerfile's {word} is no JSON list: {rest}")
        for source in rest.split()[:-1] if word == "COPY" else ():
            if not (context / source).exists():
                raise Refused(f"the Dockerfile copies {source}, which is not there")
    if words.count("FROM") != 1 or "FROM" not in words[:2]:
        raise Refused("the Dockerfile does not start from one image")
    users = [rest for word, rest in found if word == "USER"]
    if not users or users[-1] in ("0", "root") or "RUN" in words[words.index("USER") :]:
        raise Refused("the Dockerfile's server would run as root")


def _is_list(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
