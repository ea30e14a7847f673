"""Opens hostile files in a process that may use little memory and time. ``python bounded_child.py MB SECONDS KIND FILE ...``

Prints one line per file: the sentence that refused it. Any other outcome ends the process with an error.
"""

import resource
import sys
from pathlib import Path

from bnexport.bundle import Bundle
from bnexport.errors import BnexportError
from bnexport.files import Refusal
from bnexport.validation import validate_archive
from bnexport.validation.archives import validate_weights
from bnexport.validation.onnx_file import validate_onnx
from bnexport.validation.safetensors import validate_safetensors

OPENERS = {
    "bundle": lambda path: Bundle.open(path).check(),
    "torchscript": lambda path: validate_archive(path, "torchscript"),
    "pt2": lambda path: validate_archive(path, "pt2"),
    "npz": lambda path: validate_archive(path, "npz"),
    "weights": lambda path: validate_weights(path.open("rb")),
    "onnx": lambda path: validate_onnx(path.read_bytes(), folder=path.parent, inside=False),
    "safetensors": lambda path: validate_safetensors(path.open("rb")),
}


def main(megabytes: str, seconds: str, *words: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(megabytes) * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for kind, path in zip(words[::2], words[1::2], strict=True):
        try:
            OPENERS[kind](Path(path))
        except (BnexportError, Refusal) as error:
            print(str(error).replace("\n", " "))
        else:
            raise SystemExit(f"{path} was not refused")


if __name__ == "__main__":
    main(*sys.argv[1:])
