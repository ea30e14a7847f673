"""onnxruntime's real CUDA provider on a machine without a GPU: where nodes are placed, what is read back, how memory is bound.

Values are without meaning here; tests/gpu compares values.
"""

import itertools
import json
from pathlib import Path

import onnx
import pytest
from support.fake_cuda.bundles import onnx_bundle
from support.fake_cuda.machine import Job, Machine, Opened

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.runtimes import small_model
from bnexport.runtimes.base import CONV_SEARCHES, OPTIMISATIONS, RunSettings

pytestmark = pytest.mark.needs("fake-cuda")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
REFERENCE = Path(__file__).parents[2] / "models" / "bn_lenet" / "1"
BATCHES = (0, 1, 5)
INTEGERS = {onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL}
FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
#: Operators of shape arithmetic that onnxruntime's optimiser adds under its own names.
ADDED = {"Gather", "Slice", "Unsqueeze", "Squeeze", "Concat", "Cast"}


def batches(bundle: Bundle, size: int = 8) -> tuple[tuple[int, ...], ...]:
    """Shapes of the first input for BATCHES; a size that varies is ``size``."""
    sizes = [dim if isinstance(dim, int) else size for dim in bundle.manifest.signature.inputs[0].shape[1:]]
    return tuple((batch, *sizes) for batch in BATCHES)


def placed_right(bundle: Bundle, found: Opened) -> None:
    """Every node is on CUDA but shape arithmetic, by the types that the onnx package infers from the file."""
    assert found.error == ""
    model = onnx.shape_inference.infer_shapes(onnx.load(bundle.file(MODEL_ONNX)))
    values = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.output)}
    outputs = {(node.name, node.op_type): [values[name] for name in node.output] for node in model.graph.node}
    for key in found.on(CPU):
        if key not in outputs:
            assert key[1] in ADDED, key
            continue
        for kind in outputs[key]:
            assert kind.elem_type in INTEGERS, key
            assert len(kind.shape.dim) <= 1, key
    assert {provider for _, _, provider in found.nodes} <= {CPU, CUDA}
    counts = {CUDA: len(found.on(CUDA)), CPU: len(found.on(CPU))}
    assert found.description["nodes"] == {name: count for name, count in counts.items() if count}
    assert found.description["device"] == "cuda:0"
    if counts[CPU]:
        assert found.description["placement"] == f"{counts[CPU]} shape node{'s' * (counts[CPU] > 1)} on the CPU"
    # A fused node is named for the node of the file that it replaces, as "node_matmul/MatMulAddFusion".
    named = {name: kinds for (name, _), kinds in outputs.items()}
    on_cuda = [outputs.get(key) or named.get(key[0].partition("/")[0], ()) for key in found.on(CUDA)]
    assert any(kind.elem_type in FLOATS for kinds in on_cuda for kind in kinds)


def test_every_way_of_calling_the_reference_bundle(machine: Machine) -> None:
    """All optimisation levels, bound and copied memory, and batches after each other, empty ones included."""
    bundle = Bundle.open(REFERENCE)
    settings = [
        RunSettings(optimisation=level, binding=binding) for level in OPTIMISATIONS for binding in (False, True)
    ]
    found = machine.open(*(Job(str(REFERENCE), row, batches(bundle)) for row in settings))
    for row, opened in zip(settings, found, strict=True):
        placed_right(bundle, opened)
        assert [outputs["logits"] for outputs in opened.outputs] == [[batch, 10] for batch in BATCHES]
        assert opened.description["optimisation"] == row.optimisation
        assert opened.description["memory"] == ("bound on cuda" if row.binding else "copied by each call")
        assert opened.description["deterministic"] is True


def test_the_options_of_the_provider_are_read_back(machine: Machine) -> None:
    settings = [
        RunSettings(precision, conv_search=search)
        for precision, search in itertools.product(("float32", "tf32"), CONV_SEARCHES)
    ]
    for row, opened in zip(settings, machine.open(*(Job(str(REFERENCE), row) for row in settings)), strict=True):
        found = opened.description
        assert found["options"][CUDA]["use_tf32"] == ("1" if row.precision == "tf32" else "0")
        assert found["options"][CUDA]["cudnn_conv_algo_search"] == row.conv_search.upper()
        assert found["precision"] == row.precision
        assert found["deterministic"] is (row.precision == "float32")


@pytest.mark.parametrize("name", ["users", "float16", "any size"])
def test_operators_of_users_networks_run_on_cuda(machine: Machine, made: dict[str, Bundle], name: str) -> None:
    """A flatten by view, tensors that are made in forward, sizes that vary, half precision; bound and copied."""
    bundle = made[name]
    jobs = [Job(str(bundle.path), RunSettings(binding=binding), batches(bundle, 14)) for binding in (False, True)]
    for opened in machine.open(*jobs):
        placed_right(bundle, opened)
        sizes = [next(iter(outputs.values()))[0] for outputs in opened.outputs]
        assert sizes == list(BATCHES)
        if name == "any size":
            assert opened.outputs[-1]["output_0"] == [5, 6, 14, 14]
            assert opened.on(CPU)


def test_files_of_other_exporters_and_of_the_doctor_run_on_cuda(
    machine: Machine, bundle: Bundle, tmp_path: Path
) -> None:
    """The model of ``bnexport doctor`` computes a shape for its flatten, as exporters write it."""
    small = small_model.small_bundle(tmp_path)
    # view(n, -1) has no answer for an empty batch, in torch as in ONNX.
    jobs = Job(str(bundle.path), shapes=batches(bundle)), Job(str(tmp_path), shapes=batches(small)[1:])
    found = machine.open(*jobs)
    for tried, opened in zip((bundle, small), found, strict=True):
        placed_right(tried, opened)
    assert [outputs["logits"] for outputs in found[0].outputs] == [[batch, 10] for batch in BATCHES]
    assert [outputs["logits"] for outputs in found[1].outputs] == [[batch, 3] for batch in BATCHES[1:]]
    assert found[1].on(CPU)


def test_a_float_node_without_a_cuda_kernel_is_refused_by_name(machine: Machine, made: dict[str, Bundle]) -> None:
    bundle = made["no kernel"]
    (node,) = [node for node in onnx.load(bundle.file(MODEL_ONNX)).graph.node if node.op_type == "Det"]
    (found,) = machine.open(Job(str(bundle.path)))
    assert found.kind == "RuntimeUnavailable"
    assert f"the node {node.name!r} (Det) with an output of float of rank 2 runs on {CPU}" in found.error
    assert "replace the operators" in found.remedy


def test_a_full_gpu_is_called_so(machine: Machine) -> None:
    (found,) = machine.open(Job(str(REFERENCE)), FAKE_CUDA_MEMORY="1000")
    assert found.kind == "RuntimeUnavailable"
    assert found.remedy.startswith("Free the GPU's memory"), found


def test_without_the_libraries_the_whole_session_is_refused(machine: Machine) -> None:
    """onnxruntime itself opens the session on the CPU, without an error."""
    (found,) = machine.open(Job(str(REFERENCE)), LD_LIBRARY_PATH="")
    assert found.kind == "RuntimeUnavailable"
    assert "onnxruntime-cuda can't run here: " in found.error
    assert "libcu" in found.error


def test_verify_runs_on_cuda_and_fails_on_wrong_numbers(machine: Machine, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    few = ("--max-samples", "8", "--no-drift", "--json", str(report))
    done = machine.bnexport("verify", str(REFERENCE), "--runtime", "onnxruntime-cuda", *few)
    assert done.returncode == 1, done.stderr
    result = json.loads(report.read_text())
    assert result["runtimes"]["onnxruntime-cuda"]["device"] == "cuda:0"
    assert result["runtimes"]["onnxruntime-cuda"]["process"] == "its own"
    assert result["skipped"].get("onnxruntime-cuda") is None
    failed = [row for row in result["rows"] if not row["passed"]]
    assert {row["stage"] for row in failed} >= {"strict"}
    assert all("onnxruntime-cuda" in row["subject"] for row in failed), failed


def test_verify_names_what_cuda_refuses(machine: Machine, made: dict[str, Bundle]) -> None:
    """Named, the runtime ends with an error; among all runtimes it is a check that fails, not a runtime that was not run."""
    folder = str(made["no kernel"].path)
    named = machine.bnexport("verify", folder, "--runtime", "onnxruntime-cuda", "--max-samples", "4")
    assert named.returncode == 3
    assert "(Det) with an output of float of rank 2 runs on CPUExecutionProvider" in " ".join(named.stderr.split())
    every = machine.bnexport("verify", folder, "--max-samples", "4", "--no-drift", "--json", "-")
    assert every.returncode == 1
    result = json.loads(every.stdout)
    assert "onnxruntime-cuda" not in result["skipped"]
    (row,) = [row for row in result["rows"] if row["subject"] == "onnxruntime-cuda"]
    assert (row["case"], row["passed"]) == ("open", False)
    assert "(Det)" in row["reason"]


def test_the_doctor_opens_cuda_and_does_not_believe_its_numbers(machine: Machine) -> None:
    done = machine.bnexport("doctor", "--json", "--require", "onnxruntime-cuda")
    assert done.returncode == 3
    health = {row["runtime"]: row for row in json.loads(done.stdout)["runtimes"]}
    assert health["onnxruntime-cuda"]["reason"].startswith("its outputs are wrong: the error is ")
    assert health["onnxruntime-cuda"]["device"] == "cuda:0"
    assert health["onnxruntime-cuda"]["details"]["placement"].endswith("on the CPU")
    assert health["onnxruntime-cpu"]["works"] is True
    assert "torch is not installed" in health["torch-cuda"]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["torchvision:resnet18", "torchvision:mobilenet_v3_small", "timm:repvgg_a0"])
def test_networks_of_the_zoos_run_on_cuda(machine: Machine, tmp_path: Path, source: str) -> None:
    from bnexport.loading.sources import load_source

    module = load_source(source, weights=None, options={}).module
    bundle = onnx_bundle(tmp_path / "net" / "1", module, (2, 3, 64, 64))
    (found,) = machine.open(Job(str(bundle.path), shapes=batches(bundle)))
    placed_right(bundle, found)
    assert [next(iter(outputs.values())) for outputs in found.outputs] == [[batch, 1000] for batch in BATCHES]


CHUNKS = 26


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_model_of_the_cases_runs_on_cuda(machine: Machine, tmp_path: Path, chunk: int) -> None:
    """All models of the table that the exporter takes; the others are refused before any engine sees them."""
    from cases import CASES

    from bnexport.errors import BnexportError

    bundles = []
    for number, case in enumerate(CASES[chunk::CHUNKS]):
        try:
            bundles.append(onnx_bundle(tmp_path / str(number) / "1", case.build(), *case.shapes))
        except BnexportError:
            continue
    assert len(bundles) > len(CASES[chunk::CHUNKS]) / 2
    found = machine.open(*(Job(str(bundle.path)) for bundle in bundles))
    for bundle, opened in zip(bundles, found, strict=True):
        placed_right(bundle, opened)
