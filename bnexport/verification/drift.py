"""Layer by layer: where a runtime first leaves the error that its precision predicts, and when layers are compared."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnexport.bundle import MODEL_ONNX, Bundle, seal
from bnexport.errors import BnexportError, BundleError, UsageError
from bnexport.onnx_files.emulation import Emulator
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.onnx_files.models import LINEAR, read_model
from bnexport.runtimes.base import REBUILD
from bnexport.runtimes.catalogue import RunnerSpec
from bnexport.runtimes.replay import scale
from bnexport.runtimes.settings import RunSettings
from bnexport.tensors import DTYPES, Array, Signature, TensorSpec
from bnexport.verification.forecast import FACTOR
from bnexport.verification.runs import RuntimeRun
from bnexport.verification.verdict import LayerDrift
from bnexport.verification.work import Work

if TYPE_CHECKING:
    from onnx import ModelProto


#: What a layer may be off by whatever its emulation says: the bound of strict float32.
_FLOOR = 1e-5
#: Stands for infinity and NaN, which JSON has no words for.
_MOST = sys.float_info.max


def layer_drift(
    bundle: Bundle, spec: RunnerSpec, settings: RunSettings, feeds: Mapping[str, Array], *, precision: str
) -> tuple[LayerDrift, ...]:
    """Compare the output of every linear layer, on one runtime, with its value in float64 and under emulation.

    The runtime gets a copy of model.onnx that also gives out these values. That can keep it from fusing operators, so the
    numbers are a diagnosis of where an error comes from, and no verdict. Both sides compute with the weights of this very
    file: a fault of the file moves them alike, and is the file proof's to find.

    Args:
        bundle: Its model.onnx is copied; the bundle itself is not touched.
        spec: A runtime that reads model.onnx.
        settings: As the runtime was run with.
        feeds: Input name -> (n, ...), few samples.
        precision: What is expected of the numbers; a key of ``emulation.PRECISIONS``.

    Returns:
        The layers in the order of the file; empty for a file without a linear layer. A layer with a value that is not finite
        has the largest float as its error.

    Raises:
        BundleError: The file can't be evaluated, or the runtime can't give out its values.
        Unavailable: The engine, the device or a library is not here.
        UsageError: The runtime does not read model.onnx, or does not have the precision of the settings.
    """
    if spec.file != MODEL_ONNX:
        raise UsageError(
            f"the layers of {spec.name} can't be looked at: it reads {spec.file}",
            remedy=f"Use one that reads {MODEL_ONNX}",
        )
    model = read_model(bundle.file(MODEL_ONNX))
    operators = {node.output[0]: node.op_type for node in model.graph.node if node.op_type in LINEAR}
    exact, specs = _exact_values(model, feeds, operators)
    if not specs:
        return ()
    emulated = Emulator(model, precision).values(feeds)
    given = _run(bundle, model, spec, settings, feeds, specs)
    if odd := [name for name in specs if given[name].shape != exact[name].shape]:
        raise BundleError(f"{spec.name} gives {odd[0]!r} another shape than the file computes", remedy=REBUILD)
    return tuple(_compared(name, operators[name], given[name], exact[name], emulated[name]) for name in specs)


def _exact_values(
    model: ModelProto, feeds: Mapping[str, Array], names: Iterable[str]
) -> tuple[dict[str, Array], dict[str, TensorSpec]]:
    """Values in float64 by name, and how a file that gives them out declares them.

    A dimension varies where one sample more changes it; that it has the size of the batch can be chance.
    """
    engine = Float64Evaluator(model)
    engine.evaluate(feeds)  # refuses an evaluation that leaves float64
    values = engine.intermediate(feeds)
    more = (
        engine.intermediate({name: np.concatenate([array, array[:1]]) for name, array in feeds.items()})
        if engine.varies
        else values
    )
    types, specs = _element_types(model), {}
    for name in names:
        value = values.get(name)
        if value is None or value.dtype.kind != "f" or types[name] not in DTYPES:
            continue
        pairs = enumerate(zip(value.shape, more[name].shape, strict=True))
        specs[name] = TensorSpec(
            name, types[name], tuple(size if size == other else f"varies_{at}" for at, (size, other) in pairs)
        )
    return values, specs


def _element_types(model: ModelProto) -> dict[str, str]:
    """Value -> numpy's name of its element type; that of the first float weight where the file does not tell."""
    from onnx import helper, shape_inference

    def named(number: int) -> str:
        return str(helper.tensor_dtype_to_np_dtype(number).name)

    usual = next((int(item.data_type) for item in model.graph.initializer if item.data_type in (1, 10, 16)), 1)
    types = {name: named(usual) for node in model.graph.node for name in node.output}
    try:
        inferred = shape_inference.infer_shapes(model)
    except Exception:  # what the weights say is a fair guess, and the runtime refuses a wrong one
        return types
    known = (*inferred.graph.value_info, *inferred.graph.output)
    return types | {
        item.name: named(item.type.tensor_type.elem_type) for item in known if item.type.tensor_type.elem_type
    }


def _run(
    bundle: Bundle,
    model: ModelProto,
    spec: RunnerSpec,
    settings: RunSettings,
    feeds: Mapping[str, Array],
    wanted: Mapping[str, TensorSpec],
) -> dict[str, Array]:
    """The wanted values, as the runtime computes them."""
    from onnx import helper

    outputs = {item.name: item for item in bundle.manifest.signature.outputs}
    copy = type(model)()
    copy.CopyFrom(model)
    for name in [name for name in wanted if name not in outputs]:
        outputs[name] = wanted[name]
        element = helper.np_dtype_to_tensor_dtype(np.dtype(wanted[name].dtype))
        copy.graph.output.append(helper.make_tensor_value_info(name, element, list(wanted[name].shape)))
    told = replace(bundle.manifest, signature=Signature(bundle.manifest.signature.inputs, tuple(outputs.values())))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MODEL_ONNX).write_bytes(copy.SerializeToString())
        with spec.open(seal(Path(folder), told), settings=settings) as runner:
            return runner.run(feeds)


def _compared(name: str, operator: str, given: Array, exact: Array, emulated: Array) -> LayerDrift:
    there = np.isfinite(exact)  # what the file itself makes infinite tells nothing of the runtime
    of = scale(exact[there]) if there.any() else 1.0
    error, predicted = (_largest(value[there], exact[there]) / of for value in (given, emulated))
    left = not error <= min(_MOST, max(_FLOOR, FACTOR * predicted))  # infinity has left whatever was predicted
    return LayerDrift(name, operator, min(error, _MOST), min(predicted, _MOST), left)


def _largest(values: Array, exact: Array) -> float:
    """Largest |values - exact|; infinity where a value is not finite."""
    if not np.isfinite(values).all():
        return float("inf")
    return float(np.abs(values.astype(np.float64) - exact).max(initial=0.0))


#: Samples that each layer is compared on.
_SAMPLES = 4
_STAGES = ("golden", "strict", "shipping")


def look_at_layers(spec: RunnerSpec, run: RuntimeRun, work: Work, *, wanted: bool | None) -> tuple[LayerDrift, ...]:
    """Compare a runtime layer by layer, where that is asked for, cheap, or where the runtime failed.

    It is a diagnosis and no verdict: giving out every layer's value can keep an engine from fusing them. A failed row of
    the run is told the first layer that leaves its prediction.

    Args:
        spec: The runtime.
        run: After ``go``; the reason of its first failed row may grow.
        work: Bundle and forecast.
        wanted: True, False, or None for where it is cheap or the runtime failed.

    Returns:
        The layers in order; empty where they were not looked at, or the engine refuses.
    """
    failed = next((i for i, row in enumerate(run.rows) if not row.passed and row.stage in _STAGES), None)
    if wanted is False or spec.file != MODEL_ONNX or not run.plan.cases or not run.forecast.possible:
        return ()
    if wanted is None and failed is None and not run.forecast.cheap:
        return ()
    case = run.plan.cases[0]
    feeds = case.batch.head(min(_SAMPLES, run.forecast.limit)).feeds if run.varies else case.batch.feeds
    try:
        layers = layer_drift(work.bundle, spec, run.settings, feeds, precision=run.rounding)
    except BnexportError as error:
        if wanted:
            work.skipped[f"drift of {spec.name}"] = error.message
        return ()
    first = next((layer for layer in layers if layer.left), None)
    if failed is not None and first is not None:
        row = run.rows[failed]
        told = f"; the first layer off its prediction is {first.layer} ({first.operator}): {first.error:.1e} of scale"
        run.rows[failed] = replace(row, reason=row.reason + told)
    return layers
