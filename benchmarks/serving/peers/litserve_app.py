"""LitServe around onnxruntime, as in its documentation: decode, predict, encode.

``python litserve_app.py MODEL.onnx PORT``

The methods have no types because LitServe makes the form of its requests from them.
"""

import sys

import litserve
import numpy as np
import onnxruntime


class Lenet(litserve.LitAPI):
    """One session of one thread in LitServe's worker process."""

    def setup(self, device):  # noqa: ARG002 -- LitServe's signature
        """Open the model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

    def decode_request(self, request):
        """JSON to (1, 1, 28, 28)."""
        return np.array([request["image"]], np.float32)

    def predict(self, x):
        """Logits, (1, 10)."""
        return self.session.run(None, {"input": x})[0]

    def encode_response(self, output):
        """Logits, (10,), as JSON."""
        return {"logits": output[0].tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(Lenet(), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), num_api_servers=1, log_level="warning", generate_client_file=False
    )
