"""Audit an int8 ONNX file of any tool: can it saturate, and what do the kernels of this machine compute?

A file in the QOperator form (QLinearConv, QGemm, ...) is first written in the QDQ form, which states the same arithmetic. Then
the integer emulation predicts the effect of 16-bit saturation on every machine, and the engine shows it on this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from bnexport.data.images import folder_entries
from bnexport.data.preprocessing import PixelPreprocessing, Preprocessing
from bnexport.data.samples import load_samples
from bnexport.environment import int8_instructions
from bnexport.errors import BnexportError, DataError, ExportError, ModelError, RuntimeUnavailable, UsageError
from bnexport.exporting.export_request import InputSpec, image_preprocessing
from bnexport.exporting.signature import signature_of_file
from bnexport.files import refuse_existing_file, write_atomically
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.onnx_files.models import LINEAR, multiplications, read_model, read_validated
from bnexport.optional import installed, one_line
from bnexport.quantization.integer_emulation import (
    EXACT,
    LAST_BIT,
    SATURATING,
    Int8Layer,
    IntegerEmulator,
    int8_layers,
    rounded_float_layers,
)
from bnexport.quantization.writer import DYNAMIC, LayerRisk, as_qdq, dynamic_risks, is_int8_model, node_name, repaired
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.onnxruntime_session import load_engine, open_session
from bnexport.runtimes.openvino import OpenVinoRunner
from bnexport.tensors import Array, Signature

#: Inputs -> outputs by name, of an engine.
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Outputs = Mapping[str, Array]
#: Kernels may disagree by this many times what another last bit at every requantisation makes, and never by less than _FLOOR.
_FACTOR, _FLOOR = 3.0, 1e-5
#: Largest error of scale of right kernels where a file can't be emulated: 3 x the usual disagreement of a last bit.
_UNPREDICTED = 0.0075
#: Multiplications that are emulated, which decides the number of samples; fewest and most samples; samples evaluated at once.
_BUDGET, _FEWEST, _MOST, _CHUNK = 4e9, 8, 256, 8
_SYNTHETIC = 64
#: Kernels of ONNX Runtime -> whether all of them add in 32 bits (session.x64quantprecision). The first are the default.
_KERNELS = {"default kernels here": False, "precise kernels here": True}
_OPENVINO = "OpenVINO here"
#: Share of the values of a tensor from which clipping is reported.
_CLIPPED = 0.01
_SHOWN = 4
_ROUNDED = (
    "codes are in front of and behind them, so ONNX Runtime rounds their weights to int8, and --repair prevents it"
)
_SATURATE = "on CPUs with AVX2, or AVX-512 without VNNI; not with VNNI, AMX or ARM's dot product"


@dataclass(frozen=True)
class Difference:
    """Distance of outputs from others: rms and max of scale, changed labels (None without labels), samples, dB."""

    rms: float
    error: float
    labels: int | None
    n: int
    snr: float | None

    def __str__(self) -> str:
        """Return the numbers as a phrase."""
        labels = "" if self.labels is None else f"; {self.labels} of {self.n} labels changed"
        return f"rms {self.rms:.2g}, max {self.error:.2g} of scale{labels}"


@dataclass(frozen=True)
class AuditCheck:
    """One line of an audit: verdict is "right", "wrong" or "note"."""

    verdict: str
    name: str
    text: str


@dataclass(frozen=True)
class Int8Audit:
    """The findings on one int8 file."""

    checks: tuple[AuditCheck, ...]
    layers: tuple[LayerRisk, ...]
    differences: Mapping[str, Difference]
    bound: float | None  # Largest rms of right kernels, of scale
    samples: str
    means: Mapping[str, Array]  # Layer's output -> E[x] of each input channel on the samples
    unread: int = 0  # Layers with int8 inputs whose weights could not be read
    largest: float | None = None  # Largest error of right kernels, of scale; None where it was not predicted

    @property
    def saturating(self) -> int:
        """Return the number of channels that can saturate."""
        return sum(layer.saturating for layer in self.layers)

    @property
    def wrong(self) -> tuple[AuditCheck, ...]:
        """Return the failed checks."""
        return tuple(check for check in self.checks if check.verdict == "wrong")

    def summary(self) -> str:
        """Return the verdict as one sentence."""
        if self.wrong:
            return f"wrong: {', '.join(check.name for check in self.wrong)}"
        if self.saturating:
            return f"right here on {self.samples}, but {self.saturating} channels can saturate"
        if self.unread:
            return f"right here on {self.samples}; {self.unread} layers could not be read"
        return "right: no channel can saturate"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "passed": not self.wrong,
            "summary": self.summary(),
            "samples": self.samples,
            "bound": self.bound,
            "largest": self.largest,
            "saturating_channels": self.saturating,
            "checks": [asdict(check) for check in self.checks],
            "layers": [asdict(layer) for layer in self.layers],
            "unread_layers": self.unread,
            "differences": {
                name: {
                    key: value if value is None or np.isfinite(value) else None for key, value in asdict(found).items()
                }
                for name, found in self.differences.items()
            },
        }


def audit_int8_file(
    source: Path,
    *,
    reference: Path | None = None,
    samples: Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    repair: Path | None = None,
    force: bool = False,
) -> Int8Audit:
    """Audit an int8 file with the engines of this machine, and write a repaired file on request.

    Args:
        source: The file.
        reference: The float32 file from which it was made.
        samples: Inputs as for ``data.samples.load_samples``; None: synthetic ones.
        mean: Mean per channel of pixels from 0 to 1, for samples that are images.
        std: Standard deviation per channel, with ``mean``.
        repair: File to write, with weights that can't saturate.
        force: Replace an existing ``repair``.

    Raises:
        ModelError: Not an int8 file, or another reason of ``audit_int8`` or ``writer.repaired``; nothing was written.
        DataError: The samples can't be used.
        OutputError: ``repair`` exists already, or can't be written.
    """
    if repair is not None:
        refuse_existing_file(repair, force=force, read=[source], role="audited file")
    model = read_model(source)
    if not is_int8_model(model):
        raise ModelError(
            f"{source} is not an int8 file: it has no QuantizeLinear, QLinearConv or ConvInteger",
            remedy="Give an int8 file, or the network itself to compare tools that fold",
        )
    feeds = None if samples is None else _samples(model, samples, mean, std)
    exact = None if reference is None else read_model(reference)
    described = "" if samples is None else samples.name
    with ExitStack() as stack:
        runs, unavailable = _engines(source, model, stack)
        found = audit_int8(model, runs, feeds, described=described, reference=exact, unavailable=unavailable)
    if repair is not None:
        content = repaired(model, found.means).SerializeToString(deterministic=True)
        if next(iter(_KERNELS)) not in unavailable:
            _check_opens(content)
        write_atomically(repair, content, follow=True)
    return found


def _check_opens(content: bytes) -> None:
    """Open a repaired file in ONNX Runtime, which opened the original; ModelError if it can't."""
    try:
        open_session(load_engine(), content, "cpu", RunSettings())
    except Exception as error:  # onnxruntime's classes derive from Exception alone
        raise ModelError(
            f"ONNX Runtime can't load the repaired file: {one_line(error, 120)}",
            remedy="Repair the file as it was before ONNX Runtime optimised it",
        ) from error


def _samples(
    model: ModelProto, path: Path, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Mapping[str, Array]:
    """Return the samples of a file or folder; a fixed batch size is left to the audit."""
    declared = _signature(model)
    inputs = tuple(replace(spec, shape=("batch", *spec.shape[1:])) for spec in declared.inputs)
    sized = all(isinstance(size, int) for size in inputs[0].shape[1:])
    specs = [InputSpec(spec.name, tuple(map(int, spec.shape[1:]))) for spec in inputs] if sized else []
    image = image_preprocessing(specs, mean, std)
    if image is None and path.is_dir():
        raise UsageError(f"--samples {path} is a folder of images", remedy="Pass --mean and --std as well")
    kind = PixelPreprocessing if inputs[0].dtype == "uint8" else Preprocessing
    given = None if image is None else kind.from_json(image)
    names = [folder.name for folder in folder_entries(path)[0]] if path.is_dir() else []  # classes are not compared
    return load_samples(path, replace(declared, inputs=inputs), given, labels=names or None, limit=_MOST).feeds


def _signature(model: ModelProto) -> Signature:
    try:
        return signature_of_file(model)
    except ExportError as error:
        raise ModelError(str(error.message), remedy="Give a file in float32 that declares its shapes") from error


def _engines(source: Path, model: ModelProto, stack: ExitStack) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the engines that can open a file: name -> run, ONNX Runtime's default kernels first; name -> why not."""
    runs: dict[str, Run] = {}
    unavailable: dict[str, str] = {}
    for name, precise in _KERNELS.items():
        try:
            runs[name] = _onnx_runtime(source, precise=precise)
        except RuntimeUnavailable as error:  # the other kernels fail for the same reason
            unavailable[next(iter(_KERNELS))] = error.message
            break
    if installed("openvino"):
        try:
            runs[_OPENVINO] = _openvino(stack.enter_context(OpenVinoRunner(source, _signature(model))))
        except BnexportError as error:
            unavailable[_OPENVINO] = error.message
    return runs, unavailable


def _onnx_runtime(source: Path, *, precise: bool) -> Run:
    try:
        session = open_session(load_engine(), read_validated(source), "cpu", RunSettings(precise=precise))
    except BnexportError:
        raise
    except Exception as error:  # onnxruntime's classes derive from Exception alone
        raise RuntimeUnavailable(
            f"ONNX Runtime can't load the file: {one_line(error, 120)}", remedy="Check the file with onnx.checker"
        ) from error
    names = [item.name for item in session.get_outputs()]

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))
        except Exception as error:  # as above
            raise DataError(
                f"onnxruntime can't run {source} on these samples: {one_line(error, 160)}",
                remedy="Give samples of the shape that the file declares",
            ) from error

    return run


def _openvino(runner: OpenVinoRunner) -> Run:
    def run(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        try:
            return runner.run(feeds)
        except BnexportError as error:  # a second opinion: the audit goes without it
            raise RuntimeUnavailable(error.message, remedy=error.remedy) from error

    return run


def audit_int8(
    model: ModelProto,
    kernels: Mapping[str, Run],
    feeds: Mapping[str, Array] | None = None,
    *,
    described: str = "",
    reference: ModelProto | None = None,
    unavailable: Mapping[str, str] | None = None,
) -> Int8Audit:
    """Audit an int8 model.

    Args:
        model: The model as its tool wrote it; not changed.
        kernels: Name of a setting of an engine -> the model run with it; the first is the engine's default.
        feeds: Samples by name of input; None: synthetic ones in the range of the input.
        described: Description of the samples.
        reference: The float32 model from which the int8 model was made.
        unavailable: Name of a setting that can't run the model here -> why.

    Raises:
        ModelError: The model has no int8 layer, can neither be emulated nor run, or the reference has other outputs.
        DataError: The engine or the reference can't run the samples.
    """
    plain = as_qdq(model)
    layers, dynamic = int8_layers(plain), dynamic_risks(plain)
    risks = [LayerRisk(node_name(layer.node), len(layer.codes), int(layer.unsafe.sum())) for layer in layers] + dynamic
    unread = _unread(plain, layers)
    if not risks and not unread and not _unsigned(plain):
        raise ModelError("the file has no int8 convolution or matrix product", remedy="Give an int8 ONNX file")
    size = max(1, int(np.clip(_BUDGET / multiplications(plain), _FEWEST, _MOST)))
    real = feeds is not None
    feeds = _front(feeds, size) if feeds is not None else _synthetic(plain, min(size, _SYNTHETIC))
    kind = f"samples of {described or 'the caller'}" if real else "synthetic samples"
    samples = f"{len(next(iter(feeds.values())))} {kind}"
    checks = [_risk_check(risks, layers, plain, unread), AuditCheck("note", "this machine", int8_instructions())]
    if rounded := [node_name(node) for node in rounded_float_layers(plain)]:
        checks.append(AuditCheck("note", "float layers", f"{_ROUNDED}: {_listed(rounded)}"))
    # The emulation does not cover saturation in layers whose scales are computed at run time.
    computed = any(node.op_type in (*DYNAMIC, "DynamicQuantizeLinear") for node in plain.graph.node)
    saturates = any(layer.saturates for layer in layers) and not computed
    found, problem = _emulated(plain, feeds, (EXACT, *[SATURATING] * saturates, LAST_BIT))
    if problem:
        text = f"the file can't be emulated, so the effect is measured on this machine only ({problem})"
        checks.append(AuditCheck("note", "emulation", text))
    measured, missing = _measured(kernels, feeds, plain)
    found |= measured
    missing |= unavailable or {}
    checks += [AuditCheck("note", name, reason) for name, reason in missing.items()]
    if not found:
        reason = "; ".join(missing.values())
        raise ModelError(f"the file can neither be emulated nor run: {reason}", remedy="Check it with onnx.checker")
    bounds, differences, more = _judged(found, tuple(measured), predicted=EXACT in found and not computed)
    checks += [*more, *_edges(plain)]
    means: dict[str, Array] = {}
    if real and EXACT in found:
        clipped, means = _inside(plain, layers, feeds)
        checks.append(clipped)
    if reference is not None:
        checks += _against(reference, feeds, found, differences)
    return Int8Audit(tuple(checks), tuple(risks), differences, bounds[0], samples, means, unread, bounds[1])


def _measured(
    kernels: Mapping[str, Run], feeds: Mapping[str, Array], model: ModelProto
) -> tuple[dict[str, Outputs], dict[str, str]]:
    """Return the outputs of each setting of an engine, and setting -> why it can't run the samples."""
    found: dict[str, Outputs] = {}
    missing: dict[str, str] = {}
    for name, run in kernels.items():
        try:
            found[name] = _in_batches(run, feeds, model)
        except RuntimeUnavailable as error:
            missing[name] = error.message
    return found, missing


def _emulated(model: ModelProto, feeds: Mapping[str, Array], ways: Sequence[str]) -> tuple[dict[str, Outputs], str]:
    """Return the outputs of each way of computing the model; none, and the reason, where it can't be emulated."""
    try:
        return {way: _in_batches(IntegerEmulator(model, way).evaluate, feeds, model) for way in ways}, ""
    except BnexportError as error:
        return {}, one_line(error, 90)


def _stored(model: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _inputs(model: ModelProto) -> list[ValueInfoProto]:
    """Return the inputs that are not stored in the file."""
    return [value for value in model.graph.input if value.name not in _stored(model)]


def _decoders(model: ModelProto) -> dict[str, NodeProto]:
    """Return value -> the DequantizeLinear that makes it."""
    return {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}


def _unsigned(model: ModelProto) -> int:
    """Return the number of layers with stored uint8 weights."""
    linear = [node for node in model.graph.node if node.op_type in LINEAR + DYNAMIC]
    return sum(_weight_type(node, model) == TensorProto.UINT8 for node in linear)


def _unread(model: ModelProto, layers: Sequence[Int8Layer]) -> int:
    """Return the number of layers that multiply codes by int8 codes which are not stored plainly in the file."""
    stored, decoders = _stored(model), _decoders(model)
    read, count = {layer.output for layer in layers}, 0
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.output[0] in read or node.input[0] not in decoders:
            continue
        weight = decoders.get(node.input[1])
        zero = weight.input[2] if weight is not None and len(weight.input) > 2 else ""
        typed = stored.get(zero or weight.input[0]) if weight is not None else None
        unsigned = typed is not None and typed.data_type == TensorProto.UINT8
        count += node.input[1] not in stored and not unsigned
    return count


def _weight_type(node: NodeProto, model: ModelProto) -> int | None:
    """Return TensorProto's type of a layer's stored weight codes; None for a weight in float."""
    stored, decoders = _stored(model), _decoders(model)
    name = node.input[1] if len(node.input) > 1 else ""
    name = decoders[name].input[0] if name in decoders else name
    kind = stored[name].data_type if name in stored else None
    return kind if kind in (TensorProto.INT8, TensorProto.UINT8) else None


def _risk_check(risks: Sequence[LayerRisk], layers: Sequence[Int8Layer], model: ModelProto, unread: int) -> AuditCheck:
    unsafe = [risk for risk in risks if risk.saturating]
    depthwise, unsigned = sum(layer.depthwise for layer in layers), _unsigned(model)
    dynamic = "scales that are computed at run time: the effect is measured on this machine only"
    notes = [
        note
        for holds, note in (
            (depthwise, f"{depthwise} depthwise layers are exempt"),
            (unsigned, f"{unsigned} layers have uint8 weights, which are exempt"),
            (unread, f"the weights of {unread} layers could not be read"),
            (len(risks) > len(layers), dynamic),
        )
        if holds
    ]
    if not unsafe:
        text = "; ".join([f"no channel of {len(risks)} int8 layers can saturate, on any instruction set", *notes])
        return AuditCheck("note" if unread else "right", "16-bit saturation", text)
    listed = _listed([f"{risk.name} ({risk.saturating} of {risk.channels})" for risk in unsafe])
    total, count = sum(risk.saturating for risk in unsafe), sum(risk.channels for risk in risks)
    where = f"in {len(unsafe)} of {len(risks)} int8 layers"
    text = f"{total} of {count} channels can saturate, {where}, {_SATURATE}: {listed}"
    return AuditCheck("note", "16-bit saturation", "; ".join([text, *notes]))


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:_SHOWN], *["..."] * (len(names) > _SHOWN)])


def _front(feeds: Mapping[str, Array], size: int) -> dict[str, Array]:
    n = len(next(iter(feeds.values())))
    chosen = np.linspace(0, n - 1, min(size, n)).round().astype(int)
    return {name: array[chosen] for name, array in feeds.items()}


def _synthetic(model: ModelProto, n: int) -> dict[str, Array]:
    """Return samples of different brightness with noise, over the range that the input's codes represent."""
    stored, rng, feeds = _stored(model), np.random.default_rng(0), {}
    for value in _inputs(model):
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        if not all(dim > 0 for dim in dims) or kind.kind not in "fiu":
            raise DataError(f"the input {value.name!r} has an open size", remedy="Give inputs with --samples FILE.npy")
        low, high = (0.0, 255.0) if kind.kind in "iu" else (-1.0, 1.0)
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] == value.name and (limits := _limits(node, stored)):
                low, high = limits
        bright = rng.random((n, *(1,) * len(dims)))
        values = low + (high - low) * (bright + rng.random((n, *dims))) / 2
        feeds[value.name] = values.astype(kind)
    return feeds


def _limits(node: NodeProto, stored: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the smallest and largest value that a QuantizeLinear with one stored scale represents."""
    if node.input[1] not in stored or len(node.input) < 3 or node.input[2] not in stored:
        return None
    scale, zero = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
    if scale.size != 1 or zero.dtype not in (np.int8, np.uint8):
        return None
    codes, shift = np.iinfo(zero.dtype), int(zero.reshape(-1)[0])
    return (codes.min - shift) * float(scale.reshape(-1)[0]), (codes.max - shift) * float(scale.reshape(-1)[0])


def _batches(feeds: Mapping[str, Array], model: ModelProto) -> Iterator[dict[str, Array]]:
    """Yield samples in batches of the size that the file declares, or of _CHUNK."""
    dims = _inputs(model)[0].type.tensor_type.shape.dim
    n, fixed = len(next(iter(feeds.values()))), dims[0].dim_value if dims else 0
    if fixed and n % fixed:
        remedy = f"Give a multiple of {fixed} samples"
        raise DataError(f"the file takes batches of {fixed}, but there are {n} samples", remedy=remedy)
    for at in range(0, n, fixed or _CHUNK):
        yield {name: array[at : at + (fixed or _CHUNK)] for name, array in feeds.items()}


def _in_batches(run: Run, feeds: Mapping[str, Array], model: ModelProto) -> dict[str, Array]:
    """Run samples in batches, and return the outputs of all."""
    parts = [run(part) for part in _batches(feeds, model)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def compared(candidate: Outputs, expected: Outputs) -> Difference:
    """Return the distance of the worst output, and the samples with a changed label in an output with one score per class."""
    worst, changed, signal, noise, n = (0.0, 0.0), list[Array](), 0.0, 0.0, 0
    for one, other in zip(candidate.values(), expected.values(), strict=True):
        wide, off = other.astype(np.float64), one.astype(np.float64) - other
        off = np.where(np.isfinite(off), off, np.inf)
        scale, n = float(np.abs(wide).max()) or 1.0, len(other)
        worst = max(worst, (float(np.sqrt((off**2).mean())) / scale, float(np.abs(off).max()) / scale))
        signal, noise = signal + float((wide**2).sum()), noise + float((off**2).sum())
        if other.ndim == 2 and other.shape[1] > 1:
            changed.append(one.argmax(axis=1) != other.argmax(axis=1))
    labels = int(np.any(changed, axis=0).sum()) if changed else None
    snr = 10 * float(np.log10(signal / noise)) if signal and noise else None
    return Difference(worst[0], worst[1], labels, n, snr)


def _judged(
    found: Mapping[str, Outputs], kernels: Sequence[str], *, predicted: bool
) -> tuple[tuple[float | None, float | None], dict[str, Difference], list[AuditCheck]]:
    """Judge saturation by the labels, and kernels by their distance from the emulation, or else from the second kernels.

    Return the bounds of the kernels' rms and largest error, the differences, and the checks. Unless the disagreement of right
    kernels was emulated (``predicted``), the rms has a fixed bound, and the largest error has none.
    """
    differences: dict[str, Difference] = {}
    checks: list[AuditCheck] = []
    base = EXACT if EXACT in found else kernels[1] if len(kernels) > 1 else ""
    if not base:
        return (None, None), differences, checks
    bound, rms_bound = float("inf"), _UNPREDICTED
    if predicted:
        usual = compared(found[LAST_BIT], found[EXACT])
        bound, rms_bound = max(_FLOOR, _FACTOR * usual.error), max(_FLOOR, _FACTOR * usual.rms)
    if SATURATING in found:
        effect = differences[SATURATING] = compared(found[SATURATING], found[EXACT])
        checks.append(AuditCheck("wrong" if effect.labels else "right", "saturation (emulated)", str(effect)))
    for place, name in enumerate(kernels):
        if name == base:
            continue
        off = differences[name] = compared(found[name], found[base])
        right = off.error <= bound and off.rms <= rms_bound
        verdict = "right" if right else "note" if place or name == _OPENVINO else "wrong"
        against = "the file states" if base == EXACT else f"the {base} compute"
        checks.append(AuditCheck(verdict, name, f"off from what {against}: {off}"))
    return (rms_bound, bound if predicted else None), differences, checks


def _edges(model: ModelProto) -> Iterator[AuditCheck]:
    """Yield how the first and the last linear layer are stored."""
    linear = [node for node in model.graph.node if node.op_type in LINEAR + DYNAMIC]
    if not linear:
        return
    readers = {name: node for node in model.graph.node for name in node.input}
    kinds = ["float" if _weight_type(node, model) is None else "int8" for node in (linear[0], linear[-1])]
    yield AuditCheck("note", "first layer", f"{node_name(linear[0])}: {kinds[0]}")
    after = readers.get(linear[-1].output[0])
    coded = after is not None and after.op_type == "QuantizeLinear"
    rounded = "; its output is rounded to 8 bits, which costs accuracy" if coded else "; its output stays in float"
    yield AuditCheck("note", "last layer", f"{node_name(linear[-1])}: {kinds[1]}{rounded}")


def _inside(
    model: ModelProto, layers: Sequence[Int8Layer], feeds: Mapping[str, Array]
) -> tuple[AuditCheck, dict[str, Array]]:
    """Return the ranges that clip on the samples, and the means of each layer's input channels."""
    stored = _stored(model)
    encoders = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    coded = [(node, limits) for node in encoders if (limits := _limits(node, stored))]
    outside: dict[str, float] = {}
    sums: dict[str, Array] = {}
    evaluator = IntegerEmulator(model)
    n = len(next(iter(feeds.values())))
    for part in _batches(feeds, model):
        values = {**part, **evaluator.intermediate(part)}
        for node, (low, high) in coded:
            array, half = values[node.input[0]], (high - low) / 510
            # A code of 0 at the low end is also how files state a ReLU.
            off = (array > high + half) | ((array < low - half) if low < 0 else False)
            outside[node.input[0]] = outside.get(node.input[0], 0.0) + float(off.mean()) * len(array) / n
        for layer in layers:
            array = values[layer.node.input[0]]
            axis = 1 if layer.node.op_type == "Conv" else array.ndim - 1
            means = array.mean(axis=tuple(place for place in range(array.ndim) if place != axis))
            sums[layer.output] = sums.get(layer.output, 0.0) + means * len(array) / n
    clipped = sorted(((share, name) for name, share in outside.items() if share > _CLIPPED), reverse=True)
    listed = ": " * bool(clipped) + _listed([f"{name} ({share:.2g})" for share, name in clipped])
    text = f"{len(clipped)} of {len(coded)} ranges cut more than {_CLIPPED:.0%} of the values{listed}"
    return AuditCheck("note" if clipped else "right", "ranges on the samples", text), sums


def _against(
    reference: ModelProto, feeds: Mapping[str, Array], found: Mapping[str, Outputs], differences: dict[str, Difference]
) -> Iterator[AuditCheck]:
    """Yield the distance of every way of computing the file from the float32 file in float64."""
    names = [value.name for value in _inputs(reference)]
    remedy = "Give the float32 file from which the int8 file was made"
    if len(names) != len(feeds):
        raise ModelError(f"the reference takes {len(names)} inputs, the int8 file {len(feeds)}", remedy=remedy)
    given = dict(zip(names, feeds.values(), strict=True))
    try:
        exact = _in_batches(Float64Evaluator(reference).evaluate, given, reference)
    except BnexportError as error:
        raise DataError(f"the reference can't be evaluated: {one_line(error, 120)}", remedy=remedy) from error
    for name, outputs in found.items():
        if name == LAST_BIT:
            continue
        shapes = [[array.shape for array in values.values()] for values in (outputs, exact)]
        if shapes[0] != shapes[1]:
            raise ModelError("the reference has outputs of other shapes than the int8 file", remedy=remedy)
        off = differences[f"reference: {name}"] = compared(outputs, exact)
        label = {EXACT: "as the file states", SATURATING: "saturation (emulated)"}.get(name, name)
        snr = "exact" if off.snr is None else f"{off.snr:.1f} dB"
        changed = "" if off.labels is None else f"; {off.labels} of {off.n} labels changed"
        yield AuditCheck("note", f"reference, {label}", snr + changed)
