"""YAML that is checked against a strict schema before it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnexport.errors import ExportError
from bnexport.optional import one_line, require

INFERENCE_SERVICE = "inference_service.schema.json"
COMPOSE = "compose.schema.json"
_SCHEMAS = Path(__file__).parent / "schemas"


def checked_yaml(value: Mapping[str, Any], schema: str) -> str:
    """A document as YAML text, read back and held against a schema.

    Args:
        value: Plain JSON values.
        schema: INFERENCE_SERVICE or COMPOSE.

    Raises:
        ExportError: The text does not say what was meant, or the schema does not allow it.
        MissingDependency: PyYAML or jsonschema is not here.
    """
    yaml = require("yaml", purpose="writing YAML")
    text: str = yaml.safe_dump(dict(value), sort_keys=False, width=120)
    check_yaml(text, schema)
    if yaml.safe_load(text) != value:
        raise ExportError("the YAML text does not read as it was meant", remedy="Give a plainer name or address")
    return text


def check_yaml(text: str, schema: str) -> None:
    """Refuse a document that the schema does not allow.

    Raises:
        ExportError: Naming the place.
        MissingDependency: PyYAML or jsonschema is not here.
    """
    yaml = require("yaml", purpose="reading YAML")
    jsonschema = require("jsonschema", purpose="checking YAML")
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ExportError(f"this is no YAML: {one_line(error)}", remedy="Write it again") from error
    rules = jsonschema.Draft202012Validator(json.loads((_SCHEMAS / schema).read_text(encoding="utf-8")))
    if (found := next(iter(rules.iter_errors(document)), None)) is not None:
        place = "/".join(map(str, found.absolute_path)) or "the document"
        raise ExportError(
            f"{schema.partition('.')[0]}: {place}: {one_line(ValueError(found.message), 160)}",
            remedy="Change the option that this value comes from",
        )
