"""Tools that give an ONNX model: torch's exporter, ONNX Runtime's own optimiser, and simplifiers of files."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import onnx
import onnxscript.optimizer
import torch
from onnx import inliner
from onnx_ir.passes import common
from torch import Tensor
from torch.utils import _pytree as pytree

from bnexport.auditing.tool import Job, Product
from bnexport.optional import require
from bnexport.runtimes.onnxruntime_session import load_engine
from bnexport.tensors import Array


@contextlib.contextmanager
def torch_export(job: Job) -> Iterator[Product]:
    """``torch.onnx.export`` with its default optimiser, run without any optimiser of ONNX Runtime."""
    model = export(job, optimize=True)
    yield Product(_session(model, "ORT_DISABLE_ALL"), batch_norms(model))


@contextlib.contextmanager
def onnxruntime_level(job: Job, *, level: str) -> Iterator[Product]:
    """ONNX Runtime at one ``GraphOptimizationLevel``, on an export that still has its BatchNorms."""
    written = job.folder / "optimised.onnx"
    session = _session(export(job, optimize=False), level, optimised=str(written))
    yield Product(session, batch_norms(onnx.load(written, load_external_data=False)))


@contextlib.contextmanager
def onnxslim(job: Job) -> Iterator[Product]:
    """``onnxslim.slim`` on an export that still has its BatchNorms, run without any optimiser of ONNX Runtime."""
    slim = require("onnxslim", purpose="it")
    model = slim.slim(export(job, optimize=False))
    yield Product(_session(model, "ORT_DISABLE_ALL"), batch_norms(model))


@contextlib.contextmanager
def onnxsim(job: Job) -> Iterator[Product]:
    """``onnxsim.simplify`` on an export that still has its BatchNorms, run without any optimiser of ONNX Runtime."""
    simplifier = require("onnxsim", purpose="it")
    model, _checked = simplifier.simplify(export(job, optimize=False))
    yield Product(_session(model, "ORT_DISABLE_ALL"), batch_norms(model))


def export(job: Job, *, optimize: bool) -> onnx.ModelProto:
    """Export with a batch dimension that may vary, or a fixed one where the network does not let it vary.

    Args:
        job: The network.
        optimize: With the exporter's optimiser, which folds BatchNorm; without it constants alone are computed.
    """
    arguments = inspect.signature(job.module.forward).bind(*job.example).arguments
    shapes = {name: pytree.tree_map(_varying, value) for name, value in arguments.items()}
    try:
        return _exported(job, shapes, optimize=optimize)
    except Exception:  # torch.export's many classes; the second attempt tells what remains
        return _exported(job, None, optimize=optimize)


def _exported(job: Job, shapes: Any, *, optimize: bool) -> onnx.ModelProto:
    program: Any = torch.onnx.export(
        job.module,
        job.example,
        dynamic_shapes=shapes,
        dynamo=True,
        optimize=optimize,
        external_data=False,
        verbose=False,
    )
    if not optimize:
        # Without it a convolution's missing bias is a computed zero, and no other tool finds the BatchNorm after it.
        onnxscript.optimizer.fold_constants(program.model)
        common.RemoveUnusedNodesPass()(program.model)
    model: onnx.ModelProto = program.model_proto
    return model


def batch_norms(model: onnx.ModelProto) -> int:
    """BatchNormalization nodes of a model, in subgraphs and in the functions that it calls, too."""
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
    """What runs a model: input batch -> outputs in order."""
    ort = load_engine()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # it warns of every optimised file that it is for this machine alone
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = optimised
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return functools.partial(_run, session)


def _run(session: Any, probe: tuple[Tensor, ...]) -> list[Array]:
    names = [item.name for item in session.get_inputs()]
    outputs: list[Array] = session.run(None, {n: t.numpy() for n, t in zip(names, probe, strict=True)})
    return outputs
