"""A bundle: one directory with a model in every format, its preprocessing, and the proof that its outputs are right.

::

    models/bn_lenet/1/model.onnx            folded, dynamic batch
    models/bn_lenet/1/model.float32.onnx    of an int8 bundle: the float32 file that model.onnx was made from
    models/bn_lenet/1/model.pt              TorchScript made from the same folded weights
    models/bn_lenet/1/model.pt2             torch.export's file of the same
    models/bn_lenet/1/weights.safetensors   the unfolded weights
    models/bn_lenet/1/manifest.json         signature, preprocessing, labels, hashes, versions, fold report, verdicts
    models/bn_lenet/1/test_data_set_0/      golden input_0.pb / output_0.pb (the layout of onnx_test_runner)
    models/bn_lenet/1/report.html           one self-contained page
    models/bn_lenet/1/tuned.json            optional: settings measured on one machine (``tuned``), outside the hashes
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from bnexport.errors import REBUILD, BundleError, FeedError
from bnexport.files import Refusal, input_errors, sha256, write_atomically
from bnexport.optional import one_line, require
from bnexport.tensor_proto import read_tensor
from bnexport.tensors import Array, Signature, TensorSpec
from bnexport.validation.json_text import check_keys, parse_json
from bnexport.validation.limits import count_elements, limit, refusing, shown
from bnexport.validation.paths import check_twins, name_problem, place_problem

FORMAT = "bnexport-bundle"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MODEL_ONNX = "model.onnx"
#: The float32 model from which an int8 model.onnx was made: the reference of its file proof.
MODEL_FLOAT32 = "model.float32.onnx"
MODEL_TORCHSCRIPT = "model.pt"
MODEL_EXPORTED = "model.pt2"
WEIGHTS = "weights.safetensors"
REPORT = "report.html"
TUNED = "tuned.json"
GOLDEN = "test_data_set_0"
#: Precisions of the weights in a model file; ``Manifest.onnx`` states it under "precision".
STORED_PRECISIONS = ("float32", "float16", "bfloat16", "int8")
#: Types of the image input that an export can choose; ``Manifest.onnx`` states "uint8" under "input_type".
INPUT_TYPES = ("float32", "uint8")
#: What an int8 file is written for (``quantization``).
INT8_TARGETS = ("cpu", "tensorrt")
#: Key of the manifest -> types of its JSON value; the other keys have objects.
_KINDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "version": (int,),
    "dataset": (str, type(None)),
    "preprocessing": (dict, type(None)),
    "labels": (list, type(None)),
}
#: Objects inside the manifest -> their allowed keys; these objects determine the inputs of a model.
_INNER_KEYS: dict[str, tuple[str, ...]] = {
    "signature": ("inputs", "outputs"),
    "network": ("source", "options"),
    "preprocessing": ("channels", "height", "width", "scale", "mean", "std"),
    "onnx": ("opset", "ir_version", "precision", "quantization", "input_type", "packed_pools"),
}


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    name: str  # Name of the model, and of its folder in a model repository
    version: int  # Version of the model, and name of its folder
    signature: Signature  # Inputs and outputs of every model file in the bundle
    network: Mapping[str, Any]  # Origin of the unfolded network: ``{"source": "bn_lenet", "options": {...}}``
    dataset: str | None = None  # Data set that the network was trained on, a row of ``DATASETS`` or ``folder:PATH``
    preprocessing: Mapping[str, Any] | None = None  # ``data.preprocessing.Preprocessing.to_json``
    labels: tuple[str, ...] | None = None  # Class names in the order of the logits
    # Of an int8 file also "quantization": its ranges and their sources (``quantization.quantize.Int8Result.record``).
    # "input_type": "uint8" if the files take pixels and hold the preprocessing inside. "packed_pools": number of average pools
    # that model.onnx computes by convolutions (``onnx_files.packed_pools``)
    onnx: Mapping[str, Any] = field(default_factory=dict)  # ``{"opset": 18, "ir_version": 8, "precision": "float32"}``
    environment: Mapping[str, Any] = field(default_factory=dict)  # Hardware and versions at export
    fold: Mapping[str, Any] = field(default_factory=dict)  # The fold report (``folding.FoldReport.to_json``)
    # The verdict at export (``verification.VerificationReport.to_json``)
    verification: Mapping[str, Any] = field(default_factory=dict)
    # Path inside the bundle -> ``{"sha256": ..., "size": ...}``, for every file except the manifest and tuned.json
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, with the format's name and version first."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["signature"] = self.signature.to_json()
        values["labels"] = None if self.labels is None else list(self.labels)
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values}

    @property
    def precision(self) -> str:
        """Precision of the weights in the files: a key of STORED_PRECISIONS."""
        return str(self.onnx.get("precision", "float32"))

    @property
    def takes_pixels(self) -> bool:
        """True if the input of the files is uint8 pixels, channels first, and the files convert them."""
        return self.onnx.get("input_type") == "uint8"

    @property
    def packed(self) -> str:
        """Words for the average pools that ``--pack-pools`` packed: "1 average pool packed"; "" for none."""
        count = self.onnx.get("packed_pools")
        return f"{count} average pool{'' if count == 1 else 's'} packed" if type(count) is int else ""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Expected class names of the data set, in the order of the logits; None if they are unknown.

        They are the labels, unless the export renamed the classes.
        """
        accuracy = self.verification.get("accuracy")
        renamed = accuracy.get("classes") if isinstance(accuracy, dict) else None
        return tuple(map(str, renamed)) if isinstance(renamed, list) else self.labels

    def model_facts(self) -> dict[str, str]:
        """Return the part of the manifest that model.onnx repeats in its metadata, for a server with only that file."""
        values = {
            "name": self.name,
            "labels": json.dumps(self.labels),
            "preprocessing": json.dumps(self.preprocessing, sort_keys=True),
            **({"input_type": "uint8"} if self.takes_pixels else {}),
        }
        return {f"bnexport.{key}": value for key, value in values.items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """Read the result of ``to_json``; BundleError for another content, a newer format, or missing or unknown keys."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise BundleError(f"{MANIFEST} is not a bnexport manifest", remedy=REBUILD)
        if value.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"{MANIFEST} has format version {value.get('format_version')!r}, but this bnexport reads {FORMAT_VERSION}",
                remedy="Install a newer bnexport, or write the bundle again",
            )
        known = {item.name for item in fields(cls)}
        given = set(value) - {"format", "format_version", "digest"}
        if given != known:
            odd = ", ".join(sorted(given ^ known))
            raise BundleError(f"{MANIFEST} has missing or unknown keys: {odd}", remedy=REBUILD)
        try:
            values = {name: value[name] for name in known}
            _check_kinds(values)
            for name, keys in _INNER_KEYS.items():
                check_keys(values[name], keys, name)
            _check_specs(values["signature"])
            values["signature"] = Signature.from_json(value["signature"])
            if not values["signature"].inputs or not values["signature"].outputs:
                raise ValueError("its signature has no input or no output")
            values["labels"] = None if value["labels"] is None else tuple(map(str, value["labels"]))
            if (stored := values["onnx"].get("precision", "float32")) not in STORED_PRECISIONS:
                raise ValueError(f"its files are in the unknown precision {stored!r}")
            manifest = cls(**values)
            _check_pixels(manifest)
            _check_file_table(manifest.files)
        except (FeedError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{MANIFEST} can't be read: {one_line(error)}", remedy=REBUILD) from error
        return manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. ``open`` reads and checks only the manifest; ``check`` reads every file.

    Example:
        >>> bundle = bnexport.Bundle.open("models/bn_lenet/1")  # doctest: +SKIP
        >>> bundle.manifest.signature.inputs[0].shape  # doctest: +SKIP
        ('batch', 1, 28, 28)
    """

    path: Path  # The directory
    manifest: Manifest  # The content of its manifest.json

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a bundle's directory.

        Raises:
            BundleError: The directory or its manifest is missing, or the manifest is damaged or was changed.
        """
        folder = Path(path)
        file = folder / MANIFEST
        with input_errors(file, BundleError, remedy=REBUILD):
            if not folder.is_dir():
                what = "is a file, not a bundle's directory" if folder.exists() else "does not exist"
                raise BundleError(f"{folder} {what}", remedy="Give a directory written by bnexport fold-and-export")
            if not file.is_file():
                raise BundleError(f"{folder} has no {MANIFEST}, so it is not a bundle", remedy=bundle_hint(folder))
            if (problem := place_problem(folder, MANIFEST)) is not None:
                raise BundleError(f"{folder}: {problem}", remedy=REBUILD)
            with refusing(f"{file} can't be read: it", BundleError, remedy=REBUILD), file.open("rb") as opened:
                most = limit("manifest-bytes")
                value = parse_json(opened.read(most + 1), max_bytes=most)
        manifest = Manifest.from_json(value)
        if value.get("digest") != _digest(value):
            raise BundleError(f"{file} was changed after it was written (its digest does not match)", remedy=REBUILD)
        return cls(folder, manifest)

    def file(self, name: str) -> Path:
        """Return the path of a file; BundleError if it is not in the manifest, is missing, or is a link to another file."""
        path = self.path / name
        if name not in self.manifest.files or not path.is_file():
            raise BundleError(f"{self.path} has no {name}", remedy=REBUILD)
        with input_errors(f"{self.path}: {name}", BundleError, remedy=REBUILD):
            problem = place_problem(self.path, name)
        if problem is not None:
            raise BundleError(f"{self.path}: {problem}", remedy=REBUILD)
        return path

    def problem(self, name: str) -> str | None:
        """Return why a listed file is not the written one; None if its size and SHA-256 match."""
        try:
            return self._change(name)
        except OSError as error:
            return f"{name} can't be read: {one_line(error)}"

    def _change(self, name: str) -> str | None:
        path, expected = self.path / name, self.manifest.files[name]
        if (found := place_problem(self.path, name)) is not None:
            return found
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected["size"]:
            return f"{name} has {size} bytes, the manifest states {expected['size']}"
        if sha256(path) != expected["sha256"]:
            return f"{name} was changed: its SHA-256 is not the manifest's"
        return None

    def problems(self) -> list[str]:
        """Return the problems of listed files, and the files that the manifest does not list."""
        found = [problem for name in self.manifest.files if (problem := self.problem(name)) is not None]
        return found + [_unlisted(name) for name in self.unlisted()]

    def unlisted(self) -> list[str]:
        """Return the files in the directory that the manifest does not list."""
        return sorted(set(_names(self.path)) - set(self.manifest.files))

    def check(self) -> None:
        """Raise BundleError with the first file that is missing, changed or unlisted."""
        for name in self.manifest.files:
            with input_errors(f"{self.path}: {name}", BundleError, remedy="Let this user read it"):
                problem = self._change(name)
            if problem is not None:
                raise BundleError(f"{self.path}: {problem}", remedy=REBUILD)
        if unlisted := self.unlisted():
            raise BundleError(f"{self.path}: {_unlisted(unlisted[0])}", remedy=REBUILD)

    def golden(self) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return golden inputs and outputs by name; the outputs are the unfolded network's in float64, rounded once.

        Raises:
            BundleError: A file is missing or is not a tensor.
        """
        inputs, outputs = (
            {spec.name: self._tensor(f"{GOLDEN}/{kind}_{number}.pb") for number, spec in enumerate(specs)}
            for kind, specs in _sides(self.manifest.signature)
        )
        return inputs, outputs

    def _tensor(self, name: str) -> Array:
        path = self.file(name)
        odd = refusing(f"{path} is not a tensor that bnexport reads: it", BundleError, remedy=REBUILD)
        with odd, input_errors(path, BundleError, remedy=REBUILD):
            if path.stat().st_size > limit("onnx-bytes"):
                raise Refusal("has more than 2 GB, which protobuf can't read")
            return read_tensor(path.read_bytes())[1]


def _unlisted(name: str) -> str:
    return f"{name} is not in the manifest"


def seal(folder: Path, manifest: Manifest) -> Bundle:
    """Write the manifest of a bundle's directory that is complete otherwise, with size and SHA-256 of every file."""
    files = {name: {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size} for name in _names(folder)}
    sealed = replace(manifest, files=files)
    value = sealed.to_json()
    value["digest"] = _digest(value)
    write_atomically(folder / MANIFEST, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
    return Bundle(folder, sealed)


def write_golden(folder: Path, signature: Signature, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Write golden vectors (n, ...) into a bundle's directory as TensorProtos of the signature's order and types."""
    onnx = require("onnx", purpose="writing golden vectors")
    (folder / GOLDEN).mkdir(exist_ok=True)
    for (kind, specs), arrays in zip(_sides(signature), (inputs, outputs), strict=True):
        for index, spec in enumerate(specs):
            with np.errstate(over="ignore"):  # the verification refuses infinity in the file
                narrow = arrays[spec.name].astype(spec.dtype)
            proto = onnx.numpy_helper.from_array(narrow, spec.name)
            (folder / GOLDEN / f"{kind}_{index}.pb").write_bytes(proto.SerializeToString(deterministic=True))


def _names(folder: Path) -> list[str]:
    """Return the files below ``folder``, as sorted POSIX paths, except the manifest and a tuned.json that is a plain file."""
    entries = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    outside = {MANIFEST} if place_problem(folder, TUNED) else {MANIFEST, TUNED}
    return sorted({path.relative_to(folder).as_posix() for path in entries} - outside)


def _digest(value: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the manifest's canonical JSON without its digest."""
    rest = {key: item for key, item in value.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_kinds(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        kinds = _KINDS.get(name, (dict,))
        if type(value) not in kinds:  # not isinstance: true is not a version
            raise TypeError(f"{name} is a {type(value).__name__}, expected {' or '.join(k.__name__ for k in kinds)}")


def _check_pixels(manifest: Manifest) -> None:
    """Check that files that take pixels have one image input and a preprocessing."""
    stated, specs = manifest.onnx.get("input_type", "float32"), manifest.signature.inputs
    if stated not in INPUT_TYPES:
        raise ValueError(f"its files have the unknown input type {stated!r}")
    fits = len(specs) == 1 and specs[0].dtype == "uint8" and len(specs[0].shape) == 4
    if manifest.takes_pixels and (manifest.preprocessing is None or not fits):
        raise ValueError("its files take pixels, but it has no preprocessing or not one image input of uint8")


def _check_specs(signature: Mapping[str, Any]) -> None:
    """Check the form and the sizes of inputs and outputs."""
    names = []
    for side in ("inputs", "outputs"):
        for spec in signature[side]:
            check_keys(spec, ("name", "dtype", "shape", "smallest"), f"one of its {side}")
            names.append((side, spec["name"]))
            smallest = spec.get("smallest", {})
            sizes = [smallest.get(dim, 1) if isinstance(dim, str) else dim for dim in spec["shape"]]
            if (elements := count_elements(sizes)) > (most := limit("sample-elements")):
                raise ValueError(f"{spec['name']!r} has {elements} elements, more than {most}")
    if len(set(names)) < len(names):
        raise ValueError("two inputs or two outputs have one name")


def _sides(signature: Signature) -> tuple[tuple[str, tuple[TensorSpec, ...]], ...]:
    return ("input", signature.inputs), ("output", signature.outputs)


def _check_file_table(files: Mapping[str, Mapping[str, Any]]) -> None:
    if len(files) > (most := limit("bundle-files")):
        raise ValueError(f"it lists {len(files)} files, more than {most}")
    for name, entry in files.items():
        if (problem := name_problem(name)) is not None:
            raise ValueError(f"file name {shown(name)} is not a plain path inside the bundle: it {problem}")
        check_keys(entry, ("sha256", "size"), f"the entry of {shown(name)}")
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]) or type(entry["size"]) is not int or entry["size"] < 0:
            raise ValueError(f"the entry of {shown(name)} is not a SHA-256 and a size")
        if entry["size"] > (most := limit("bundle-file-bytes")):
            raise ValueError(f"{shown(name)} has {entry['size']} bytes, more than {most}")
    check_twins((*files, MANIFEST))


def bundle_hint(folder: Path, *, other: str = "") -> str:
    """Return the remedy for a folder that is not a bundle: the newest bundle directly inside, if there is one."""
    inside = sorted(
        (path.parent for path in folder.glob(f"*/{MANIFEST}")), key=lambda path: (len(path.name), path.name)
    )
    if not inside:
        return other or "Give a directory written by bnexport fold-and-export, such as models/bn_lenet/1"
    return f"Did you mean {inside[-1]}?"
