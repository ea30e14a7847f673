"""Evaluate model.pt and model.pt2 in float64: the weights inside them, with exact arithmetic.

Every float of a copy of the file's graph is widened without loss: weights, constants, and the types of casts and new
tensors. The remaining difference from the original is the one rounding of the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bnexport.bundle import MODEL_EXPORTED, MODEL_TORCHSCRIPT
from bnexport.errors import BnexportError, BundleError, ProofError
from bnexport.onnx_files import kernels
from bnexport.onnx_files.float64 import samples_at_once
from bnexport.optional import one_line, quiet
from bnexport.runtimes.torch_outputs import flatten
from bnexport.runtimes.torch_runners import load_exported_program, load_torchscript, tensor_constants
from bnexport.tensors import Array, Signature

_NARROW = (torch.float16, torch.bfloat16, torch.float32)
#: TorchScript's numbers of these types (c10::ScalarType), and of float64.
_NARROW_NUMBERS, _DOUBLE_NUMBER = (5, 6, 15), 7


class TorchFloat64Evaluator:
    """Evaluates a file of torch, with the name of a row of TORCH_FILES, with every float widened to float64.

    ``chunk`` samples are evaluated at once where the batch dimension varies, which bounds the memory. None: as
    ``samples_at_once``.
    """

    def __init__(self, file: Path | TorchFile, signature: Signature, *, chunk: int | None = None) -> None:
        opened = TorchFile.load(file) if isinstance(file, Path) else file
        self._name = opened.name
        self._signature = signature
        self.varies = all(isinstance(spec.shape[0], str) for spec in signature.inputs)
        self._chunk = chunk
        try:
            self._function = TORCH_FILES[self._name].widened(opened)
        except BnexportError:
            raise
        except Exception as error:  # torch's compilers raise many unrelated classes
            raise self._not_evaluated(error) from error

    def evaluate(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return outputs in float64; input name -> (n, ...), floats of any width, n >= 1.

        A ProofError reports a value that was not float64: the result would prove nothing.
        """
        size = len(feeds[self._signature.inputs[0].name])
        step = (self._chunk or samples_at_once(feeds)) if self.varies else max(size, 1)
        parts = [self._part(feeds, at, at + step) for at in range(0, max(size, 1), step)]
        return {spec.name: np.concatenate([p[i] for p in parts]) for i, spec in enumerate(self._signature.outputs)}

    def _part(self, feeds: Mapping[str, Array], start: int, stop: int) -> list[Array]:
        arrays = [np.array(feeds[spec.name][start:stop]) for spec in self._signature.inputs]
        tensors = [torch.from_numpy(array.astype(np.float64) if array.dtype.kind == "f" else array) for array in arrays]
        try:
            with torch.inference_mode(), _float64_by_default(), wide_convolutions(), quiet():
                results = flatten(self._function(*tensors))
        except BnexportError:
            raise
        except Exception as error:  # any error of torch's operators
            raise self._not_evaluated(error) from error
        expected = len(self._signature.outputs)
        if len(results) != expected:
            raise BundleError(
                f"{self._name} returns {len(results)} outputs, but the manifest states {expected}",
                remedy="Check that the file is the one that was exported",
            )
        for spec, tensor in zip(self._signature.outputs, results, strict=True):
            _refuse_narrow(spec.name, tensor)
        return [tensor.numpy() for tensor in results]

    def _not_evaluated(self, error: Exception) -> BundleError:
        return BundleError(
            f"{self._name} can't be evaluated in float64: {one_line(error, 200)}",
            remedy="Check that the file is the one that was exported",
        )


@dataclass(frozen=True)
class TorchFile:
    """A loaded file of torch, whose module is not changed after loading."""

    name: str
    #: A ScriptModule or an ExportedProgram.
    module: Any
    #: Every tensor in the file: parameters, buffers and constants, in the types of the file.
    tensors: Sequence[Tensor]

    @classmethod
    def load(cls, file: Path) -> TorchFile:
        """Load a file with the name of a row of TORCH_FILES."""
        kind = TORCH_FILES[file.name]
        module = kind.load(file)
        return cls(file.name, module, [tensor.detach() for tensor in kind.tensors(module)])


def _script_tensors(module: Any) -> list[Tensor]:
    """Return constants (freezing makes weights constants), parameters and buffers of a TorchScript module."""
    constants = [node.t("value") for node in tensor_constants(module.graph)]
    return [*constants, *module.parameters(), *module.buffers()]


def _program_tensors(program: Any) -> list[Tensor]:
    """Return parameters, buffers and constants of an exported program."""
    found = (*program.state_dict.values(), *program.constants.values())
    return [value for value in found if isinstance(value, Tensor)]


def _widened_program(file: TorchFile) -> Callable[..., Any]:
    """Return an exported program's graph, run node by node, so that every value is checked."""
    with quiet():
        module = file.module.module(check_guards=False)
    module._forward_pre_hooks.clear()  # the hooks refuse inputs of another type than the exported one
    assert isinstance(module, GraphModule)
    module.double()
    for inner in module.modules():
        if isinstance(inner, GraphModule):
            _widen_graph(inner)
    return _LookingInterpreter(module).run


def _widen_graph(module: GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(module.get_submodule(owner), name)
            if isinstance(value, Tensor) and value.dtype in _NARROW:  # a constant outside the parameters and buffers
                setattr(module.get_submodule(owner), name, value.double())
        elif node.op == "call_function":
            node.args = tuple(pytree.tree_map(_wide_type, node.args))
            node.kwargs = dict(pytree.tree_map(_wide_type, node.kwargs))
    module.recompile()


class _LookingInterpreter(Interpreter):
    """Runs a graph and refuses a value that left float64."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        for value in pytree.tree_leaves(result):
            _refuse_narrow(n.name, value)
        return result


def _widened_script(file: TorchFile) -> Callable[..., Any]:
    """Return a TorchScript function made from a copy of the file's graph."""
    module = file.module
    with quiet():
        if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
            module = torch.jit.freeze(module, optimize_numerics=False)  # weights become constants of one graph
        graph = module.graph.copy()
        for node in tensor_constants(graph):
            if node.t("value").dtype in _NARROW:
                wide = node.t("value").double()
                node.t_("value", wide)
                node.output().inferTypeFrom(wide)
        _widen_script_types(graph)
        itself = next(iter(graph.inputs()))
        if list(itself.uses()):
            raise BundleError(
                f"{file.name} can't be evaluated in float64: it changes its own weights during a call",
                remedy="Export a network in eval mode, which stores nothing between two calls",
            )
        graph.eraseInput(0)
        function: Callable[..., Any] = torch._C._create_function_from_graph("forward", graph)
    return function


def _widen_script_types(graph: Any) -> None:
    """Replace narrower types of casts and new tensors by float64; TorchScript stores types as numbers."""
    for node in _script_nodes(graph):
        if node.schema() == "(no schema)":
            continue
        names = [argument.name for argument in torch._C.parse_schema(node.schema()).arguments]
        for at, (name, value) in enumerate(zip(names, node.inputs(), strict=False)):
            if name == "dtype" and value.toIValue() in _NARROW_NUMBERS:
                constant = graph.create("prim::Constant")
                constant.i_("value", _DOUBLE_NUMBER)
                constant.output().setType(torch._C.IntType.get())
                constant.insertBefore(node)
                node.replaceInput(at, constant.output())


def _script_nodes(block: Any) -> Iterator[Any]:
    """Yield every node, also in the blocks of branches and loops."""
    for node in list(block.nodes()):
        yield node
        for inner in node.blocks():
            yield from _script_nodes(inner)


class _TorchFormat(NamedTuple):
    """One row of TORCH_FILES: how a file is loaded, its tensors, and its function on tensors in float64."""

    load: Callable[[Path], Any]
    tensors: Callable[[Any], list[Tensor]]
    widened: Callable[[TorchFile], Callable[..., Any]]


#: File of a bundle -> its format.
TORCH_FILES: dict[str, _TorchFormat] = {
    MODEL_TORCHSCRIPT: _TorchFormat(load_torchscript, _script_tensors, _widened_script),
    MODEL_EXPORTED: _TorchFormat(load_exported_program, _program_tensors, _widened_program),
}


def _wide_type(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def _refuse_narrow(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64:
        raise ProofError(
            f"the float64 evaluation left float64 at {name!r}",
            remedy="Report this with the model: an operator of its graph states a type where none was expected",
        )


@contextlib.contextmanager
def _float64_by_default() -> Iterator[None]:
    """Make float64 the default type of new tensors inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- convolutions as matrix products ---

_ATEN = torch.ops.aten
#: Operator -> the place of ``transposed`` among its arguments; None: it is never transposed. In inference mode torch dispatches
#: conv2d and conv3d, otherwise the operators inside them.
_OPERATORS = {_ATEN.conv2d.default: None, _ATEN.conv3d.default: None, _ATEN.convolution.default: 6}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class wide_convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call] # noqa: N801 -- as torch.inference_mode is used
    """Computes dense float64 convolutions on the CPU by matrix products inside the block, also those of TorchScript.

    torch's own kernels take up to three times as long. Measured with torch 2.14.1 on one thread whose matrix product reaches 39
    GFLOP/s: 3x3 with 64 channels at 56x56 14 GFLOP/s, 7x7 with 3 channels 10, 3x3x3 8. Convolutions of one tap, grouped ones
    and those of one dimension are fast enough and stay torch's.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, or its replacement."""
        if func in _OPERATORS and (given := _dense(func, args, kwargs or {})) is not None:
            return _convolve(*given)
        return func(*args, **(kwargs or {}))


def _dense(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return input, weight, bias, stride, padding and dilation of a convolution that is replaced; None for any other."""
    at = _OPERATORS[func]
    if kwargs or (at is not None and args[at]):
        return None
    names = _NAMES if at is None else (*_NAMES[:6], "transposed", "more", "groups")
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    found = defaults | dict(zip(names, args, strict=False))
    x, weight, bias = found["input"], found["weight"], found["bias"]
    taps = math.prod(weight.shape[2:])
    plain = x.dtype is weight.dtype is torch.float64 and x.device.type == "cpu" and x.ndim == weight.ndim >= 4
    if not plain or found["groups"] != 1 or taps == 1 or 0 in x.shape or x.shape[1] != weight.shape[1]:
        return None
    dims = x.ndim - 2
    steps = [_numbers(found[name], dims) for name in ("stride", "padding", "dilation")]
    return x, weight, bias, *steps


_Steps = tuple[int, ...]


def _numbers(value: int | Sequence[int], dims: int) -> _Steps:
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * dims if len(numbers) == 1 else numbers


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Steps, padding: _Steps, dilation: _Steps
) -> Tensor:
    n, channels, *size = x.shape
    outputs, _, *kernel = weight.shape
    counts = [(size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(len(size))]
    if min(counts) < 1:
        raise RuntimeError(f"a kernel of {kernel} is larger than the padded input of {size}")
    factors = weight.reshape(outputs, -1)
    row = factors.shape[1] * math.prod(counts[1:])
    room = kernels.room_of(factors.numel())
    samples, rows = max(room // (row * counts[0]), 1), min(max(room // row, 1), counts[0])
    y = x.new_empty((n, outputs, *counts))
    for first in range(0, n, samples):
        part = functional.pad(x[first : first + samples], [p for p in reversed(padding) for _ in range(2)])
        steps = part.stride()
        taps = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
        moves = [step * s for step, s in zip(steps[2:], stride, strict=True)]
        for start in range(0, counts[0], rows):
            shape = (len(part), min(rows, counts[0] - start), *counts[1:])
            seen = part[:, :, start * stride[0] :]
            windows = seen.as_strided((channels, *kernel, *shape), (steps[1], *taps, steps[0], *moves))
            product = factors @ windows.reshape(factors.shape[1], -1)
            target = y[first : first + samples, :, start : start + rows]
            target.copy_(product.view(outputs, *shape).transpose(0, 1))
    return y if bias is None else y.add_(bias.view(-1, *(1,) * len(size)))
