"""The faults that a verification has to catch: where each is put, and the stage that exists to catch it.

Faults of files and of the manifest are here: flipped bits, NaN, other names, types and preprocessing. Faults of BatchNorm
parameters are in ``norm_faults``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.bundle import (
    GOLDEN,
    MANIFEST,
    MODEL_EXPORTED,
    MODEL_FLOAT32,
    MODEL_ONNX,
    MODEL_TORCHSCRIPT,
    WEIGHTS,
    Bundle,
)
from bnexport.onnx_files.models import attributes, trained_tensors
from bnexport.quantization.file_proof import Int8File
from bnexport.runtimes.catalogue import RunnerSpec
from bnexport.runtimes.reference_runner import EmulatedRunner
from bnexport.tensors import Array
from bnexport.verification.int8 import record_of
from bnexport.verification.self_test.copies import (
    Copy,
    Evaluate,
    NotTried,
    evaluate_onnx,
    evaluate_tf32,
    evaluate_torch,
    evaluate_weights,
)
from bnexport.verification.self_test.norm_faults import NORM_FAULTS, spoil_norm

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

    from bnexport.runtimes.base import Runner, RunSettings


#: Type -> the highest bit of its mantissa, which changes a number by up to a half.
_HIGH_BIT = {"float16": 9, "bfloat16": 6, "float32": 22, "float64": 51}
#: Numbers shorter than this are found by chance.
_FEWEST_BYTES = 16


def flip_anywhere(copy: Copy, name: str) -> str:
    """Flip one bit in the middle of a file; the old seal stays."""
    path = copy.folder / MANIFEST if name == MANIFEST else copy.file(name)
    content = bytearray(path.read_bytes())
    if not content:
        raise NotTried(f"{name} is empty")
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return name


def flip_weight(copy: Copy, name: str, bit: str) -> str:
    """Flip the "lowest" or a "high" bit (of the mantissa) of the largest number of the last weight, and seal the copy again.

    The file is model.onnx, model.pt or model.pt2. The effect of a number in the middle of a network may end in a dead channel;
    the last layer's reaches the outputs.
    """
    from onnx import numpy_helper

    copy.file(name)
    arrays = [numpy_helper.to_array(tensor) for tensor in trained_tensors(copy.model(copy.folded_file))]
    file = copy.folded_file if name == MODEL_ONNX else name
    return _flip_one_of(copy, file, arrays, high=bit == "high")


def flip_unfolded_weight(copy: Copy) -> str:
    """Flip a high bit of a number in weights.safetensors, and seal the copy again."""
    import safetensors.torch
    import torch

    if not copy.subject.rebuilt:
        raise NotTried(f"no check reads {WEIGHTS}: the original network is not rebuilt from it")
    state = safetensors.torch.load_file(copy.file(WEIGHTS))
    order = copy.subject.network.state_dict() if copy.subject.network else state  # the file is sorted by name
    kept = [state[name] for name in order if name in state and state[name].dtype in (torch.float32, torch.float64)]
    return _flip_one_of(copy, WEIGHTS, [tensor.numpy() for tensor in kept], high=True)


def flip_golden(copy: Copy, name: str) -> str:
    """Flip a high bit of the largest golden input or output (of an integer, the lowest), and seal the copy again."""
    inputs, outputs = copy.subject.golden
    array = next(iter((inputs if "input" in name else outputs).values()))
    return _flip_one_of(copy, name, [array], high=array.dtype.kind == "f")


def _flip_one_of(copy: Copy, name: str, arrays: list[Array], *, high: bool) -> str:
    """Flip a bit of the largest number of an array that is stored contiguously in the file.

    The weights are tried from the last layer to the first, and then the other arrays.
    """
    path = copy.file(name)
    content, backwards = path.read_bytes(), arrays[::-1]
    for array in sorted(backwards, key=lambda array: array.ndim < 2):
        for raw in dict.fromkeys((array.tobytes(), np.ascontiguousarray(array.T).tobytes())):
            if len(raw) >= _FEWEST_BYTES and (at := content.find(raw)) >= 0:
                number = np.frombuffer(raw, array.dtype)
                place = at + int(np.abs(number.astype(np.float64)).argmax()) * array.itemsize
                bit = _HIGH_BIT.get(array.dtype.name, 0) if high else 0
                changed = bytearray(content)
                changed[place + bit // 8] ^= 1 << (bit % 8)  # every format is little-endian
                path.write_bytes(changed)  # torch does not compare the check sums of its archives
                copy.seal()
                return name
    raise NotTried(f"{name} does not store its numbers one after the other")


def put_nan(copy: Copy) -> str:
    """Put NaN in place of the largest number of the first weight of model.onnx."""
    from onnx import numpy_helper

    model = copy.model(copy.folded_file)
    tensors = trained_tensors(model)
    if not tensors:
        raise NotTried(f"{MODEL_ONNX} has no weights")
    array = numpy_helper.to_array(tensors[0]).copy()
    array.reshape(-1)[int(np.abs(array.astype(np.float64)).argmax())] = np.nan
    tensors[0].CopyFrom(numpy_helper.from_array(array, tensors[0].name))
    copy.write_model(model, copy.folded_file)
    return f"{tensors[0].name} in {MODEL_ONNX}"


def rename_output(copy: Copy) -> str:
    """Give the first output of model.onnx another name."""
    model = copy.model()
    name = model.graph.output[0].name
    _append(model, "Identity", f"{name}_other")
    copy.write_model(model)
    return MODEL_ONNX


def retype_output(copy: Copy) -> str:
    """Give the first output of model.onnx another element type."""
    from onnx import TensorProto, helper

    model = copy.model()
    output = model.graph.output[0]
    number = TensorProto.FLOAT if output.type.tensor_type.elem_type == TensorProto.DOUBLE else TensorProto.DOUBLE
    _append(model, "Cast", output.name, to=number)
    output.type.tensor_type.elem_type = number
    copy.write_model(model)
    return f"{helper.tensor_dtype_to_np_dtype(number).name} in {MODEL_ONNX}"


def _append(model: ModelProto, operator: str, name: str, **attributes: Any) -> None:
    """Append an operator to the first output, which is then called ``name``."""
    from onnx import helper

    graph = model.graph
    old, inner = graph.output[0].name, f"{graph.output[0].name}_inner"
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [inner if item == old else item for item in names]
    graph.node.append(helper.make_node(operator, [inner], [name], **attributes))
    graph.output[0].name = name


def claim_opset(copy: Copy) -> str:
    """Let the manifest claim another operator set than that of the file."""
    onnx = copy.subject.bundle.manifest.onnx
    copy.seal(onnx={**onnx, "opset": int(onnx.get("opset", 0)) + 1})
    return MANIFEST


def permute_labels(copy: Copy) -> str:
    """Move every label of the manifest by one class."""
    labels = copy.subject.bundle.manifest.labels
    if not labels or len(set(labels)) < 2:
        raise NotTried("the bundle has no two different labels")
    copy.seal(labels=(*labels[1:], labels[0]))
    return MANIFEST


def _other_scale(before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scale for pixels from 0 to 255 where the network expects 0 to 1, or the reverse."""
    return {"scale": 1 / 255 if before["scale"] == 1.0 else 1.0}


def _other_mean(before: Mapping[str, Any]) -> dict[str, Any]:
    """Return another mean and deviation: those of a tutorial, 0.5 and 0.5, or none."""
    count = int(before["channels"])
    other = {"mean": [0.5] * count, "std": [0.5] * count}
    same = all(list(before[key]) == value for key, value in other.items())
    return {"mean": [0.0] * count, "std": [1.0] * count} if same else other


def spoil_preprocessing(copy: Copy, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> str:
    """Write another preprocessing everywhere, and the accuracy that the right one had on these few samples.

    NotTried where a verification could not find the error.
    """
    manifest, accuracy = copy.subject.bundle.manifest, copy.subject.accuracy
    if manifest.preprocessing is None:
        raise NotTried("the bundle has no preprocessing")
    if not accuracy:
        raise NotTried("there are no labelled images here, without which the fault can't be detected")
    recorded = manifest.verification.get("accuracy")
    if not isinstance(recorded, dict) or recorded.get("dataset") != accuracy["dataset"]:
        raise NotTried("the bundle records no accuracy on these samples")
    preprocessing = {**manifest.preprocessing, **change(manifest.preprocessing)}
    verification = {**manifest.verification, "accuracy": dict(accuracy)}
    model, facts = copy.model(), replace(manifest, preprocessing=preprocessing).model_facts()
    for item in model.metadata_props:
        item.value = facts.get(item.key, item.value)
    copy.write_model(model)
    copy.seal(preprocessing=preprocessing, verification=verification)
    return MANIFEST


def spoil_int8(copy: Copy, change: Callable[[Int8File], str]) -> str:
    """Change numbers of an int8 model.onnx, and seal the copy again."""
    record = record_of(copy.subject.bundle.manifest)
    if not record:
        raise NotTried(f"{MODEL_ONNX} is not an int8 file")
    file = Int8File(copy.model(MODEL_FLOAT32), copy.model(), record)
    where = change(file)
    copy.write_model(file.int8_model)
    return f"{where} in {MODEL_ONNX}"


def _store(file: Int8File, name: str, array: Array) -> None:
    from onnx import numpy_helper

    file.stored[name].CopyFrom(numpy_helper.from_array(np.asarray(array), name))


def _scale_channel(file: Int8File) -> str:
    layer, _, weight, _ = next(file.layers())
    scales = file.array(weight.input[1]).copy()
    scales[len(scales) // 2] *= np.float32(1.01)
    _store(file, weight.input[1], scales)
    return layer.name


def _move_zero(file: Int8File) -> str:
    _, given, _, _ = next(file.layers())
    zero = file.array(given.input[2])
    _store(file, given.input[2], (zero.astype(np.int64) + (1 if zero < 100 else -1)).astype(zero.dtype))
    return str(given.input[0])


def _swap_scales(file: Int8File) -> str:
    names = list(dict.fromkeys(node.input[1] for node in file.encoders.values()))
    other = next((name for name in names if file.array(name) != file.array(names[0])), None)
    if other is None:
        raise NotTried("all tensors have one scale")
    one, two = file.array(names[0]), file.array(other)
    _store(file, names[0], two)
    _store(file, other, one)
    return f"{names[0]} and {other}"


def _shrink_range(file: Int8File) -> str:
    name = next(node.input[1] for node in file.encoders.values())
    _store(file, name, (file.array(name) * np.float32(3 / 4)).astype(np.float32))
    return str(name)


def _drop_correction(file: Int8File) -> str:
    from bnexport.quantization.codes import encode_bias

    for layer, _, _, bias in file.layers():
        if bias is None:  # of a MatMul, whose bias is in float
            continue
        plain = encode_bias(layer.bias, file.array(bias.input[1]))
        if (plain != file.array(bias.input[0])).any():
            _store(file, bias.input[0], plain)
            return layer.name
    raise NotTried("no bias is changed by its correction")


def _use_full_range(file: Int8File) -> str:
    from bnexport.quantization.codes import encode, encode_bias, saturating_channels

    for layer, given, weight, bias in file.layers():
        exact = layer.outputs_first.astype(np.float64)
        found = encode(exact, pair_safe=False)
        if bias is None or layer.depthwise or not saturating_channels(found.codes).any():
            continue
        steps = found.scales * file.array(given.input[1]).reshape(())
        corrected = layer.corrected_bias(found.values, file.ranges[layer.input].mean)
        for name, array in (
            (weight.input[0], layer.stored(found.codes)), (weight.input[1], found.scales),
            (bias.input[0], encode_bias(corrected, steps)), (bias.input[1], steps),
        ):  # fmt: skip
            _store(file, name, array)
        return layer.name
    raise NotTried("no channel saturates at full range")


def _transpose_codes(file: Int8File) -> str:
    for layer, _, weight, _ in file.layers():
        codes = file.array(weight.input[0])
        swapped = np.ascontiguousarray(codes.swapaxes(-1, -2)).reshape(codes.shape)
        if (swapped != codes).any():
            _store(file, weight.input[0], swapped)
            return layer.name
    raise NotTried("all codes are symmetric")


#: Fault of an int8 file -> the change that makes it.
INT8_FAULTS: dict[str, Callable[[Int8File], str]] = {
    "scale of one channel x 1.01": _scale_channel,
    "zero point off by one": _move_zero,
    "two scales swapped": _swap_scales,
    "bias not corrected": _drop_correction,
    "weights at full range": _use_full_range,
    "range clipped at 3 sigma": _shrink_range,
    "codes transposed": _transpose_codes,
}


class PixelFile:
    """The float32 ONNX file of a bundle that takes pixels: the operators before the network, and its stored numbers."""

    def __init__(self, model: ModelProto, scale: float) -> None:
        self.scale = scale
        self.nodes = list(model.graph.node)
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._model = model
        value, self.first = model.graph.input[0].name, {}
        for operator in ("Cast", "Sub", "Mul"):
            readers = [node for node in self.nodes if value in node.input]
            if len(readers) == 1 and readers[0].op_type == operator:
                self.first[operator] = readers[0]
                value = readers[0].output[0]
        self.readers = [node for node in self.nodes if value in node.input]

    def array(self, name: str) -> Array:
        """Return a stored tensor in float64."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self._stored[name]).astype(np.float64)

    def mean(self) -> tuple[str, Array]:
        """Return name and value of the subtracted mean; NotTried where none is."""
        if "Sub" not in self.first:
            raise NotTried("the mean of the pixels is 0, so none is subtracted")
        name = self.first["Sub"].input[1]
        return name, self.array(name)

    def store(self, name: str, array: Array) -> None:
        """Replace a stored tensor, or add one."""
        from onnx import TensorProto, numpy_helper

        kind = self._stored[name].data_type if name in self._stored else TensorProto.FLOAT
        narrow = array.astype(np.float16 if kind == TensorProto.FLOAT16 else np.float32)
        if name not in self._stored:
            self._stored[name] = self._model.graph.initializer.add()
        self._stored[name].CopyFrom(numpy_helper.from_array(narrow, name))


def _drop_scale(file: PixelFile) -> str:
    layers = [node for node in file.nodes if node.op_type in ("Conv", "Gemm", "MatMul")]
    name = file.first["Mul"].input[1] if "Mul" in file.first else next((node.input[1] for node in layers), None)
    if name is None:
        raise NotTried("the network has no layer that could contain the scale")
    file.store(name, file.array(name) / file.scale)
    return str(name)


def _reverse_means(file: PixelFile) -> str:
    name, mean = file.mean()
    if (mean[::-1] == mean).all():
        raise NotTried("all channels have one mean")
    file.store(name, mean[::-1])
    return name


def _fold_mean(file: PixelFile) -> str:
    """Move the mean into the bias of the first convolution, which is right only where it pads nothing."""
    from bnexport.quantization.codes import grouped

    name, mean = file.mean()
    layer = file.readers[0]
    settings = attributes(layer)
    if layer.op_type != "Conv" or not (
        any(settings.get("pads", ())) or settings.get("auto_pad", b"").startswith(b"SAME")
    ):
        raise NotTried("the first layer is not a convolution with padding")
    weight = file.array(layer.input[1])
    taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2)
    groups = int(settings.get("group", 1))
    moved = (taps * grouped(mean.reshape(-1), len(taps), taps.shape[1], groups)).sum(axis=1)
    old = file.array(layer.input[2]) if len(layer.input) > 2 else 0.0
    if len(layer.input) < 3:
        layer.input.append(f"{name}_bias")
    file.store(layer.input[2], old - moved)
    file.store(name, 0 * mean)
    return layer.name or str(layer.output[0])


def spoil_pixels(copy: Copy, change: Callable[[PixelFile], str]) -> str:
    """Change the part of an ONNX file that converts pixels, and seal the copy again."""
    manifest = copy.subject.bundle.manifest
    if not manifest.takes_pixels or manifest.preprocessing is None:
        raise NotTried("the files take no pixels, so they contain no preprocessing")
    model = copy.model(copy.folded_file)
    where = change(PixelFile(model, float(manifest.preprocessing["scale"])))
    copy.write_model(model, copy.folded_file)
    return f"{where} in {copy.folded_file}"


#: Fault of the preprocessing inside a file -> the change that makes it.
PIXEL_FAULTS: dict[str, Callable[[PixelFile], str]] = {
    "scale of the pixels dropped": _drop_scale,
    "means of the channels in another order": _reverse_means,
    "mean folded into the bias of a padded convolution": _fold_mean,
}


@dataclass(frozen=True)
class Fault:
    """One row of FAULTS."""

    name: str  # The change: "eps dropped"
    where: str  # The file or runtime that is changed
    expected: str  # The stage that exists to catch it
    #: Changes a copy and returns the exact place. All but the flipped bits of the stage "integrity" seal the copy
    #: again, so that no hash shows the fault
    put: Callable[[Copy], str]
    #: Evaluates the changed part, for the size of the effect; None if it can't be measured
    evaluate: Evaluate | None = None
    runner: RunnerSpec | None = None  # A faulty runtime that replaces a good one
    many: bool = False  # The fault shows only in the number of right labels, which takes more samples


def faults_of(bundle: Bundle) -> tuple[Fault, ...]:
    """Return FAULTS, and one flipped bit in each file of a bundle."""
    names = (*bundle.manifest.files, MANIFEST)
    bits = (Fault("one flipped bit", name, "integrity", partial(flip_anywhere, name=name)) for name in names)
    return (*FAULTS, *bits)


def _only_float32(copy: Copy) -> str:
    """Change no file: the fault is in the engine."""
    if (stored := copy.subject.bundle.manifest.precision) != "float32":
        raise NotTried(f"the weights are stored in {stored}, so no engine computes in float32")
    return ""


def _open_tf32(bundle: Bundle, _device: str, _module: nn.Module | None, _settings: RunSettings) -> Runner:
    """Open a runner that computes in TF32 for every setting."""
    return EmulatedRunner(bundle, "tf32")


_TF32 = RunnerSpec("emulated", "cpu", MODEL_ONNX, _open_tf32, lambda _device: None, default=False)
#: Model file -> what evaluates it in float64.
_MODELS: dict[str, Evaluate] = {
    MODEL_ONNX: evaluate_onnx,
    MODEL_TORCHSCRIPT: partial(evaluate_torch, name=MODEL_TORCHSCRIPT),
    MODEL_EXPORTED: partial(evaluate_torch, name=MODEL_EXPORTED),
}

FAULTS: tuple[Fault, ...] = (
    *(Fault(row.name, MODEL_ONNX, "file-proof", partial(spoil_norm, fault=row), evaluate_onnx) for row in NORM_FAULTS),
    Fault("NaN in a weight", MODEL_ONNX, "file-proof", put_nan, evaluate_onnx),
    *(
        Fault(f"{bit} bit of a weight, sealed again", name, stage, partial(flip_weight, name=name, bit=bit), evaluate)
        for bit, stage in (("high", "file-proof"), ("lowest", "weights"))
        for name, evaluate in _MODELS.items()
    ),
    Fault("high bit, sealed again", WEIGHTS, "golden-reference", flip_unfolded_weight, evaluate_weights),
    *(
        Fault("high bit, sealed again", name, "golden", partial(flip_golden, name=name), evaluate_onnx)
        for name in (f"{GOLDEN}/input_0.pb", f"{GOLDEN}/output_0.pb")
    ),
    Fault("TF32 left on in strict mode", "emulated runtime", "precision", _only_float32, evaluate_tf32, _TF32),
    Fault(
        "pixels 0 to 255 for 0 to 1", MANIFEST, "accuracy", partial(spoil_preprocessing, change=_other_scale), many=True
    ),
    Fault(
        "other mean and deviation", MANIFEST, "accuracy", partial(spoil_preprocessing, change=_other_mean), many=True
    ),
    Fault("another output name", MODEL_ONNX, "declaration", rename_output),
    Fault("another output type", MODEL_ONNX, "declaration", retype_output),
    Fault("another opset claimed", MANIFEST, "declaration", claim_opset),
    Fault("labels permuted", MANIFEST, "declaration", permute_labels),
    *(
        Fault(name, MODEL_ONNX, "quantization", partial(spoil_int8, change=change))
        for name, change in INT8_FAULTS.items()
    ),
    *(
        Fault(name, MODEL_ONNX, "file-proof", partial(spoil_pixels, change=change), evaluate_onnx)
        for name, change in PIXEL_FAULTS.items()
    ),
)
