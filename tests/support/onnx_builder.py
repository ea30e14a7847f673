"""Small ONNX graphs, built node by node, with random statistics in every BatchNormalization."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}


class Builder:
    """One graph; every method that adds a node returns the name of its output."""

    def __init__(self, *, opset: int = 18, ir: int = 8, dtype: str = "float32", seed: int = 0) -> None:
        self.opset, self.ir, self.dtype = opset, ir, dtype
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.stored: list[Any] = []
        self.functions: list[Any] = []
        self.opsets = [helper.make_opsetid("", opset)]

    def input(self, *shape: int | str, name: str = "x") -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TYPES[self.dtype], shape))
        return name

    def output(self, *names: str, rank: int | None = None) -> None:
        for name in names:
            shape = None if rank is None else [None] * rank
            self.outputs.append(helper.make_tensor_value_info(name, TYPES[self.dtype], shape))

    def init(self, name: str, *shape: int, value: Any = None, overridable: bool = False) -> str:
        """A stored tensor: random, or ``value``; whole numbers stay int64."""
        array = self.rng.standard_normal(shape) if value is None else np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(self.dtype)
        self.stored.append(numpy_helper.from_array(array, name))
        if overridable or self.ir < 4:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            self.inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
        return name

    def node(
        self, operator: str, *inputs: str, name: str = "", outputs: tuple[str, ...] = (), **attributes: Any
    ) -> str:
        name = name or f"{operator.lower()}{len(self.nodes)}"
        given = outputs or (f"{name}_out",)
        self.nodes.append(helper.make_node(operator, list(inputs), list(given), name=name, **attributes))
        return given[0]

    def conv(self, x: str, cin: int, cout: int, k: int = 3, *, name: str = "conv", bias: bool = True, dims: int = 2,
             group: int = 1, **attributes: Any) -> str:  # fmt: skip
        inputs = [x, self.init(f"{name}.w", cout, cin // group, *[k] * dims)]
        inputs += [self.init(f"{name}.b", cout)] if bias else []
        return self.node("Conv", *inputs, name=name, group=group, **attributes)

    def statistics(self, channels: int, name: str, *, positive: bool = False, overridable: bool = False) -> list[str]:
        """A negative, a zero and positive gammas, tiny to large variances."""
        rng = self.rng
        gamma, var = rng.standard_normal(channels), 10 ** (rng.random(channels) * 5 - 3)
        if positive:
            gamma = np.abs(gamma) + 0.1
        else:
            gamma[0] = -abs(gamma[0])
            gamma[1:2] = 0.0 if channels > 2 else gamma[1:2]
        values = (gamma, rng.standard_normal(channels), rng.standard_normal(channels) * np.sqrt(var), var)
        return [
            self.init(f"{name}.{part}", value=value, overridable=overridable)
            for part, value in zip(("gamma", "beta", "mean", "var"), values, strict=True)
        ]

    def bn(self, x: str, channels: int, *, name: str = "bn", outputs: tuple[str, ...] = (), positive: bool = False,
           overridable: bool = False, parameters: list[str] | None = None, **attributes: Any) -> str:  # fmt: skip
        given = parameters or self.statistics(channels, name, positive=positive, overridable=overridable)
        epsilon = {} if len(self.nodes) % 4 == 0 else {"epsilon": (1e-5, 1e-3, 3e-2)[len(self.nodes) % 3]}
        return self.node("BatchNormalization", x, *given, name=name, outputs=outputs, **epsilon, **attributes)

    def model(self) -> ModelProto:
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.stored)
        model = helper.make_model(
            graph, opset_imports=self.opsets, ir_version=self.ir, functions=self.functions, producer_name="test"
        )
        onnx.checker.check_model(model)
        return model


def model_of(
    nodes: Sequence[NodeProto], shape: Sequence[int | str], stored: Mapping[str, np.ndarray] | None = None, *,
    element: int = TensorProto.FLOAT, opset: int = 18,
) -> ModelProto:  # fmt: skip
    """A model of these nodes, which make "y" of "x" and stored arrays; it is not checked."""
    given, made = (helper.make_tensor_value_info(name, element, dims) for name, dims in (("x", shape), ("y", None)))
    weights = [numpy_helper.from_array(array, name) for name, array in (stored or {}).items()]
    graph = helper.make_graph(nodes, "graph", [given], [made], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
