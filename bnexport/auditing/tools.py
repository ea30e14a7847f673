"""The audited tools: torch callables (eager, TorchScript, torch.fx, torch.compile, bnexport) and ONNX models.

``torch.compile`` runs with inductor's freezing, which folds BatchNorm in two passes: on modules, and on constants.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxscript.optimizer
import torch
from onnx import inliner
from onnx_ir.passes import common
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bnexport.auditing.audited_network import call
from bnexport.auditing.tool_table import Product, ToolInput
from bnexport.errors import RuntimeUnavailable
from bnexport.folding.fold import fold
from bnexport.optional import require
from bnexport.runtimes.onnxruntime_session import load_engine
from bnexport.tensors import Array

_CALLS = (torch.nn.functional.batch_norm, torch.batch_norm)


class counted_calls(TorchFunctionMode):  # noqa: N801 -- used as a context manager, like torch.no_grad
    """Counts the BatchNorm calls that Python makes inside the block."""

    count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``; calls inside it are not counted."""
        self.count += func in _CALLS
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def eager(job: ToolInput) -> Iterator[Product]:
    """Run the unchanged network."""
    yield _called(job.module, job.example)


@contextlib.contextmanager
def fx_fuse(job: ToolInput) -> Iterator[Product]:
    """``torch.fx.experimental.optimization.fuse``."""
    from torch.fx.experimental.optimization import fuse

    yield _called(fuse(job.module), job.example)


@contextlib.contextmanager
def jit_freeze(job: ToolInput) -> Iterator[Product]:
    """``torch.jit.trace``, then ``torch.jit.freeze``."""
    yield _scripted(torch.jit.freeze(_traced(job)))


@contextlib.contextmanager
def jit_optimize(job: ToolInput) -> Iterator[Product]:
    """``torch.jit.trace``, then ``torch.jit.optimize_for_inference``, which freezes and moves to oneDNN."""
    yield _scripted(torch.jit.optimize_for_inference(_traced(job)))


@contextlib.contextmanager
def bnexport_fold(job: ToolInput) -> Iterator[Product]:
    """``bnexport.fold``, run in torch."""
    folded = fold(job.module, job.example).model
    graphs = [module.graph for module in folded.modules() if isinstance(module, GraphModule)]  # branches too
    left = sum(node.target is torch.ops.aten.batch_norm.default for graph in graphs for node in graph.nodes)
    yield Product(functools.partial(call, folded), left)


def _called(module: Any, example: tuple[Tensor, ...]) -> Product:
    with counted_calls() as calls:
        call(module, example)
    return Product(functools.partial(call, module), calls.count)


def _traced(job: ToolInput) -> Any:
    # Not strict, because strict tracing refuses networks that return a dict.
    return torch.jit.trace(job.module, job.example, check_trace=False, strict=False)  # type: ignore[no-untyped-call]


def _scripted(module: Any) -> Product:
    return Product(functools.partial(call, module), sum(_kinds(module.inlined_graph, "aten::batch_norm")))


def _kinds(block: Any, kind: str) -> Iterator[bool]:
    """Yield for every node of a TorchScript graph, with its inner blocks, whether it is of a kind."""
    for node in block.nodes():
        yield node.kind() == kind
        for inner in node.blocks():
            yield from _kinds(inner, kind)


#: Inductor's configuration while it is audited.
SETTINGS: dict[str, Any] = {
    "freezing": True,
    "compile_threads": 1,  # without worker processes, which would outlive the audit
    "fx_graph_cache": False,  # the counting pass does not see a cached graph
    "cpp_cache_precompile_headers": False,  # it writes files outside of the fresh cache
}
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_UNKNOWN = object()


@contextlib.contextmanager
def compile_freezing(job: ToolInput) -> Iterator[Product]:
    """Compile with ``torch._inductor.config.freezing``, and restore configuration, caches and files afterwards."""
    with _files_in(job.folder):
        import torch._inductor.config as config
        from torch._inductor.utils import fresh_cache

        need_compiler(config.cpp.cxx)
        graphs: list[set[object]] = []
        settings = {**SETTINGS, "post_grad_custom_post_pass": lambda graph: graphs.append(sites_left(graph))}
        torch._dynamo.reset()
        try:
            with fresh_cache(dir=str(job.folder)), config.patch(settings):
                compiled = torch.compile(job.module)
                call(compiled, job.example)
                yield Product(functools.partial(call, compiled), _total(graphs))
        finally:
            torch._dynamo.reset()


@contextlib.contextmanager
def _files_in(folder: Path) -> Iterator[None]:
    """Keep inductor's files in a folder, and restore the environment variables that it sets on import."""
    before = dict(os.environ)
    os.environ[_CACHE] = str(folder)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


def need_compiler(candidates: Any) -> None:
    """Raise RuntimeUnavailable without a compiler of inductor (``torch._inductor.config.cpp.cxx``) on the PATH."""
    listed = candidates if isinstance(candidates, list | tuple) else (candidates,)
    commands = ["cl"] if sys.platform == "win32" else [str(command) for command in listed if command]
    if not any(shutil.which(shlex.split(command)[0]) for command in commands if command.strip()):
        raise RuntimeUnavailable(
            f"no C++ compiler ({' or '.join(commands)}) is on the PATH",
            remedy="Install one, such as g++, or name it in the environment variable CXX",
        )


def sites_left(graph: Any) -> set[object]:
    """Return the BatchNorm calls with a remaining operation in inductor's final graph.

    Inductor decomposes BatchNorm into arithmetic, so there is no operator to count, but each node keeps its original operator
    and the name of the call.
    """
    left: set[object] = set()
    for node in graph.nodes:
        if node.op == "call_function" and "batch_norm" in str(node.meta.get("original_aten")):
            source = node.meta.get("from_node")
            left.add(source[0].name if source else _UNKNOWN)
    return left


def _total(graphs: list[set[object]]) -> int | None:
    """Return the sum over all graphs (a graph break makes several); None if a node has lost its origin."""
    if not graphs or any(_UNKNOWN in sites for sites in graphs):
        return None
    return sum(len(sites) for sites in graphs)


@contextlib.contextmanager
def torch_export(job: ToolInput) -> Iterator[Product]:
    """``torch.onnx.export`` with its default optimiser, run without any optimiser of ONNX Runtime."""
    model = export(job, optimize=True)
    yield Product(_session(model, "ORT_DISABLE_ALL"), batch_norms(model))


@contextlib.contextmanager
def onnxruntime_level(job: ToolInput, *, level: str) -> Iterator[Product]:
    """ONNX Runtime at one ``GraphOptimizationLevel``, on an export that still has its BatchNorms."""
    written = job.folder / "optimised.onnx"
    session = _session(export(job, optimize=False), level, optimised=str(written))
    yield Product(session, batch_norms(onnx.load(written, load_external_data=False)))


@contextlib.contextmanager
def onnxslim(job: ToolInput) -> Iterator[Product]:
    """``onnxslim.slim`` on an export that still has its BatchNorms, run without any optimiser of ONNX Runtime."""
    slim = require("onnxslim", purpose="it")
    model = slim.slim(export(job, optimize=False))
    yield Product(_session(model, "ORT_DISABLE_ALL"), batch_norms(model))


@contextlib.contextmanager
def onnxsim(job: ToolInput) -> Iterator[Product]:
    """``onnxsim.simplify`` on an export that still has its BatchNorms, run without any optimiser of ONNX Runtime."""
    simplifier = require("onnxsim", purpose="it")
    model, _checked = simplifier.simplify(export(job, optimize=False))
    yield Product(_session(model, "ORT_DISABLE_ALL"), batch_norms(model))


def export(job: ToolInput, *, optimize: bool) -> onnx.ModelProto:
    """Export with a varying batch dimension, or with a fixed one if the network needs it.

    ``optimize`` runs the exporter's optimiser, which folds BatchNorm; without it only constants are computed.
    """
    arguments = inspect.signature(job.module.forward).bind(*job.example).arguments
    shapes = {name: pytree.tree_map(_varying, value) for name, value in arguments.items()}
    try:
        return _exported(job, shapes, optimize=optimize)
    except Exception:  # torch.export has many classes; the second attempt decides
        return _exported(job, None, optimize=optimize)


def _exported(job: ToolInput, shapes: Any, *, optimize: bool) -> onnx.ModelProto:
    options: dict[str, Any] = {"dynamo": True, "optimize": optimize, "external_data": False, "verbose": False}
    program: Any = torch.onnx.export(job.module, job.example, dynamic_shapes=shapes, **options)
    if not optimize:
        # Otherwise a convolution's missing bias is a computed zero, and other tools do not find the BatchNorm after it.
        onnxscript.optimizer.fold_constants(program.model)
        common.RemoveUnusedNodesPass()(program.model)
    model: onnx.ModelProto = program.model_proto
    return model


def batch_norms(model: onnx.ModelProto) -> int:
    """Return the number of BatchNormalization nodes, including those in subgraphs and called functions."""
    if model.functions:
        model = inliner.inline_local_functions(model)
    return _count(model.graph)


def _count(graph: onnx.GraphProto) -> int:
    inner = [each for node in graph.node for item in node.attribute for each in (item.g, *item.graphs)]
    here = [node for node in graph.node if node.op_type == "BatchNormalization"]
    return len(here) + sum(map(_count, inner))


def _varying(value: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) else None


def _session(model: onnx.ModelProto, level: str, *, optimised: str = "") -> Any:
    """Return a function that runs a model: input batch -> outputs in order."""
    ort = load_engine()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # it warns that each optimised file is for this machine only
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = optimised
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return functools.partial(_run, session)


def _run(session: Any, probe: tuple[Tensor, ...]) -> list[Array]:
    names = [item.name for item in session.get_inputs()]
    return list(session.run(None, {name: tensor.numpy() for name, tensor in zip(names, probe, strict=True)}))
