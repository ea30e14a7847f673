"""Let a folded graph take pixels: Cast, Sub where a mean is not zero, and the scale inside the first layers.

``(scale x - mean) / std = f (x - m)`` with the factor ``f = scale / std`` and the mean in pixels ``m = mean / scale``. A factor
moves into the weights of the layers that read the input, exactly, as in ``folding.rules``; where one of its readers can't take
it, an explicit Mul stays. The mean never moves into a bias. A layer pads its input with zeros, which stand for pixels of the
mean value: a bias of ``-W f m`` would count the padding as pixels of value 0, which changes the outputs at the borders by half
of their scale.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor
from torch.fx import GraphModule, Node

from bnexport.data.preprocessing import Preprocessing
from bnexport.folding.affine import Affine
from bnexport.folding.engine import Engine
from bnexport.folding.fold import drop_unused
from bnexport.folding.graph import ConstantAffine, Graph, Op
from bnexport.folding.onnx_backend.inventory import stored
from bnexport.folding.onnx_backend.onnx_graph import OnnxGraph
from bnexport.folding.onnx_backend.onnx_writer import OnnxWriter
from bnexport.folding.onnx_backend.reading import check_valid
from bnexport.folding.plan import GrowthBudget
from bnexport.folding.torch_backend.torch_graph import TorchGraph
from bnexport.folding.torch_backend.torch_writer import TorchWriter
from bnexport.onnx_files.models import Names, graphs, put_initializers, refill

aten = torch.ops.aten


def pixel_module(folded: GraphModule, image: Preprocessing, stored: torch.dtype = torch.float32) -> GraphModule:
    """Return a copy of a folded graph with one image input that takes uint8 pixels (n, channels, height, width).

    The weights of the copy are to be ``stored`` in that type: a factor that would make them too small for it stays in a Mul.
    """
    module = copy.deepcopy(folded)
    mean, factor = _constants(image)
    (given,) = module.graph.find_nodes(op="placeholder")
    scaled = _inserted(module, given, aten.mul.Tensor, _attribute(module, given, "pixel_factor", factor))
    graph = TorchGraph(module)
    if _moved(graph, graph.by_node.get(scaled), factor, graph.elements, stored):
        TorchWriter(graph).write(())
    if bool(mean.any()):
        _inserted(module, given, aten.sub.Tensor, _attribute(module, given, "pixel_mean", mean))
    _inserted(module, given, aten.to.dtype, torch.float32)
    given.meta["val"] = given.meta["val"].to(torch.uint8)
    drop_unused(module)
    return module


def pixel_model(folded: ModelProto, image: Preprocessing, sizes: dict[str, tuple[int, ...]]) -> ModelProto:
    """Return a copy of a folded ONNX model with one image input that takes uint8 pixels (n, channels, height, width).

    ``sizes`` has numbers for sizes that the file leaves open, as for ``fold_onnx``.
    """
    model = copy.deepcopy(folded)
    initial = {tensor.name for tensor in model.graph.initializer}
    (given,) = (value for value in model.graph.input if value.name not in initial)
    mean, factor = _constants(image)
    scaled = _prepended(model, given.name, "Mul", factor)
    graph = OnnxGraph(model, sizes)
    if _moved(graph, graph.by_name.get(scaled), factor, graph.elements):
        OnnxWriter(graph).write(())
    if bool(mean.any()):
        _prepended(model, given.name, "Sub", mean)
    _prepended(model, given.name, "Cast", None)
    given.type.tensor_type.elem_type = TensorProto.UINT8
    check_valid(model, "the model that takes pixels")
    return model


def _constants(image: Preprocessing) -> tuple[Tensor, Tensor]:
    """Return the mean in pixels and the factor on the difference, both (channels, 1, 1) in float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1) for values in (image.mean, image.std))
    return mean / image.scale, image.scale / std


def _moved(graph: Graph, site: Op | None, factor: Tensor, elements: int, stored: torch.dtype = torch.float32) -> bool:
    """Move the factor into its readers; return False where one of them can't take it, or would need a copy of a weight."""
    if site is None or not isinstance(site.kind, ConstantAffine):
        return False
    exact = factor.unsqueeze(0)  # the constant in the graph is rounded to float32
    site.kind = ConstantAffine(Affine.of(exact, torch.zeros_like(exact)))
    return Engine(graph, GrowthBudget(elements, 1.0, apart=True)).push_scale(site, stored)


def _attribute(module: GraphModule, given: Node, name: str, value: Tensor) -> Node:
    while hasattr(module, name):
        name += "_"
    module.register_buffer(name, value.float())
    with module.graph.inserting_after(given):
        node = module.graph.get_attr(name)
    node.meta["val"] = getattr(module, name)
    return node


def _inserted(module: GraphModule, given: Node, target: Any, operand: Any) -> Node:
    """Insert an operator between an input and all of its readers."""
    with module.graph.inserting_after(operand if isinstance(operand, Node) else given):
        node: Node = module.graph.call_function(target, (given, operand))
    node.meta["val"] = given.meta["val"]
    given.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return node


def _prepended(model: ModelProto, given: str, operator: str, operand: Tensor | None) -> str:
    """Insert an operator between an input and all of its readers, and return the name of its output."""
    names, inputs = Names(model), [given]
    result = names.free(given, operator.lower())
    if operand is not None:
        constant = stored(names.free(result, "constant"), operand, torch.float32)
        put_initializers(model, {constant.name: constant})
        inputs.append(constant.name)
    settings: dict[str, Any] = {"to": TensorProto.FLOAT} if operator == "Cast" else {}
    for graph in graphs(model):
        for node in graph.node:
            node.input[:] = [result if name == given else name for name in node.input]
    refill(model.graph.node, [helper.make_node(operator, inputs, [result], name=result, **settings), *model.graph.node])
    return result
