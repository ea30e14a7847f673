import copy
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jsonschema
import pytest
import yaml
from support.schemas import violations
from support.triton_config_check import read_config
from unit.deploying.conftest import foreign_bundle

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.deploying.deploy_request import DEVICES, DeployRequest, Scaling
from bnexport.deploying.docker import compose, deploy_docker, dockerfile
from bnexport.deploying.kserve import check_yaml, checked_yaml, deploy_kserve, inference_service
from bnexport.errors import ExportError, OutputError, UsageError
from bnexport.exporting.triton_config import CONFIG

SCALING = Scaling("s3://bucket/models", 0, 6, "rps", 50)
NAMED = DeployRequest(name="bn-lenet", triton="24.05")


def test_an_inference_service(bundle: Bundle, tmp_path: Path) -> None:
    done = deploy_kserve(bundle, tmp_path / "out", NAMED, SCALING, namespace="vision")
    service = yaml.safe_load((tmp_path / "out" / "inference_service.yaml").read_text())
    assert service["metadata"] == {"name": "bn-lenet", "namespace": "vision"}
    predictor = service["spec"]["predictor"]
    assert [predictor[key] for key in ("minReplicas", "maxReplicas", "scaleMetric", "scaleTarget")] == [0, 6, "rps", 50]
    model = predictor["model"]
    assert (model["protocolVersion"], model["runtimeVersion"]) == ("v2", "24.05-py3")
    assert model["storageUri"] == "s3://bucket/models", "the root, not the model's folder"
    assert model["resources"]["requests"] == model["resources"]["limits"] == {"cpu": "1", "memory": "2Gi"}
    config = read_config((tmp_path / "out" / "repository" / "bn-lenet" / CONFIG).read_text())
    assert config.name == "bn-lenet", "the folder's name is the name in URLs"
    assert (tmp_path / "out" / "repository" / "bn-lenet" / "1" / MODEL_ONNX).is_file()
    assert any("/v2/models/bn-lenet/infer" in step for step in done.next_steps)


def test_a_gpu_is_requested() -> None:
    service = inference_service("m", DeployRequest(device="tensorrt"), SCALING, model_bytes=3 * 2**30)
    limits = service["spec"]["predictor"]["model"]["resources"]["limits"]
    assert limits == {"cpu": "1", "memory": "10Gi", "nvidia.com/gpu": "1"}


def test_a_foreign_model_on_kserve(foreign: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"refuses the name 'Foreign\.v2'") as caught:
        deploy_kserve(foreign, tmp_path / "out", DeployRequest(), SCALING)
    assert caught.value.remedy == "Pass --name foreign-v2"
    deploy_kserve(foreign, tmp_path / "out", DeployRequest(name="foreign-v2"), SCALING)
    assert (tmp_path / "out" / "repository" / "foreign-v2" / "4" / MODEL_ONNX).is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage_uri": "bucket/models"}, "can't load from the storage URI"),
        ({"storage_uri": "ftp://host/models"}, "can't load from the storage URI"),
        ({"storage_uri": "s3://a b"}, "can't load from the storage URI"),
        ({"min_replicas": 5, "max_replicas": 2}, "not a valid range"),
        ({"min_replicas": -1}, "not a valid range"),
        ({"max_replicas": 2**31}, "not a valid range"),
        ({"min_replicas": 0, "max_replicas": 0}, "not a valid range"),
        ({"min_replicas": 0, "metric": "cpu"}, "can't have 0 replicas"),
        ({"metric": "cpu", "target": 101}, "the target of cpu is 101"),
        ({"target": 0}, "is 0"),
        ({"metric": "latency"}, "latency"),
    ],
)
def test_scaling_that_can_not_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Scaling(**({"storage_uri": "s3://b/m"} | options))


SERVICE = inference_service("m", DeployRequest(), SCALING, model_bytes=1)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("metadata/name", "Big"),
        ("metadata/namespace", "a_b"),
        ("metadata/namespace", "a\n"),
        ("metadata/labels", {}),
        ("spec/predictor/minReplicas", "1"),
        ("spec/predictor/scaleMetric", "latency"),
        ("spec/predictor/model/protocolVersion", "v1"),
        ("spec/predictor/model/storageUri", "models"),
        ("spec/predictor/model/runtimeVersion", "24.05"),
        ("spec/predictor/model/resources/limits/cpu", 1),
        ("spec/predictor/model/resources/limits/gpu", "1"),
        ("kind", "Service"),
    ],
)
def test_services_that_kserve_would_refuse(place: str, value: object) -> None:
    checked_yaml(SERVICE)
    service = copy.deepcopy(SERVICE)
    *path, last = place.split("/")
    inner = service
    for part in path:
        inner = inner[part]
    inner[last] = value
    with pytest.raises(ExportError, match="inference_service: "):
        checked_yaml(service)


def test_no_protocol_version_is_refused() -> None:
    service = copy.deepcopy(SERVICE)
    del service["spec"]["predictor"]["model"]["protocolVersion"]
    with pytest.raises(ExportError, match="protocolVersion"):
        checked_yaml(service)


@pytest.mark.parametrize("text", ["a: [", "- x", "", "a: !!python/object:os.system {}"])
def test_text_that_is_not_a_service(text: str) -> None:
    with pytest.raises(ExportError):
        check_yaml(text)


COMPOSE = json.loads(Path(__file__).with_name("compose.schema.json").read_text(encoding="utf-8"))
#: Instruction -> True if its argument must be a JSON list, the form without a shell.
_INSTRUCTIONS = {
    "FROM": False, "ARG": False, "ENV": False, "RUN": False, "COPY": False, "USER": False, "EXPOSE": False,
    "HEALTHCHECK": False, "ENTRYPOINT": True, "CMD": True,
}  # fmt: skip


class Refused(Exception):
    """A file that Docker refuses, or that is not safe."""


def check_compose(text: str) -> None:
    """Refuse a Compose file by the schema of the part of the specification that bnexport writes."""
    try:
        jsonschema.Draft202012Validator(COMPOSE).validate(yaml.safe_load(text))
    except jsonschema.ValidationError as error:
        raise Refused(f"compose: {error.message}") from error


def check_dockerfile(text: str, context: Path) -> None:
    """Refuse a Dockerfile that can't be built in a folder, or whose server would run as root."""
    found = [line.partition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#")]
    words = [word for word, _ in found]
    for word, rest in found:
        if word not in _INSTRUCTIONS or not rest:
            raise Refused(f"the Dockerfile has an unknown line {word!r}")
        if _INSTRUCTIONS[word] and not _is_list(rest):
            raise Refused(f"the Dockerfile's {word} is not a JSON list: {rest}")
        for source in rest.split()[:-1] if word == "COPY" else ():
            if not (context / source).exists():
                raise Refused(f"the Dockerfile copies {source}, which is missing")
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


def test_a_build_context(bundle: Bundle, tmp_path: Path) -> None:
    wheel = tmp_path / "bnexport_runtime-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"wheel")
    deploy_docker(bundle, tmp_path / "out", DeployRequest(triton="24.05"), wheel=wheel)
    out = tmp_path / "out"
    check_dockerfile((out / "Dockerfile").read_text(), out)
    check_compose((out / "compose.yaml").read_text())
    Bundle.open(out / "models" / "bn_lenet" / "1").check()
    read_config((out / "models" / "bn_lenet" / CONFIG).read_text())
    assert (out / "wheels" / wheel.name).read_bytes() == b"wheel"
    lines = [line.partition(" ")[::2] for line in (out / "Dockerfile").read_text().splitlines()]
    assert ("ARG", f"BNEXPORT=/wheels/{wheel.name}[serve,grpc]") in lines
    command = ["serve", "/models", "--host", "0.0.0.0", "--port", "8000", "--grpc-port", "8001", "--grace", "30"]
    assert json.loads(dict(lines)["CMD"]) == command
    services = yaml.safe_load((out / "compose.yaml").read_text())["services"]
    assert services["triton"]["image"] == "nvcr.io/nvidia/tritonserver:24.05-py3"
    waits = int(services["serve"]["stop_grace_period"].removesuffix("s"))
    assert waits > int(command[-1]), "otherwise Docker kills after 10 seconds, with requests in flight"
    assert services["serve"]["init"] is True
    assert services["triton"]["command"] == ["tritonserver", "--model-repository=/models"]
    assert services["triton"]["volumes"][0]["source"] == "./models"
    published = [port for service in services.values() for port in service["ports"]]
    assert len({port.split(":")[1] for port in published}) == len(published) == 5
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert "deploy" not in services["triton"]


def test_without_a_wheel_this_version_is_installed(foreign: Bundle, tmp_path: Path) -> None:
    done = deploy_docker(foreign, tmp_path / "out", DeployRequest(name="foreign", device="cuda"))
    text = (tmp_path / "out" / "Dockerfile").read_text()
    assert "ARG BNEXPORT=bnexport-runtime[serve,grpc]==" in text
    check_dockerfile(text, tmp_path / "out")
    assert "COPY wheels" not in text
    assert not any(name.startswith("wheels") for name in done.files)
    services = yaml.safe_load((tmp_path / "out" / "compose.yaml").read_text())["services"]
    (device,) = services["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_the_servers_user_may_read_what_a_strict_mask_wrote(bundle: Bundle, tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        deploy_docker(bundle, tmp_path / "out")
    finally:
        os.umask(mask)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out" / "models").rglob("*")}
    assert modes == {0o755, 0o644}
    assert (tmp_path / "out" / "models").stat().st_mode & 0o777 == 0o755


def test_a_model_whose_name_triton_does_not_take(tmp_path: Path) -> None:
    """The name has letters outside ASCII. --name is for the Compose project, and no option names the folder."""
    wide = foreign_bundle(tmp_path / "1", name="größe")
    deploy_docker(wide, tmp_path / "out", DeployRequest(name="size"))
    assert [path.name for path in (tmp_path / "out" / "models").iterdir()] == ["gr_e"]


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check(status: int, code: int) -> None:
    """The written check runs with another port, and with a proxy in the environment at which no process listens."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    (line,) = [line for line in DOCKERFILE.splitlines() if line.startswith("HEALTHCHECK")]
    _, option, program = json.loads(line.partition("CMD ")[2])
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever).start()
        words = [sys.executable, option, program.replace("8000", str(server.server_port))]
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        try:
            assert subprocess.run(words, env=environment, timeout=240, check=False).returncode == code
        finally:
            server.shutdown()


def test_docker_refusals(bundle: Bundle, foreign: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        deploy_docker(bundle, tmp_path / "out")
    with pytest.raises(UsageError, match="docker refuses the name"):
        deploy_docker(foreign, tmp_path / "new")
    (tmp_path / "other-1.0-py3-none-any.whl").write_bytes(b"")
    for wheel in ("other-1.0-py3-none-any.whl", "bnexport-0.1.0-py3-none-any.whl"):
        with pytest.raises(UsageError, match="not a wheel of bnexport"):
            deploy_docker(bundle, tmp_path / "new", wheel=tmp_path / wheel)
    assert not (tmp_path / "new").exists()


DOCKERFILE = dockerfile(None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("COPY models", "COPY weights", "copies weights"),
        ("USER 10001", "USER root", "as root"),
        ("USER 10001\n", "", "as root"),
        ("USER 10001", "USER 10001\nRUN true", "as root"),
        ('ENTRYPOINT ["bnexport"]', "ENTRYPOINT bnexport", "not a JSON list"),
        ("EXPOSE 8000", "EXPOSED 8000", "unknown line"),
        ("FROM python", "RUN true\nFROM python", "start from one image"),
        ("EXPOSE 8000", "FROM scratch", "start from one image"),
    ],
)
def test_dockerfiles_that_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "models").mkdir()
    check_dockerfile(DOCKERFILE, tmp_path)
    assert old in DOCKERFILE
    with pytest.raises(Refused, match=message):
        check_dockerfile(DOCKERFILE.replace(old, new), tmp_path)


def test_a_compose_file_that_opens_a_port_to_the_world_is_refused() -> None:
    text = "name: x\nservices:\n  serve: {build: ., ports: ['8000:8000'], restart: unless-stopped}\n"
    with pytest.raises(Refused, match="compose: "):
        check_compose(text)


@pytest.mark.parametrize("device", DEVICES)
def test_every_compose_file_fits_the_specification(device: str) -> None:
    text = compose("123", DeployRequest(device=device))
    check_compose(text)
    document = yaml.safe_load(text)
    assert document["name"] == "123", "text, whatever its characters"
    assert ("deploy" in document["services"]["triton"]) == (device != "cpu")
    assert violations(text, "compose-spec") == []
    assert violations(text.replace("build:", "biuld:"), "compose-spec")
