"""Compare layers: find where a runtime first exceeds the error that its precision predicts."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnexport.bundle import MODEL_ONNX, Bundle, seal
from bnexport.errors import REBUILD, BnexportError, BundleError, UsageError
from bnexport.onnx_files.emulation import Emulator
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.onnx_files.models import LINEAR, read_model
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import RunnerSpec
from bnexport.runtimes.replay import scale
from bnexport.tensors import DTYPES, Array, Signature, TensorSpec
from bnexport.verification.evidence import Evidence
from bnexport.verification.forecast import FACTOR
from bnexport.verification.runs import RuntimeRun
from bnexport.verification.verdict import LayerDrift

if TYPE_CHECKING:
    from onnx import ModelProto


#: Error that every layer may have, whatever its emulation predicts: the bound of strict float32.
_FLOOR = 1e-5
#: Stands for infinity and NaN, which JSON can't represent.
_MOST = sys.float_info.max


def layer_drift(
    bundle: Bundle, spec: RunnerSpec, settings: RunSettings, feeds: Mapping[str, Array], *, precision: str
) -> tuple[LayerDrift, ...]:
    """Compare the output of every linear layer on a runtime, for few samples, with its value in float64 and under emulation.

    The runtime gets a copy of model.onnx that also outputs these values. The extra outputs can keep the runtime from fusing
    operators, so the numbers are a diagnosis and not a verdict. Both sides use the weights of this file; only the file proof
    finds faults in the weights. A layer with a value that is not finite has the largest float as its error.
    """
    if spec.file != MODEL_ONNX:
        raise UsageError(
            f"the layers of {spec.name} can't be compared: it reads {spec.file}",
            remedy=f"Name a runtime that reads {MODEL_ONNX}",
        )
    model = read_model(bundle.file(MODEL_ONNX))
    operators = {node.output[0]: node.op_type for node in model.graph.node if node.op_type in LINEAR}
    exact, specs = _exact_values(model, feeds, operators)
    if not specs:
        return ()
    emulated = Emulator(model, precision).intermediate(feeds)
    given = _run(bundle, model, spec, settings, feeds, specs)
    if odd := [name for name in specs if given[name].shape != exact[name].shape]:
        name = odd[0]
        raise BundleError(
            f"{spec.name} gives {name!r} in shape {given[name].shape}, but the file computes {exact[name].shape}",
            remedy=REBUILD,
        )
    return tuple(_compared(name, operators[name], given[name], exact[name], emulated[name]) for name in specs)


def _exact_values(
    model: ModelProto, feeds: Mapping[str, Array], names: Iterable[str]
) -> tuple[dict[str, Array], dict[str, TensorSpec]]:
    """Return the values in float64 by name, and their declarations as outputs.

    A dimension varies where one more sample changes it: its equality with the batch size can be chance.
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
    """Return value -> numpy's name of its type; where the file declares none, that of the first float weight."""
    from onnx import helper, shape_inference

    def named(number: int) -> str:
        return str(helper.tensor_dtype_to_np_dtype(number).name)

    usual = next((int(item.data_type) for item in model.graph.initializer if item.data_type in (1, 10, 16)), 1)
    types = {name: named(usual) for node in model.graph.node for name in node.output}
    try:
        inferred = shape_inference.infer_shapes(model)
    except Exception:  # the type of the weights is a fair guess, and the runtime refuses a wrong one
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
    """Return the wanted values as the runtime computes them."""
    from onnx import helper

    outputs = {item.name: item for item in bundle.manifest.signature.outputs}
    copy = type(model)()
    copy.CopyFrom(model)
    for name in [name for name in wanted if name not in outputs]:
        outputs[name] = wanted[name]
        element = helper.np_dtype_to_tensor_dtype(np.dtype(wanted[name].dtype))
        copy.graph.output.append(helper.make_tensor_value_info(name, element, list(wanted[name].shape)))
    manifest = replace(bundle.manifest, signature=Signature(bundle.manifest.signature.inputs, tuple(outputs.values())))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MODEL_ONNX).write_bytes(copy.SerializeToString())
        with spec.open(seal(Path(folder), manifest), settings=settings) as runner:
            return runner.run(feeds)


def _compared(name: str, operator: str, given: Array, exact: Array, emulated: Array) -> LayerDrift:
    there = np.isfinite(exact)  # values that are infinite in float64, too, are no fault of the runtime
    of = scale(exact[there]) if there.any() else 1.0
    error, predicted = (_largest(value[there], exact[there]) / of for value in (given, emulated))
    left = not error <= min(_MOST, max(_FLOOR, FACTOR * predicted))  # infinity exceeds every prediction
    return LayerDrift(name, operator, min(error, _MOST), min(predicted, _MOST), left)


def _largest(values: Array, exact: Array) -> float:
    """Return the largest |values - exact|; infinity where a value is not finite."""
    if not np.isfinite(values).all():
        return float("inf")
    return float(np.abs(values.astype(np.float64) - exact).max(initial=0.0))


#: Samples that each layer is compared on.
_SAMPLES = 4
_STAGES = ("golden", "strict", "shipping")


def diagnose(
    spec: RunnerSpec, settings: RunSettings, run: RuntimeRun, evidence: Evidence, *, wanted: bool | None
) -> tuple[RuntimeRun, str]:
    """Compare a runtime layer by layer where ``wanted``, or (None) where it is cheap or the runtime failed.

    Return the run with its layers, and why wanted layers could not be compared. The reason of the run's first failed check
    names the first layer that exceeds its prediction.
    """
    failed = next((at for at, row in enumerate(run.rows) if not row.passed and row.stage in _STAGES), None)
    forecast = evidence.forecast
    if evidence.precision == "int8":
        return run, "the layers of an int8 file are not compared" if wanted else ""
    left_out = wanted is False or (wanted is None and failed is None and not forecast.cheap)
    if left_out or spec.file != MODEL_ONNX or not evidence.cases or not forecast.possible:
        return run, ""
    feeds = forecast.front(evidence.cases[0], most=_SAMPLES).batch.feeds
    try:
        layers = layer_drift(evidence.bundle, spec, settings, feeds, precision=run.rounding)
    except BnexportError as error:
        return run, error.message if wanted else ""
    first, rows = next((layer for layer in layers if layer.left), None), list(run.rows)
    if failed is not None and first is not None:
        where = (
            f"; the first layer beyond its prediction is {first.layer} ({first.operator}): {first.error:.1e} of scale"
        )
        rows[failed] = replace(rows[failed], reason=rows[failed].reason + where)
    return replace(run, rows=tuple(rows), drift=layers), ""
