"""Faults in BatchNorm parameters, put where a wrong fold would leave them: into the weights of model.onnx.

``fold`` folds the network again with one wrong parameter, and the weights that differ replace the right ones in the written
file. Each fault is in one BatchNorm alone. Of a few spread over the network, it is the one with the smallest effect above the
harmless one. Where the network can't be rebuilt, the first folded layer is changed as such a fault would change it if the
layer's variance were 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from bnexport.bundle import MODEL_ONNX
from bnexport.errors import BnexportError
from bnexport.nn.statistics import DEFAULT_EPS, NormView
from bnexport.tensors import Array
from bnexport.verification.self_test.copies import Copy, FaultTarget, NotTried, folded_weights

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto
    from torch import Tensor, nn


#: A common wrong eps: the default of TensorFlow and Keras. Where it is the network's own, torch's is the wrong one.
_OTHER_EPS = 1e-3
#: Unbiased over biased variance of 256 values: the batch of the chapter, at a layer of one value per channel and image.
_UNBIASED = 256 / 255
#: Weight of the old moving statistics in each update: the chapter's momentum. One update more or less is a stale set.
_MOMENTUM = 0.9
#: TensorProto's number of a float type (float32, float16, float64, bfloat16) -> four steps of it at 1.
_STEPS = {1: 2.0**-21, 10: 2.0**-8, 11: 2.0**-50, 16: 2.0**-5}
#: BatchNorms that each fault is tried in.
_TRIED = 4


#: Changes eps or the tensors of one BatchNorm in place; the result is ignored.
Change = Callable[[NormView], object]
#: Weight (out, ...) and bias (out,) or None, float64, changed in place.
Edit = Callable[[Array, Array | None], None]


@dataclass(frozen=True)
class NormFault:
    """One row of NORM_FAULTS: the change of a BatchNorm, and the edit of a folded layer where the network is unknown."""

    name: str
    change: Change
    edit: Edit | None = None


def spoil_norm(copy: Copy, fault: NormFault) -> str:
    """Put one fault into model.onnx, seal the copy again, and return the place; NotTried if the network has no such part."""
    placed = None if copy.subject.network is None else _refold(copy, fault.change)
    return _edit_layer(copy, fault.edit) if placed is None else placed


def norms_of(network: nn.Module) -> list[tuple[str, NormView]]:
    """Return path and view of every layer with moving statistics, in order."""
    return [(path, view) for path, module in network.named_modules() if (view := NormView.of(module)) is not None]


def _refold(copy: Copy, change: Change) -> str | None:
    """Fold with one wrong BatchNorm; None where the right fold's weights are not those of the file."""
    subject, model = copy.subject, copy.model(copy.folded_file)
    name, spoiled = _hardest(subject, change)
    try:
        right, wrong = subject.folded, folded_weights(spoiled, subject.example, subject.bundle.manifest)
    except BnexportError:  # a network that was exported with options that are not known here
        return None
    if wrong.keys() - right.keys() or not _replace_weights(model, right, wrong):
        return None
    copy.write_model(model, copy.folded_file)
    return f"{name} in {MODEL_ONNX}"


def _hardest(subject: FaultTarget, change: Change) -> tuple[str, nn.Module]:
    """Return the name of the BatchNorm where the fault is hardest to detect, and the network with the fault."""
    assert subject.network is not None
    tried: list[tuple[float, str, nn.Module]] = []
    reason = "the network has no BatchNorm with moving statistics"
    count = len(norms_of(subject.network))
    for index in sorted({round(at) for at in np.linspace(0, count - 1, min(count, _TRIED))}):
        try:
            name, spoiled = _spoiled(subject.network, index, change)
        except NotTried as why:
            reason = str(why)
            continue
        if math.isfinite(effect := subject.effect(spoiled)):
            tried.append((effect, name, spoiled))
        else:
            reason = "the outputs would not be finite"
    if not tried:
        raise NotTried(reason)
    tried.sort(key=itemgetter(0))
    _, name, spoiled = next((item for item in tried if item[0] > subject.harmless), tried[-1])
    return name, spoiled


def _spoiled(network: nn.Module, index: int, change: Change) -> tuple[str, nn.Module]:
    import torch

    from bnexport.runtimes.torch_outputs import private_copy

    spoiled = private_copy(network, "cpu")
    path, norm = norms_of(spoiled)[index]
    with torch.no_grad():
        change(norm)
    return path, spoiled


def _replace_weights(model: ModelProto, right: dict[str, Tensor], wrong: dict[str, Tensor]) -> bool:
    """Replace the weights that differ; False where a tensor of the right fold is not in the file."""
    from onnx import numpy_helper

    for name, before in right.items():
        after = wrong.get(name, before * 0)  # a bias of zeros is left out
        if after.equal(before):
            continue
        found = _find(model, name, before.double().numpy())
        if found is None:
            return False
        target, transposed = found
        values = (after.T if transposed else after).double().numpy().reshape(tuple(target.dims))
        with np.errstate(over="ignore"):  # infinity is a fault as well
            narrow = values.astype(numpy_helper.to_array(target).dtype)
        target.CopyFrom(numpy_helper.from_array(narrow, target.name))
    return True


def _find(model: ModelProto, name: str, wanted: Array) -> tuple[TensorProto, bool] | None:
    """Return the stored tensor with these numbers, and whether it is transposed; None where none or several have them.

    Another machine may have folded with another order of sums, so the last bits need not be the same.
    """
    from onnx import numpy_helper

    found = []
    for stored in model.graph.initializer:
        if stored.data_type not in _STEPS or math.prod(stored.dims) != wanted.size:
            continue
        values = numpy_helper.to_array(stored).astype(np.float64).reshape(-1)
        most = _STEPS[stored.data_type] * float(np.abs(values).max(initial=0.0))
        for view, transposed in ((wanted, False), (wanted.T, True)) if wanted.ndim == 2 else ((wanted, False),):
            if np.abs(view.reshape(-1) - values).max(initial=0.0) <= most:
                found.append((stored, transposed))
                break
    named = [item for item in found if item[0].name == name]
    return (named or found)[0] if named or len(found) == 1 else None


def _edit_layer(copy: Copy, edit: Edit | None) -> str:
    """Change the first folded layer of model.onnx, without the network."""
    from onnx import numpy_helper

    if edit is None:
        raise NotTried("the original network can't be folded again here, so its statistics are unknown")
    model = copy.model(copy.folded_file)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    node = _first_layer(model, stored, copy)
    targets = [stored[name] for name in node.input[1:3] if name in stored]
    arrays = [numpy_helper.to_array(tensor) for tensor in targets]
    wide = [array.astype(np.float64) for array in arrays]
    outputs_first = node.op_type == "Conv" or any(item.name == "transB" and item.i for item in node.attribute)
    edit(np.moveaxis(wide[0], 0 if outputs_first else 1, 0), wide[1] if len(wide) > 1 else None)
    for tensor, array, values in zip(targets, arrays, wide, strict=True):
        tensor.CopyFrom(numpy_helper.from_array(values.astype(array.dtype), tensor.name))
    copy.write_model(model, copy.folded_file)
    return f"{node.name or node.output[0]} in {MODEL_ONNX}"


def _first_layer(model: ModelProto, stored: dict[str, TensorProto], copy: Copy) -> NodeProto:
    """Return the first convolution or product that took in a BatchNorm; the first of all where names don't show it."""
    kinds = ("Conv", "Gemm")
    layers: list[NodeProto] = [node for node in model.graph.node if node.op_type in kinds and node.input[1] in stored]
    if not layers:
        raise NotTried(f"{MODEL_ONNX} has no convolution or linear layer with stored weights")
    rows = copy.subject.bundle.manifest.fold.get("rows") or ()
    into = {name for row in rows for name in str(row.get("into", "")).split(", ")} - {""}
    # The names are module paths, or nodes of an ONNX file.
    named = [node for node in layers if {node.name, node.output[0], node.input[1].rpartition(".")[0]} & into]
    return (named or layers)[0]


def _needed(tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise NotTried(f"no BatchNorm of this network has a {what}")
    return tensor


def _middle(sizes: Tensor) -> int:
    """Return the channel of median size: neither the one where a fault shows best nor a dead one."""
    return int(sizes.detach().abs().reshape(-1).argsort()[sizes.numel() // 2])


def _set_eps(norm: NormView, eps: float) -> None:
    norm.layer.eps = eps  # type: ignore[assignment]


def _make_stale(norm: NormView) -> None:
    """Make the statistics one update short: the initial ones, 0 and 1, in place of the last batch's."""
    norm.mean.mul_(_MOMENTUM)
    norm.var.mul_(_MOMENTUM).add_(1 - _MOMENTUM)


def _turn_sign(norm: NormView) -> None:
    gamma = _needed(norm.gamma, "gamma")
    gamma.view(-1)[_middle(gamma)].neg_()


def _swap_channels(norm: NormView) -> None:
    if (count := norm.var.numel()) < 2:
        raise NotTried("no BatchNorm of this network has two channels")
    one = _middle(norm.var if norm.gamma is None else norm.gamma)
    two = (one + 1) % count
    for tensor in (norm.gamma, norm.beta, norm.mean, norm.var):
        if tensor is not None:
            flat = tensor.view(-1)
            flat[[one, two]] = flat[[two, one]]


def _skip(norm: NormView) -> None:
    _set_eps(norm, 0.0)
    for tensor, value in ((norm.gamma, 1.0), (norm.beta, 0.0), (norm.mean, 0.0), (norm.var, 1.0)):
        if tensor is not None:
            tensor.fill_(value)


def _scaled(factor: float) -> Edit:
    def edit(weight: Array, _bias: Array | None) -> None:
        weight *= factor

    return edit


def _drop_bias(_weight: Array, bias: Array | None) -> None:
    if bias is None or not bias.any():
        raise NotTried("the folded layer has no bias that could be dropped")
    bias[:] = 0


def _turn_channel(weight: Array, _bias: Array | None) -> None:
    weight[_middle_row(weight)] *= -1


def _swap_rows(weight: Array, bias: Array | None) -> None:
    if len(weight) < 2:
        raise NotTried("the folded layer has one channel")
    one = _middle_row(weight)
    two = (one + 1) % len(weight)
    for array in (weight, bias):
        if array is not None:
            array[[one, two]] = array[[two, one]]


def _middle_row(weight: Array) -> int:
    return int(np.abs(weight).reshape(len(weight), -1).max(axis=1).argsort()[len(weight) // 2])


NORM_FAULTS: tuple[NormFault, ...] = (
    NormFault("eps dropped", lambda norm: _set_eps(norm, 0.0), _scaled(math.sqrt(1 + DEFAULT_EPS))),
    NormFault(
        "another eps, 1e-3",
        lambda norm: _set_eps(norm, DEFAULT_EPS if norm.layer.eps == _OTHER_EPS else _OTHER_EPS),
        _scaled(math.sqrt((1 + DEFAULT_EPS) / (1 + _OTHER_EPS))),
    ),
    NormFault("variance times 256/255", lambda norm: norm.var.mul_(_UNBIASED), _scaled(math.sqrt(1 / _UNBIASED))),
    NormFault("moving mean dropped", lambda norm: norm.mean.zero_(), _drop_bias),
    NormFault("stale moving statistics", _make_stale),
    NormFault("sign of one gamma", _turn_sign, _turn_channel),
    NormFault("absolute gamma", lambda norm: _needed(norm.gamma, "gamma").abs_()),
    NormFault("beta dropped", lambda norm: _needed(norm.beta, "beta").zero_()),
    NormFault("two channels swapped", _swap_channels, _swap_rows),
    NormFault("a BatchNorm skipped", _skip),
)
