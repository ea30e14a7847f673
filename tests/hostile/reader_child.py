"""Reads files that a parent names, one per line on standard input: "KIND PATH". Answers one line each.

If native code of a reader crashes, this process dies instead of the process of the tests.
"""

import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bnexport.data.images import load_images
from bnexport.errors import BnexportError
from bnexport.folding.onnx_backend.reading import read_source
from bnexport.loading.checkpoint import load_checkpoint, read_safetensors
from bnexport.loading.weights import load_weights
from bnexport.onnx_files.models import read_model
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.onnxruntime import OnnxRuntimeRunner
from bnexport.runtimes.torch_runners import load_torchscript
from bnexport.tensors import Signature, TensorSpec
from bnexport.validation import validate_archive

_SIGNATURE = Signature(
    (TensorSpec("input", "float32", ("batch", 1, 28, 28)),), (TensorSpec("logits", "float32", ("batch", 10)),)
)


def exported(path: Path) -> None:
    """Open a .pt2 file as a runner does: the validation, then torch."""
    validate_archive(path, "pt2")
    try:
        torch.export.load(path)
    except Exception as error:  # a runner converts it; a file that passes the validation must not do worse
        raise BnexportError(f"torch refuses it: {type(error).__name__}", remedy="") from error


def weights(path: Path) -> None:
    load_weights(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), path)


READERS: dict[str, Callable[[Path], object]] = {
    "torchscript": load_torchscript,
    "onnx": lambda path: OnnxRuntimeRunner(path, _SIGNATURE, settings=RunSettings(threads=1)).close(),
    "onnx-parsed": read_model,
    "onnx-source": read_source,
    "safetensors": read_safetensors,
    "checkpoint": load_checkpoint,
    "weights": weights,
    "pt2": exported,
    "images": load_images,
}


def main() -> None:
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        kind, _, path = line.strip().partition(" ")
        try:
            READERS[kind](Path(path))
            answer = "opened"
        except BnexportError as error:
            answer = "refused " + " ".join(str(error).split())
        except BaseException:
            answer = "FAULT " + " | ".join(traceback.format_exc().split("\n")[-6:])
        sys.__stdout__.write(answer + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
