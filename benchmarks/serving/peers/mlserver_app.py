"""MLServer with a custom runtime around onnxruntime, as in its documentation; JSON of the Open Inference Protocol.

``python mlserver_app.py MODEL.onnx PORT``, with the ports after PORT free as well.
"""

from __future__ import annotations

import sys

import onnxruntime
import uvloop
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse


class OnnxModel(MLModel):
    """One session of one thread in MLServer's worker process."""

    async def load(self) -> bool:
        """Open the model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = self.settings.parameters.uri
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Logits, (n, 10), of images, (n, 1, 28, 28)."""
        logits = self.session.run(None, {"input": NumpyCodec.decode_input(payload.inputs[0])})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])


async def main(model: str, port: int) -> None:
    """Serve until SIGTERM."""
    settings = Settings(host="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_port=port + 2, debug=False)
    # By name, because MLServer's worker processes import it, and there this file is not the main one.
    parameters = ModelParameters(uri=model)
    row = ModelSettings(name="bn_lenet", implementation="mlserver_app.OnnxModel", parameters=parameters)
    await MLServer(settings).start([row])


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
