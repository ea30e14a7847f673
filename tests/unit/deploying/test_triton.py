import re
import shlex
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from support.bundles import copy_bundle, reseal, tuned_copy
from support.triton_config_check import ConfigError, check_config, read_config
from unit.deploying.conftest import FOREIGN, fixed, foreign_bundle

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.deploying.deploy_request import DEVICES, NAME_RULES, DeployRequest, deployed_name, suggested_name
from bnexport.deploying.docker import deploy_docker
from bnexport.deploying.triton_repository import LABELS, deploy_triton
from bnexport.errors import BundleError, ExportError, OutputError, UsageError
from bnexport.exporting.triton_config import CONFIG, device_blocks, triton_config
from bnexport.proto_messages import message_classes
from bnexport.tensors import Dim, Signature, TensorSpec

ROOT = Path(__file__).parents[3]
FILES = frozenset({MODEL_ONNX, LABELS})
OTHER_RUNTIME = "not tuned: tuned.json has another runtime for the goal throughput: openvino-cpu"


def deployed(bundle: Bundle, out: Path, **options: object) -> object:
    deploy_triton(bundle, out, DeployRequest(**options))
    (folder,) = out.iterdir()
    return read_config((folder / CONFIG).read_text())


def test_a_repository_of_the_reference_model(bundle: Bundle, tmp_path: Path) -> None:
    done = deploy_triton(bundle, tmp_path / "out", DeployRequest(triton="24.05", instances=3))
    assert done.files == ("bn_lenet/1/model.onnx", f"bn_lenet/{CONFIG}", f"bn_lenet/{LABELS}")
    folder = tmp_path / "out" / "bn_lenet"
    assert (folder / "1" / MODEL_ONNX).read_bytes() == bundle.file(MODEL_ONNX).read_bytes()
    assert (folder / LABELS).read_text().splitlines() == list(bundle.manifest.labels or ())
    config = read_config((folder / CONFIG).read_text())
    assert (config.name, config.max_batch_size) == ("bn_lenet", 64)
    assert list(config.input[0].dims) == [1, 28, 28], "without the batch"
    assert (list(config.output[0].dims), config.output[0].label_filename) == ([10], LABELS)
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    (group,) = config.instance_group
    assert (group.count, group.kind) == (3, group.Kind.Value("KIND_CPU"))
    assert "24.05-py3" in done.next_steps[0]
    assert "--gpus" not in done.next_steps[0]


def test_the_committed_configuration_reads_the_same_way() -> None:
    """models/ is a repository already. A deployment adds the device and the labels, and changes nothing else."""
    reference = ROOT / "models" / "bn_lenet"
    config = read_config((reference / CONFIG).read_text())
    signature = Bundle.open(reference / "1").manifest.signature
    check_config((reference / CONFIG).read_text(), "bn_lenet", signature, files=FILES)
    again = read_config(triton_config("bn_lenet", signature, more=["instance_group [ { kind: KIND_CPU } ]"]))
    again.ClearField("instance_group")
    assert again == config


@pytest.mark.parametrize("device", DEVICES)
def test_devices(bundle: Bundle, tmp_path: Path, device: str) -> None:
    config = deployed(bundle, tmp_path / "out", device=device, max_batch_size=16)
    kinds = {"cpu": "KIND_CPU"}.get(device, "KIND_GPU")
    assert [group.Kind.Name(group.kind) for group in config.instance_group] == [kinds]
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [item.name for item in accelerators] == (["tensorrt"] if device == "tensorrt" else [])
    assert all(item.parameters["precision_mode"] == "FP32" for item in accelerators)
    assert ("cudnn_conv_algo_search" in config.parameters) == (device == "cuda")
    warm = [(item.batch_size, list(item.inputs["input"].dims)) for item in config.model_warmup]
    assert warm == ([] if device == "cpu" else [(1, [1, 28, 28]), (16, [1, 28, 28])])


def test_a_foreign_model_of_two_inputs(foreign: Bundle, tmp_path: Path) -> None:
    done = deploy_triton(foreign, tmp_path / "out")
    assert done.files == ("Foreign.v2/4/model.onnx", f"Foreign.v2/{CONFIG}"), "no labels, no file of labels"
    config = read_config((tmp_path / "out" / "Foreign.v2" / CONFIG).read_text())
    assert [tensor.name for tensor in config.input] == ["tokens", "scale"]
    assert (list(config.input[1].dims), list(config.input[1].reshape.shape)) == ([1], [])
    assert config.input[1].HasField("reshape")
    assert not config.output[0].label_filename


def test_a_batch_that_does_not_vary(tmp_path: Path) -> None:
    signature = fixed(FOREIGN, 3)
    config = deployed(foreign_bundle(tmp_path / "4", signature), tmp_path / "out", device="cuda")
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [3, 6], "with the batch"
    assert not config.HasField("dynamic_batching")
    assert [item.batch_size for item in config.model_warmup] == [1], "Triton allows no other without batching"


@pytest.mark.parametrize("shape", [("other", 2), ("batch", "batch"), (1, 2)])
@pytest.mark.parametrize("device", DEVICES)
def test_an_output_without_the_batch_axis_of_the_inputs(device: str, shape: tuple[Dim, ...]) -> None:
    """Triton would run several requests together, and divide such an output among them."""
    signature = Signature((TensorSpec("x", "float32", ("batch", 3)),), (TensorSpec("y", "float32", shape),))
    assert not signature.batched
    text = triton_config("m", signature, more=device_blocks(signature, device=device, instances=1, max_batch_size=64))
    check_config(text, "m", signature, files=FILES)
    config = read_config(text)
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    assert [list(tensor.dims) for tensor in (*config.input, *config.output)] == [
        [-1, 3],
        [-1 if isinstance(dim, str) else dim for dim in shape],
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_names_that_need_care(device: str) -> None:
    """Names of tensors may have quotes, line ends, and letters of every Unicode plane."""
    name = 'in "put"/0:\n\u00e9\\ \U0001f600'
    signature = Signature((TensorSpec(name, "float16", ("batch", 3)),), (TensorSpec("\t", "bool", ("batch", 2)),))
    text = triton_config("m", signature, more=device_blocks(signature, device=device, instances=1, max_batch_size=64))
    check_config(text, "m", signature, files=FILES)
    assert read_config(text).input[0].name == name


def test_no_labels_at_all(tmp_path: Path) -> None:
    none = reseal(foreign_bundle(tmp_path / "4").path, labels=())
    assert deploy_triton(none, tmp_path / "out").files == ("Foreign.v2/4/model.onnx", f"Foreign.v2/{CONFIG}")


def test_the_deployed_model_runs(foreign: Bundle, tmp_path: Path) -> None:
    deploy_triton(foreign, tmp_path / "out")
    inputs, outputs = foreign.golden()
    file = tmp_path / "out" / "Foreign.v2" / "4" / MODEL_ONNX
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for name, answer in zip(outputs, session.run(list(outputs), inputs), strict=True):
        assert answer == pytest.approx(outputs[name], rel=1e-6, abs=1e-6)


def test_an_existing_folder_stays_without_force(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(OutputError, match="exists already"):
        deploy_triton(bundle, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_force_replaces_a_deployment_and_nothing_else(bundle: Bundle, tmp_path: Path) -> None:
    """--force replaces neither the deployed bundle, which may be in the folder, nor other files there."""
    mine = copy_bundle(bundle, tmp_path / "models" / "bn_lenet" / "1")
    before = sorted(tmp_path.rglob("*"))
    for out, relation in ((tmp_path / "models", "contains"), (mine, "is"), (tmp_path, "contains")):
        with pytest.raises(OutputError, match=f" {relation} {re.escape(str(mine))}"):
            deploy_triton(Bundle.open(mine), out, DeployRequest(force=True))
    assert sorted(tmp_path.rglob("*")) == before
    out = tmp_path / "out"
    deploy_triton(bundle, out)
    (out / "bn_lenet" / "labels.txt").write_text("old")
    deploy_triton(bundle, out, DeployRequest(force=True))
    assert (out / "bn_lenet" / "labels.txt").read_text() != "old"
    (out / "precious").write_text("x")
    with pytest.raises(OutputError, match="contains precious"):
        deploy_triton(bundle, out, DeployRequest(force=True))
    assert (out / "precious").read_text() == "x"


def test_the_command_line_is_one_for_a_shell(bundle: Bundle, tmp_path: Path) -> None:
    """The command works with any folder name, and only this machine can reach the ports."""
    out = tmp_path / "it's a:folder; touch taken"
    (command,) = deploy_triton(bundle, out).next_steps
    words = shlex.split(command)
    assert words[words.index("--mount") + 1] == f"type=bind,source={out},target=/models,readonly"
    ports = [words[index + 1] for index, word in enumerate(words) if word == "-p"]
    assert ports == ["127.0.0.1:8000:8000", "127.0.0.1:8001:8001"]


@pytest.mark.parametrize("inside", [".", "1", "1/below/out", "link/1"])
def test_a_deployment_is_not_written_over(bundle: Bundle, tmp_path: Path, inside: str) -> None:
    """Otherwise, --force would delete the bundle, or the bundle would have a file that its manifest does not list."""
    mine = Bundle.open(copy_bundle(bundle, tmp_path / "models" / "1"))
    (tmp_path / "models" / "link").symlink_to(".")
    for deploy in (deploy_triton, deploy_docker):
        with pytest.raises(OutputError, match=r"is|contains|is inside"):
            deploy(mine, tmp_path / "models" / inside, DeployRequest(force=True))
    mine.check()
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["1", "link"]


def test_whole_or_absent(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ExportError("no", remedy="x")

    monkeypatch.setattr("bnexport.deploying.triton_repository.device_blocks", broken)
    with pytest.raises(ExportError):
        deploy_triton(bundle, tmp_path / "below" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_bundle_and_an_old_release_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    spoiled = copy_bundle(bundle, tmp_path / "bn_lenet" / "1")
    (spoiled / MODEL_ONNX).write_bytes((spoiled / MODEL_ONNX).read_bytes() + b"\0")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        deploy_triton(Bundle.open(spoiled), tmp_path / "out")
    new = foreign_bundle(tmp_path / "new" / "1", opset=22, ir_version=10)
    with pytest.raises(ExportError, match="operator set 22") as caught:
        deploy_triton(new, tmp_path / "out", DeployRequest(triton="24.05"))
    assert "--opset" not in caught.value.remedy, "fold-and-export refuses it for an ONNX source"
    assert "operator set 21" in caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "tpu"),
        ({"instances": 0}, "instances can't be 0"),
        ({"max_batch_size": -1}, "can't be -1"),
        ({"max_batch_size": 2**31}, "can't be 2147483648"),
        ({"instances": 2**31}, "Give 1 to 2147483647"),
    ],
)
def test_bad_requests(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DeployRequest(**options)


@pytest.mark.parametrize(
    ("target", "name", "proposed"),
    [
        ("triton", "a b/c", "a_b_c"),
        ("triton", "../up", "up"),
        ("triton", "", "model"),
        ("kserve", "bn_lenet", "bn-lenet"),
        ("kserve", "BN.LeNet-", "bn-lenet"),
        ("kserve", "7up", "model-7up"),
        ("kserve", "x" * 60, "x" * 47),
        ("docker", "Model 1", "model-1"),
        ("docker", "_x", "x"),
    ],
)
def test_names_that_a_target_refuses(target: str, name: str, proposed: str) -> None:
    with pytest.raises(UsageError, match="refuses the name") as caught:
        deployed_name(target, DeployRequest(name=name), "bundle")
    assert caught.value.remedy == f"Pass --name {proposed}"
    assert deployed_name(target, DeployRequest(name=proposed), "bundle") == proposed


@pytest.mark.parametrize("target", NAME_RULES)
@pytest.mark.parametrize("name", ["\u00fc\u00df", "-" * 200, "\n", "9" * 300, "a\nb", "model"])
def test_every_suggestion_is_taken(target: str, name: str) -> None:
    proposed = suggested_name(target, name)
    assert deployed_name(target, DeployRequest(name=proposed), "x") == proposed


TEXT = triton_config("foreign", FOREIGN)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_batch_size: 64", "max_batch_sise: 64", "can't read"),
        ("max_batch_size: 64", 'max_batch_size: "64"', "can't read"),
        ("max_batch_size: 64", "max_batch_size: 64 max_batch_size: 64", "can't read"),
        ("dynamic_batching { }", "dynamic_batching {", "can't read"),
        ("TYPE_FP32", "TYPE_FP31", "can't read"),
        ("dims: [ 6 ]", "dims: [ six ]", "can't read"),
        ('name: "foreign"', 'name: "other"', "named 'other'"),
        ('"onnxruntime"', '"pytorch"', "backend"),
        ('"model.onnx"', '"model.pt"', "there is no 'model.pt'"),
        ("max_batch_size: 64", "max_batch_size: 0", "max_batch_size is 0"),
        ('"tokens"', '"words"', "inputs are"),
        ("dims: [ 6 ]", "dims: [ -1, 6 ]", "inputs are"),
        ("    reshape: { shape: [ ] }\n", "", "inputs are"),
        ("TYPE_FP32", "TYPE_FP16", "inputs are"),
        ("intra_op_thread_count", "intra_op_threads", "all cores"),
        ('name: "scores"', 'name: "scores" label_filename: "names.txt"', "there is no 'names.txt'"),
    ],
)
def test_configurations_that_triton_would_refuse(old: str, new: str, message: str) -> None:
    check_config(TEXT, "foreign", FOREIGN, files=FILES)
    assert old in TEXT
    with pytest.raises(ConfigError, match=message):
        check_config(TEXT.replace(old, new), "foreign", FOREIGN, files=FILES)


@pytest.mark.needs("tritonclient")
def test_the_table_of_messages_is_tritons(bundle: Bundle, tmp_path: Path) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    def of(name: str) -> object:
        found = model_config_pb2.DESCRIPTOR.message_types_by_name[name.partition(".")[0]]
        for part in name.split(".")[1:]:
            found = found.nested_types_by_name[part]
        return found

    def facts_of(field: object) -> tuple[object, ...]:
        inner = field.message_type or field.enum_type
        repeated = getattr(field, "is_repeated", None)
        return field.number, field.type, inner and inner.full_name, field.label == 3 if repeated is None else repeated

    config_file = message_classes("a test")["ModelConfig"].DESCRIPTOR.file
    ours = {name: kind for name, kind in message_classes("a test").items() if kind.DESCRIPTOR.file is config_file}
    assert len(ours) > 10
    for name, kind in ours.items():
        for field in kind.DESCRIPTOR.fields:
            assert facts_of(field) == facts_of(of(name).fields_by_name[field.name]), f"{name}.{field.name}"
    for enumeration, theirs in (
        (config_file.enum_types_by_name["DataType"], model_config_pb2.DataType),
        (ours["ModelInstanceGroup"].DESCRIPTOR.enum_types_by_name["Kind"], model_config_pb2.ModelInstanceGroup.Kind),
    ):
        assert {value.name: value.number for value in enumeration.values} == dict(theirs.items())
    for device in DEVICES:
        deploy_triton(bundle, tmp_path / device, DeployRequest(device=device))
        text = (tmp_path / device / "bn_lenet" / CONFIG).read_text()
        assert text_format.Parse(text, model_config_pb2.ModelConfig()).name == "bn_lenet"


def test_a_tuning_sets_instances_threads_and_the_preferred_batch(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tuned_copy(bundle, tmp_path / "tuned", monkeypatch)
    done = deploy_triton(mine, tmp_path / "out", DeployRequest())
    text = (tmp_path / "out" / "bn_lenet" / CONFIG).read_text()
    assert done.tuning == "tuned: 3 sessions x 2 threads, batch 32"
    config = read_config(text)
    assert (config.instance_group[0].count, config.max_batch_size) == (3, 64)
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    assert list(config.dynamic_batching.preferred_batch_size) == [32]
    check_config(text, "bn_lenet", mine.manifest.signature, files=FILES)
    deploy_triton(bundle, tmp_path / "plain", DeployRequest())
    assert "dynamic_batching { }\n" in (tmp_path / "plain" / "bn_lenet" / CONFIG).read_text()


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, {"instances": 1}, ("tuned: 1 session x 1 thread, batch 32", 1, "1", 64, [32])),
        ({}, {"max_batch_size": 16}, ("tuned: 3 sessions x 2 threads, batch 1", 3, "2", 16, [])),
        ({"batch": 256}, {}, ("tuned: 3 sessions x 2 threads, batch 256", 3, "2", 256, [256])),
        ({"batch": 1}, {}, ("tuned: 3 sessions x 2 threads, batch 1", 3, "2", 64, [])),
        ({"runtime": "openvino-cpu"}, {}, (OTHER_RUNTIME, 1, "1", 64, [])),
        ({}, {"device": "cuda"}, (OTHER_RUNTIME.replace("openvino", "onnxruntime"), 1, "1", 64, [])),
    ],
)
def test_options_win_over_a_tuning(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    options: dict[str, Any],
    expected: tuple[Any, ...],
) -> None:
    mine = tuned_copy(bundle, tmp_path / "tuned", monkeypatch, **changes)
    done = deploy_triton(mine, tmp_path / "out", DeployRequest(**options))
    config = read_config((tmp_path / "out" / "bn_lenet" / CONFIG).read_text())
    found = config.instance_group[0].count, config.parameters["intra_op_thread_count"].string_value
    batches = config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)
    assert (done.tuning, *found, *batches) == expected


def test_a_tuning_is_copied_into_an_image(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tuned_copy(bundle, tmp_path / "tuned", monkeypatch)
    done = deploy_docker(mine, tmp_path / "out", DeployRequest(name="lenet"))
    assert "models/bn_lenet/1/tuned.json" in done.files
    Bundle.open(tmp_path / "out" / "models" / "bn_lenet" / "1").check()
