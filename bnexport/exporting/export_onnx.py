"""ONNX: exported from the folded graph, cleaned, and checked against the request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import onnx_ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from torch.fx import GraphModule

from bnexport.errors import ExportError
from bnexport.exporting.export_request import DEFAULT_OPSET
from bnexport.exporting.signature import ExportJob
from bnexport.files import write_atomically
from bnexport.onnx_files.models import check_written, nodes
from bnexport.onnx_files.reshape_targets import simplify_reshapes
from bnexport.optional import one_line, quiet
from bnexport.tensors import Signature

#: The opset that the exporter writes; other opsets are converted from it.
_NATIVE_OPSET = 18
_MAX_BYTES = 2**31 - 1
_PRODUCER = "bnexport"
_ATEN = torch.ops.aten
_AVERAGES = (_ATEN.avg_pool2d.default, _ATEN.avg_pool3d.default)
_ADAPTIVE = (
    _ATEN.adaptive_avg_pool1d.default, _ATEN.adaptive_avg_pool2d.default, _ATEN.adaptive_avg_pool3d.default,
    _ATEN.adaptive_max_pool1d.default, _ATEN.adaptive_max_pool2d.default, _ATEN.adaptive_max_pool3d.default,
)  # fmt: skip


def export_onnx(job: ExportJob, path: Path) -> None:
    """Write ``model.onnx``: one file, dynamic batch, the same bytes for the same folded network.

    The job's inputs have a batch of at least 2, because the exporter treats a batch of 1 as a constant. An ExportError reports
    a graph that the exporter can't write, and a written file that is not as requested.
    """
    signature, opset, ir_version = job.signature, job.onnx.opset, job.onnx.resolved_ir_version()
    _refuse_wrong(job.folded)
    model = _convert(job)
    model.ir_version = ir_version
    simplify_reshapes(model)
    _clean(model, signature)
    check_model(model, signature, opset, ir_version, normalisations=expected_normalisations(job.folded))
    write_atomically(path, model.SerializeToString(deterministic=True))


def stamp(model: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Replace the key-value metadata of a model."""
    del model.metadata_props[:]
    for key in sorted(metadata):
        model.metadata_props.add(key=key, value=metadata[key])


def stamp_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Write key-value metadata into a model file; the graph and the weights stay as they are, byte for byte."""
    model = onnx.load(path, load_external_data=False)
    stamp(model, metadata)
    write_atomically(path, model.SerializeToString(deterministic=True))


def check_model(
    model: onnx.ModelProto, signature: Signature, opset: int, ir_version: int, *, normalisations: int = 0
) -> None:
    """Check the written model against the request, since the exporter sometimes writes something else; name the difference."""
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    found = sum(node.op_type == "BatchNormalization" for node in nodes(model))
    facts = (
        (opsets, {"": opset}, "operator sets"),
        (model.ir_version, ir_version, "IR version"),
        (_specs(model.graph.input), [(s.name, s.dtype, s.shape) for s in signature.inputs], "inputs"),
        (_specs(model.graph.output), [(s.name, s.dtype, s.shape) for s in signature.outputs], "outputs"),
        (found, normalisations, "BatchNormalization nodes"),
        (any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer), False, "external data"),
    )
    for have, want, what in facts:
        if have != want:
            raise ExportError(
                f"the exporter wrote {what} {have} instead of {want}", remedy="Try another --opset, or report the model"
            )
    check_written(model, "the exported file", remedy="Try another --opset")


def _refuse_wrong(folded: GraphModule) -> None:
    """Refuse what the exporter writes wrongly: a divisor, which it drops, and adaptive pooling of a size that varies.

    ONNX has no divisor in AveragePool, and no adaptive pooling; the exporter writes the kernel of the example's size.
    """
    for node in folded.graph.nodes:
        if node.target in _AVERAGES and node.args[6:] and node.args[6] is not None:
            raise ExportError(
                f"an average pooling has divisor_override={node.args[6]}, which ONNX does not support",
                remedy="Leave it out, and multiply by kernel size / divisor_override instead",
            )
        if node.target in _ADAPTIVE and (value := node.args[0].meta.get("val")) is not None:
            sizes = node.args[1]
            given = value.shape[-len(sizes) :]
            pairs = zip(sizes, given, strict=True)  # a size that is a node is that of the input: no pooling
            if any(isinstance(size, int) and size != 1 and isinstance(dim, torch.SymInt) for size, dim in pairs):
                raise ExportError(
                    f"ONNX has no adaptive pooling to {'x'.join(map(str, sizes))} of a size that varies",
                    remedy="Leave --dynamic-size out, or pool to 1x1",
                )


def _convert(job: ExportJob) -> onnx.ModelProto:
    signature, opset = job.signature, job.onnx.opset
    with quiet(), torch.no_grad():
        try:
            exported = torch.onnx.export(
                job.program,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
                opset_version=_NATIVE_OPSET,
                external_data=False,
                dynamo=True,
                verbose=False,
                optimize=False,
            )
            assert exported is not None
            _simplify(exported.model)
            model = exported.model_proto
        except Exception as error:  # the exporter raises many unrelated classes
            first: BaseException = error
            while first.__cause__ is not None:  # it names the operator; the others explain the exporter
                first = first.__cause__
            raise ExportError(
                f"torch.onnx can't export the folded graph: {one_line(first)}",
                remedy="Replace the operator it names, or leave it out of the exported part of the model",
            ) from error
        written = {entry.domain: entry.version for entry in model.opset_import}.get("")
        if written != opset:
            try:
                model = onnx.version_converter.convert_version(model, opset)
                _drop_newer_defaults(model, opset)
            except Exception as error:  # the converter raises bare RuntimeErrors
                raise ExportError(
                    f"the model can't be converted from opset {written} to {opset}: {one_line(error)}",
                    remedy=f"Use --opset {DEFAULT_OPSET}",
                ) from error
    if model.ByteSize() > _MAX_BYTES:
        raise ExportError(
            f"the model has {model.ByteSize()} bytes, but one ONNX file holds less than {_MAX_BYTES}",
            remedy="Export it in parts",
        )
    return model


def _drop_newer_defaults(model: onnx.ModelProto, opset: int) -> None:
    """Remove attributes that an older operator lacks, if they state its behaviour; the converter leaves them in."""
    for node in nodes(model):
        kept = [item for item in node.attribute if not (item.name == "noop_with_empty_axes" and item.i == 0)]
        if onnx.defs.get_schema(node.op_type, opset, node.domain).attributes.keys() >= {item.name for item in kept}:
            del node.attribute[:]
            node.attribute.extend(kept)


def _simplify(model: onnx_ir.Model) -> None:
    """Compute constants ahead and remove unused nodes; the folded numbers stay.

    The exporter's own optimiser is off: it silently folds BatchNormalization into convolutions again, in float32, and even a
    BatchNormalization in training mode, which is wrong.
    """
    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]


def expected_normalisations(folded: GraphModule) -> int:
    """Count the BatchNormalization nodes of the file: remaining batch norms, and instance norms by moving statistics."""
    graphs = [module.graph for module in folded.modules() if isinstance(module, GraphModule)]  # branches too
    calls = [node for graph in graphs for node in graph.nodes]
    batch = sum(node.target is _ATEN.batch_norm.default for node in calls)
    return batch + sum(node.target is _ATEN.instance_norm.default and not node.args[5] for node in calls)


def _clean(model: onnx.ModelProto, signature: Signature) -> None:
    """Remove everything that differs between two runs or names the exporting machine, and name the batch dimension."""
    model.producer_name, model.producer_version, model.doc_string = _PRODUCER, "", ""
    graph = model.graph
    graph.doc_string = ""
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for node in nodes(model):
        node.doc_string = ""
        del node.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for values, specs in ((graph.input, signature.inputs), (graph.output, signature.outputs)):
        for value, spec in zip(values, specs, strict=True):
            value.doc_string = ""
            del value.metadata_props[:]
            for dim, want in zip(value.type.tensor_type.shape.dim, spec.shape, strict=False):
                # Only a dimension that the exporter left open is named: a batch that it pinned must not look dynamic.
                if isinstance(want, str) and not dim.HasField("dim_value"):
                    dim.dim_param = want
    used = {entry.domain for entry in model.opset_import} & {node.domain for node in nodes(model)} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _specs(values: Iterable[onnx.ValueInfoProto]) -> list[tuple[str, str, tuple[int | str, ...]]]:
    return [
        (
            value.name,
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param
                for dim in value.type.tensor_type.shape.dim
            ),
        )
        for value in values
    ]
