"""A model for Triton's Python backend that runs the model.onnx beside it, as the ONNX Runtime backend would.

Triton's core batches, checks shapes and adds labels by the configuration; this file only computes.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, os.environ["MODEL_PACKAGES"])  # the backend's Python ignores PYTHONPATH

import numpy as np
import onnxruntime
import triton_python_backend_utils as backend

#: Of each run: a model that is slow enough for requests to queue meanwhile.
SECONDS = 0.01


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.batched = config["max_batch_size"] > 0
        self.inputs = [item["name"] for item in config["input"]]
        self.outputs = [item["name"] for item in config["output"]]

    def execute(self, requests):
        if not self.batched:
            return [self._run([request])[0] for request in requests]
        return self._run(requests)

    def _run(self, requests):
        parts = {
            name: [backend.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self.inputs
        }
        time.sleep(SECONDS)
        ends = np.cumsum([len(part) for part in parts[self.inputs[0]]])[:-1]
        answers = self.session.run(self.outputs, {name: np.concatenate(part) for name, part in parts.items()})
        answers = [np.split(answer, ends) for answer in answers]
        return [
            backend.InferenceResponse(
                [backend.Tensor(name, part[number]) for name, part in zip(self.outputs, answers, strict=True)]
            )
            for number in range(len(requests))
        ]
