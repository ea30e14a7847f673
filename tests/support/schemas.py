"""Published JSON schemas, from the package check-jsonschema; tests that need one are skipped without the package."""

import json
from importlib import util
from pathlib import Path

import jsonschema
import pytest
import yaml


def violations(text: str, name: str) -> list[str]:
    """Return the violations of a published schema ("compose-spec", "github-workflows") by a YAML text."""
    spec = util.find_spec("check_jsonschema")
    if spec is None or spec.origin is None:
        pytest.skip("check-jsonschema is not installed")
    vendored = Path(spec.origin).parent / "builtin_schemas" / "vendor" / f"{name}.json"
    schema = json.loads(vendored.read_text(encoding="utf-8"))
    content = yaml.safe_load(text)
    content |= {"on": content.pop(True)} if True in content else {}  # YAML 1.1 reads the key "on" as true
    return [error.message for error in jsonschema.validators.validator_for(schema)(schema).iter_errors(content)]
