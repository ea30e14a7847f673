"""Open bundles on onnxruntime-cuda and run them: jobs as JSON on standard input, results on standard output."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from bnexport.bundle import Bundle
from bnexport.errors import BnexportError
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.node_placement import placed_nodes


def opened(job: dict[str, Any]) -> dict[str, Any]:
    bundle = Bundle.open(job["bundle"])
    first, *others = bundle.manifest.signature.inputs
    try:
        with runner_spec("onnxruntime-cuda").open(bundle, settings=RunSettings(**job["settings"])) as runner:
            outputs = []
            for shape in job["shapes"]:
                feeds = {spec.name: np.ones((shape[0], *spec.shape[1:]), spec.dtype) for spec in others}
                answer = runner.run({first.name: np.ones(shape, first.dtype), **feeds})
                outputs.append({name: array.shape for name, array in answer.items()})
            return {"description": runner.description, "nodes": placed_nodes(runner._session), "outputs": outputs}
    except BnexportError as error:
        return {"error": error.message, "kind": type(error).__name__, "remedy": error.remedy}


print(json.dumps([opened(job) for job in json.load(sys.stdin)]))
