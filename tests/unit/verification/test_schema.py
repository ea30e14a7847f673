"""The JSON report fits its schema, and the schema refuses everything else."""

import copy
import json
import operator
from collections.abc import Callable, Iterator
from functools import reduce
from importlib import resources
from typing import Any

import jsonschema
import numpy as np
import pytest
from support.bundles import copy_bundle, fold_by_hand, network, reseal, write_onnx
from support.reports import full_report, large_report

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.verification.scope import Scope
from bnexport.verification.verdict import FORMAT, FORMAT_VERSION, FaultResult, VerificationReport
from bnexport.verification.verify import verify

SCHEMA: dict[str, Any] = json.loads(
    resources.files("bnexport.verification").joinpath("report.schema.json").read_text(encoding="utf-8")
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
Change = Callable[[dict[str, Any]], None]


def written(report: VerificationReport) -> dict[str, Any]:
    """As a program reads it from the file."""
    value: dict[str, Any] = json.loads(json.dumps(report.to_json(), allow_nan=False))
    return value


def undocumented(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Keys of a report that the schema does not name, or names without a description."""
    schema = resolved(schema)
    if isinstance(value, list):
        for item in value:
            yield from undocumented(item, schema.get("items", {}), f"{path}[]")
    if not isinstance(value, dict):
        return
    known, free = schema.get("properties"), schema.get("additionalProperties")
    for key, item in value.items():
        if known is not None and key in known:
            if "description" not in known[key] and "description" not in resolved(known[key]):
                yield f"{path}.{key} has no description"
            yield from undocumented(item, known[key], f"{path}.{key}")
        elif free is not None:
            yield from undocumented(item, free, f"{path}.*")
        elif known is not None:
            yield f"{path}.{key} is not known"


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The target of a reference, also of the first of several alternatives."""
    first = schema.get("anyOf", [schema])[0]
    return SCHEMA["$defs"][first["$ref"].rpartition("/")[2]] if "$ref" in first else schema


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["format"]["const"] == FORMAT
    assert SCHEMA["properties"]["format_version"]["const"] == FORMAT_VERSION


@pytest.mark.parametrize(
    "report",
    [full_report(), full_report(passed=True), large_report(), VerificationReport(())],
    ids=["fail", "pass", "large", "empty"],
)
def test_reports_with_every_part_fit(report: VerificationReport) -> None:
    value = written(report)
    VALIDATOR.validate(value)
    assert list(undocumented(value, SCHEMA)) == []
    assert VerificationReport.from_json(value).to_json() == report.to_json()


def test_a_real_verification_fits(bundle: Bundle) -> None:
    report = verify(bundle, runtimes=["onnxruntime-cpu", "torch-cpu"], scope=Scope(max_samples=40, drift=True))
    assert report.passed, report.summary()
    value = written(report)
    VALIDATOR.validate(value)
    assert list(undocumented(value, SCHEMA)) == []
    assert value["findings"]["predictions"]
    assert value["findings"]["drift"]


def test_a_real_failure_fits(bundle: Bundle, tmp_path: Any) -> None:
    folder = copy_bundle(bundle, tmp_path / "1")
    state = fold_by_hand(network())
    state["conv1.bias"] = state["conv1.bias"] + float(np.float32(0.5))
    write_onnx(folder / MODEL_ONNX, state)
    report = verify(reseal(folder), runtimes=["onnxruntime-cpu"], scope=Scope(max_samples=40))
    assert not report.passed
    value = written(report)
    VALIDATOR.validate(value)
    assert list(undocumented(value, SCHEMA)) == []


def put(*path: Any, value: Any) -> Change:
    return lambda report: operator.setitem(reduce(operator.getitem, path[:-1], report), path[-1], value)


def drop(*path: Any) -> Change:
    return lambda report: operator.delitem(reduce(operator.getitem, path[:-1], report), path[-1])


@pytest.mark.parametrize(
    "change",
    [
        put("format", value="another-format"),
        put("format_version", value=2),
        put("passed", value="PASS"),
        put("passed", value=False),
        put("summary", value="fine"),
        put("summary", value="FAIL: 1 of 2 rows failed"),
        put("seed", value=-1),
        put("rows", value=[]),
        put("rows", 0, "passed", value=False),
        put("rows", 0, "n", value=1.5),
        put("rows", 2, "error", value=-1e-9),
        put("rows", 2, "error", value="4e-08"),
        put("rows", 0, "stage", value=""),
        put("skipped", "torch-cuda", value=""),
        put("runtimes", "torch-cpu", value="torch"),
        put("accuracy", value={"dataset": "x", "n": 3}),
        put("environment", "packages", "numpy", value=2),
        put("findings", "predictions", 0, "flips", value=0.5),
        put("findings", "flipped", "onnxruntime-cuda, tf32", 0, "explained", value=None),
        put("findings", "drift", "torch-cpu", 0, "left", value="no"),
        put("findings", "self_test", 0, "outcome", value="missed"),
        put("findings", "self_test", 0, "outcome", value="seen"),
        put("findings", "self_test", 0, "caught", value=[]),
        put("findings", "warnings", value="none"),
        *(drop(key) for key in SCHEMA["required"]),
        *(drop("rows", 0, key) for key in SCHEMA["$defs"]["row"]["required"]),
        *(drop("findings", key) for key in SCHEMA["$defs"]["findings"]["required"]),
        drop("findings", "self_test", 0, "caught"),
    ],
)
def test_files_that_are_not_reports_are_refused(change: Change) -> None:
    value = copy.deepcopy(written(full_report(passed=True)))
    VALIDATOR.validate(value)
    change(value)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(value)


def test_a_missed_fault_is_not_a_pass() -> None:
    missed = FaultResult("eps dropped", "model.onnx", "file-proof", (), "missed")
    value = written(full_report(passed=True).with_self_test((missed,)))
    VALIDATOR.validate(value)
    value["passed"], value["summary"] = True, "PASS: 31 rows"
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(value)


def test_keys_of_a_later_release_do_no_harm() -> None:
    value = written(full_report())
    value["later"] = value["rows"][0]["later"] = value["findings"]["later"] = 1
    VALIDATOR.validate(value)


def test_a_key_without_words_is_found() -> None:
    value = written(full_report())
    value["later"] = value["rows"][0]["later"] = value["findings"]["predictions"][0]["later"] = 1
    assert list(undocumented(value, SCHEMA)) == [
        ".rows[].later is not known",
        ".findings.predictions[].later is not known",
        ".later is not known",
    ]
