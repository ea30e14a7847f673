from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bnexport.bundle import MODEL_ONNX, Bundle, Manifest, seal, write_golden
from bnexport.tensors import Signature, TensorSpec

#: Two inputs, of which one is a single value per sample, and two outputs: a file of another exporter.
FOREIGN = Signature(
    (TensorSpec("tokens", "float32", ("batch", 6)), TensorSpec("scale", "float32", ("batch",))),
    (TensorSpec("scores", "float32", ("batch", 6)), TensorSpec("total", "float32", ("batch",))),
)


def fixed(signature: Signature, batch: int) -> Signature:
    """Return the signature with a batch that does not vary."""
    inputs, outputs = (
        tuple(TensorSpec(spec.name, spec.dtype, (batch, *spec.shape[1:])) for spec in side)
        for side in (signature.inputs, signature.outputs)
    )
    return Signature(inputs, outputs)


def foreign_model(signature: Signature, *, opset: int = 17, ir_version: int = 8) -> bytes:
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    nodes = [
        helper.make_node("Unsqueeze", ["scale", "axes"], ["column"]),
        helper.make_node("Mul", ["tokens", "column"], ["scores"]),
        helper.make_node("ReduceSum", ["scores", "axes"], ["total"], keepdims=0),
    ]
    values = [
        [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.shape)) for spec in side]
        for side in (signature.inputs, signature.outputs)
    ]
    graph = helper.make_graph(nodes, "foreign", *values, [axes])
    opsets = [helper.make_opsetid("ai.onnx.ml", 3), helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def foreign_bundle(
    folder: Path, signature: Signature = FOREIGN, *, name: str = "Foreign.v2", **versions: int
) -> Bundle:
    folder.mkdir(parents=True)
    (folder / MODEL_ONNX).write_bytes(foreign_model(signature, **versions))
    generator = np.random.default_rng(0)
    tokens = generator.standard_normal((3, 6)).astype(np.float32)
    scale = generator.standard_normal(3).astype(np.float32)
    scores = tokens * scale[:, None]
    write_golden(folder, signature, {"tokens": tokens, "scale": scale}, {"scores": scores, "total": scores.sum(1)})
    return seal(folder, Manifest(name, 4, signature, {"source": "foreign.onnx", "options": {}}))


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return foreign_bundle(tmp_path_factory.mktemp("foreign") / "4")
