"""The OpenAPI document: in step with the routes, true for real answers, and a fuzzer's plan."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from support.pictures import png
from support.serving import Server, serving, tensor

from bnexport import __version__
from bnexport.serving.http.app import ROUTES, openapi_document
from bnexport.serving.protocol.messages import BYTES, DATATYPES
from bnexport.serving.repository import READY, UNAVAILABLE

DOCUMENT: dict[str, Any] = openapi_document()
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
#: The fuzzer's checks of each answer. The acceptance of requests of the right form is not checked: the document does not
#: describe a model, so most of such requests have tensors that the model does not take.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,missing_required_header,unsupported_method,allow_header_conformance"
)
#: Seconds of fuzzing.
BUDGET = 20


def test_the_document_is_in_step_with_the_routes() -> None:
    assert DOCUMENT["info"]["version"] == __version__
    operations = {
        (path, method): item for path, methods in DOCUMENT["paths"].items() for method, item in methods.items()
    }
    wanted = {(f"/{path}", route.method.lower()): route for route in ROUTES for path in both(route.pattern)}
    assert set(operations) == set(wanted)
    for place, item in operations.items():
        route = wanted[place]
        assert item["operationId"].startswith(route.handler.__name__), place
        assert item["security"] == ([] if route.probe else [{}, {"token": []}]), place
        assert ("401" in item["responses"]) != route.probe, place
        assert [row["name"] for row in item.get("parameters", ())] == re.findall(r"{(\w+)}", place[0]), place
    names = [item["operationId"] for item in operations.values()]
    assert len(set(names)) == len(names)
    assert all(item["summary"].endswith((".", ":")) or item["summary"][-1].isalpha() for item in operations.values())


def both(pattern: str) -> list[str]:
    """Return a pattern with and without the optional part."""
    return [re.sub(r"\[.*\]", "", pattern), pattern.replace("[", "").replace("]", "")]


def test_the_words_of_the_schemas_are_those_of_the_code() -> None:
    assert SCHEMAS["InputTensor"]["properties"]["datatype"]["enum"] == list(DATATYPES.values())
    assert SCHEMAS["OutputTensor"]["properties"]["datatype"]["enum"] == [*DATATYPES.values(), BYTES]
    assert SCHEMAS["Model"]["properties"]["state"]["enum"] == [READY, UNAVAILABLE]
    assert SCHEMAS["Index"]["items"]["properties"]["state"]["enum"] == [READY, UNAVAILABLE]


def test_every_schema_is_one_and_is_used() -> None:
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(DOCUMENT)
    assert [name for name in SCHEMAS if f'schemas/{name}"' not in text] == []
    assert [name for name in DOCUMENT["components"]["responses"] if f'responses/{name}"' not in text] == []


def test_the_server_gives_the_document(server: Server) -> None:
    assert server.ask("GET", "/v2/openapi.json").json == json.loads(json.dumps(DOCUMENT))


def checked(path: str, method: str, status: int, value: Any) -> None:
    """Check an answer against the schema that the document has for it."""
    response = DOCUMENT["paths"][path][method]["responses"][str(status)]
    if "$ref" in response:
        response = DOCUMENT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    schema = response["content"]["application/json"]["schema"] | {"components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(value)


@pytest.mark.parametrize("path", [path for path, item in DOCUMENT["paths"].items() if "get" in item])
def test_real_answers_fit(server: Server, path: str) -> None:
    answer = server.ask("GET", path.replace("{name}", "bn_lenet").replace("{version}", "1"))
    if "application/json" in DOCUMENT["paths"][path]["get"]["responses"]["200"]["content"]:
        checked(path, "get", 200, answer.json)
    if "{name}" in path:
        answer = server.ask("GET", path.replace("{name}", "unknown").replace("{version}", "1"))
        checked(path, "get", answer.status, answer.json)
        assert answer.status == 404


def test_real_answers_to_posts_fit(server: Server, images: np.ndarray, pixels: np.ndarray) -> None:
    model = "/v2/models/{name}"
    request = {"id": "a", "inputs": [tensor(images[:2])], "outputs": [{"name": "logits"}]}
    schema = SCHEMAS["InferRequest"] | {"components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(schema).validate(request)
    checked(f"{model}/infer", "post", 200, server.infer(request).json)
    named = [{"name": "logits", "parameters": {"classification": 2}}]
    checked(f"{model}/infer", "post", 200, server.infer(request | {"outputs": named}).json)
    checked(f"{model}/infer", "post", 400, server.infer({"inputs": []}).json)
    answer = server.ask("POST", "/v2/models/bn_lenet/classify", png(pixels[0]), {"content-type": "image/png"})
    checked(f"{model}/classify", "post", 200, answer.json)
    checked("/v2/repository/index", "post", 200, server.ask("POST", "/v2/repository/index").json)
    answer = server.ask("POST", "/v2/repository/models/bn_lenet/load")
    assert answer.status == 403
    checked("/v2/repository/models/{name}/load", "post", 403, answer.json)


@pytest.mark.parametrize(("method", "path", "allow"), [("GET", "infer", "POST"), ("DELETE", "config", "GET, HEAD")])
def test_a_wrong_method_gets_the_right_one(server: Server, method: str, path: str, allow: str) -> None:
    answer = server.ask(method, f"/v2/models/bn_lenet/{path}")
    assert (answer.status, answer.headers["allow"]) == (405, allow)


def plan(name: str) -> dict[str, Any]:
    """Return the document with names of a model, which a fuzzer would not find otherwise."""
    value = copy.deepcopy(DOCUMENT)
    for item in value["paths"].values():
        for operation in item.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = {"enum": [name, "unknown"] if parameter["name"] == "name" else ["1", "2"]}
    shapes = {"enum": [[1, 1, 28, 28], [2, 1, 28, 28], [10**12, 1, 28, 28], [1, 784]]}
    value["components"]["schemas"]["InputTensor"]["properties"] |= {"name": {"enum": ["input", "x"]}, "shape": shapes}
    return value


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--allow-load",)], ids=["as it is", "with --allow-load"])
def test_a_fuzzer_finds_no_fault(models: Path, tmp_path: Path, images: np.ndarray, options: tuple[str, ...]) -> None:
    """schemathesis makes right and wrong requests from the document, and checks the answers against it."""
    (tmp_path / "plan.json").write_text(json.dumps(plan("bn_lenet")))
    program = [str(Path(sys.executable).parent / "schemathesis"), "run", str(tmp_path / "plan.json")]
    program += ["--checks", CHECKS, "--phases", "fuzzing", "--max-examples", "40", "--seed", "7"]
    program += ["--max-time", str(BUDGET), "--no-color", "--warnings", "off", "--continue-on-failure"]
    if options:  # a model that another request has unloaded is not ready: 503
        program[program.index(CHECKS)] = CHECKS.replace("not_a_server_error,", "")
    with serving(models, tmp_path / "log", "--no-access-log", *options) as server:
        program += ["--url", f"http://127.0.0.1:{server.port}"]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=False)
        metrics = server.ask("GET", "/metrics").body.decode()
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert server.process.poll() is None
        assert [event for event in server.events() if event["event"] == "fault"] == []
        if options:
            assert server.ask("POST", "/v2/repository/models/bn_lenet/load").status == 200
        assert server.infer({"inputs": [tensor(images)]}).status == 200
    counted = [line for line in metrics.splitlines() if line.startswith("bnexport_http_requests_total{")]
    assert any("/infer" in line for line in counted), "the fuzzer never came to a model"
