"""Faults of files and of what the manifest says: flipped bits, NaN, other names, types and preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bnexport.bundle import GOLDEN, MANIFEST, MODEL_ONNX, WEIGHTS
from bnexport.onnx_files.models import trained_tensors
from bnexport.tensors import Array
from bnexport.verification.fault_copy import Copy, NotTried

if TYPE_CHECKING:
    from onnx import ModelProto

#: Bytes of a number -> the highest bit of its mantissa, which changes it by up to a half; bfloat16 has its own.
_HIGH_BIT = {2: 9, 4: 22, 8: 51}
_HIGH_BIT_OF_BFLOAT16 = 6
#: Numbers shorter than this are found by chance.
_FEWEST_BYTES = 16


def flip_anywhere(name: str) -> Callable[[Copy], str]:
    """Flip one bit in the middle of a file; the seal stays the old one."""

    def put(copy: Copy) -> str:
        path = copy.folder / MANIFEST if name == MANIFEST else copy.file(name)
        content = bytearray(path.read_bytes())
        if not content:
            raise NotTried(f"{name} is empty")
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        return name

    return put


def flip_weight(name: str, *, high: bool) -> Callable[[Copy], str]:
    """Flip one bit of the largest number of the last weight in model.onnx, model.pt or model.pt2, and seal the copy again.

    What a number in the middle of a network does may end in a channel that is dead; the last layer's reaches the outputs.

    Args:
        name: The file.
        high: The highest bit of its mantissa, not the lowest.
    """

    def put(copy: Copy) -> str:
        from onnx import numpy_helper

        copy.file(name)
        arrays = [numpy_helper.to_array(tensor) for tensor in trained_tensors(copy.model())]
        return _flip_one_of(copy, name, _weights_last_first(arrays), high=high)

    return put


def flip_unfolded_weight(copy: Copy) -> str:
    """Flip a high bit of a number in weights.safetensors, and seal the copy again."""
    import safetensors.torch
    import torch

    if not copy.subject.rebuilt:
        raise NotTried(f"nothing here reads {WEIGHTS}: the original network is not rebuilt from it")
    state = safetensors.torch.load_file(copy.file(WEIGHTS))
    order = copy.subject.network.state_dict() if copy.subject.network else state  # the file is sorted by name
    kept = [state[name] for name in order if name in state and state[name].dtype in (torch.float32, torch.float64)]
    return _flip_one_of(copy, WEIGHTS, _weights_last_first([tensor.numpy() for tensor in kept]), high=True)


def flip_golden(kind: str) -> Callable[[Copy], str]:
    """Flip a high bit of the largest golden input or output (of an integer, the lowest), and seal the copy again."""

    def put(copy: Copy) -> str:
        inputs, outputs = copy.subject.golden
        array = next(iter((inputs if kind == "input" else outputs).values()))
        return _flip_one_of(copy, f"{GOLDEN}/{kind}_0.pb", [array], high=array.dtype.kind == "f")

    return put


def _weights_last_first(arrays: list[Array]) -> list[Array]:
    """Weights from the last layer to the first, and then what is no weight of a layer."""
    backwards = arrays[::-1]
    return sorted(backwards, key=lambda array: array.ndim < 2)


def _flip_one_of(copy: Copy, name: str, arrays: list[Array], *, high: bool) -> str:
    """Flip a bit of the largest number of the first array that lies in the file as it is."""
    path = copy.file(name)
    content = path.read_bytes()
    for array in arrays:
        for raw in dict.fromkeys((array.tobytes(), np.ascontiguousarray(array.T).tobytes())):
            if len(raw) >= _FEWEST_BYTES and (at := content.find(raw)) >= 0:
                number = np.frombuffer(raw, array.dtype)
                place = at + int(np.abs(number.astype(np.float64)).argmax()) * array.itemsize
                bit = _bit(array, high=high)
                changed = bytearray(content)
                changed[place + bit // 8] ^= 1 << (bit % 8)  # every format is little-endian
                path.write_bytes(changed)  # torch does not compare the check sums of its archives
                copy.seal()
                return name
    raise NotTried(f"the numbers of {name} do not lie in it one after the other")


def _bit(array: Array, *, high: bool) -> int:
    if not high:
        return 0
    return _HIGH_BIT_OF_BFLOAT16 if array.dtype.name == "bfloat16" else _HIGH_BIT[array.itemsize]


def put_nan(copy: Copy) -> str:
    """NaN in place of the largest number of the first weight of model.onnx."""
    from onnx import numpy_helper

    model = copy.model()
    tensors = trained_tensors(model)
    if not tensors:
        raise NotTried(f"{MODEL_ONNX} has no weights")
    array = numpy_helper.to_array(tensors[0]).copy()
    array.reshape(-1)[int(np.abs(array.astype(np.float64)).argmax())] = np.nan
    tensors[0].CopyFrom(numpy_helper.from_array(array, tensors[0].name))
    copy.write_model(model)
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
    """Put an operator behind the first output, which is called ``name`` from now on."""
    from onnx import helper

    graph = model.graph
    old, inner = graph.output[0].name, f"{graph.output[0].name}_inner"
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [inner if item == old else item for item in names]
    graph.node.append(helper.make_node(operator, [inner], [name], **attributes))
    graph.output[0].name = name


def claim_opset(copy: Copy) -> str:
    """Let the manifest claim another operator set than the file has."""
    onnx = copy.subject.bundle.manifest.onnx
    copy.seal(onnx={**onnx, "opset": int(onnx.get("opset", 0)) + 1})
    return MANIFEST


def permute_labels(copy: Copy) -> str:
    """Move every label of the manifest by one class."""
    labels = copy.subject.bundle.manifest.labels
    if not labels or len(set(labels)) < 2:
        raise NotTried("the bundle has no labels that could be mixed up")
    copy.seal(labels=(*labels[1:], labels[0]))
    return MANIFEST


def scale_pixels(copy: Copy) -> str:
    """Pixels from 0 to 255 where the network wants 0 to 1, or the other way round."""
    before = _preprocessing(copy)["scale"]
    return _preprocess(copy, {"scale": 1 / 255 if before == 1.0 else 1.0})


def normalise_pixels(copy: Copy) -> str:
    """Another mean and deviation: those of a tutorial, 0.5 and 0.5, or none."""
    before = _preprocessing(copy)
    count = int(before["channels"])
    other = {"mean": [0.5] * count, "std": [0.5] * count}
    if all(list(before[key]) == value for key, value in other.items()):
        other = {"mean": [0.0] * count, "std": [1.0] * count}
    return _preprocess(copy, other)


def _preprocessing(copy: Copy) -> Mapping[str, Any]:
    """What the manifest says, where a verification here could tell that it is wrong."""
    manifest, accuracy = copy.subject.bundle.manifest, copy.subject.accuracy
    if manifest.preprocessing is None:
        raise NotTried("the bundle has no preprocessing")
    if not accuracy:
        raise NotTried("there are no labelled images here, and without them nothing tells of it")
    recorded = manifest.verification.get("accuracy")
    if not isinstance(recorded, dict) or recorded.get("dataset") != accuracy["dataset"]:
        raise NotTried("the bundle records no accuracy on these samples that could be compared")
    return manifest.preprocessing


def _preprocess(copy: Copy, changes: Mapping[str, Any]) -> str:
    """Write another preprocessing everywhere, and the accuracy that these few samples had with the right one."""
    manifest = copy.subject.bundle.manifest
    preprocessing = {**(manifest.preprocessing or {}), **changes}
    verification = {**manifest.verification, "accuracy": dict(copy.subject.accuracy)}
    model, facts = copy.model(), replace(manifest, preprocessing=preprocessing).model_facts()
    for item in model.metadata_props:
        item.value = facts.get(item.key, item.value)
    copy.write_model(model)
    copy.seal(preprocessing=preprocessing, verification=verification)
    return MANIFEST
