"""ONNX versions that servers can load: Triton's releases, their ONNX Runtime, and its newest operator set and format."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bnexport.errors import ExportError, UsageError
from bnexport.onnx_files.models import read_screened
from bnexport.protobuf_wire import Field, read_fields


class Reads(NamedTuple):
    """The newest versions that an ONNX Runtime reads."""

    opset: int  # Version of the default operator set
    ir_version: int  # Version of the file format


#: Minor version of ONNX Runtime -> newest versions. Measured: one Relu in every operator set and file format, loaded by the
#: wheel of that version on a CPU. 1.14 has no wheel for a supported Python, so its row follows from its ONNX version.
ONNX_RUNTIMES: dict[str, Reads] = {
    "1.14": Reads(18, 8),
    "1.15": Reads(19, 9),
    "1.16": Reads(19, 9),
    "1.17": Reads(20, 9),
    "1.18": Reads(21, 10),
    "1.19": Reads(21, 10),
    "1.20": Reads(21, 10),
    "1.21": Reads(22, 10),
    "1.22": Reads(22, 10),
    "1.23": Reads(23, 11),
    "1.24": Reads(25, 13),
    "1.27": Reads(26, 13),
    "1.28": Reads(26, 13),
}
#: Release of Triton Inference Server -> its ONNX Runtime, newest first ("Release Compatibility Matrix" in Triton's
#: documentation; 23.04: the README of its ONNX Runtime backend).
TRITON_RELEASES: dict[str, str] = {
    "26.08": "1.28.0", "26.07": "1.27.0", "26.06": "1.24.4", "26.05": "1.24.4", "26.04": "1.24.4", "26.03": "1.24.2",
    "26.02": "1.24.1", "26.01": "1.23.2", "25.12": "1.23.2", "25.11": "1.23.2", "25.10": "1.23.1", "25.09": "1.23.0",
    "25.08": "1.23.0", "25.07": "1.22.0", "25.06": "1.22.0", "25.05": "1.22.0", "25.04": "1.21.0", "25.03": "1.21.0",
    "25.02": "1.20.1", "25.01": "1.20.1", "24.12": "1.20.1", "24.11": "1.19.2", "24.10": "1.19.2", "24.09": "1.19.2",
    "24.08": "1.18.1", "24.07": "1.18.1", "24.06": "1.18.0", "24.05": "1.18.0", "24.04": "1.17.3", "23.04": "1.14.1",
}  # fmt: skip
DEFAULT_RELEASE = next(iter(TRITON_RELEASES))
_IR_VERSION, _OPSET_IMPORT = 1, 8
_DOMAIN, _VERSION = 1, 2


def release_reads(release: str) -> Reads:
    """Return the newest versions that a release of Triton reads."""
    if release not in TRITON_RELEASES:
        raise UsageError(
            f"the Triton release {release!r} is not in bnexport's table",
            remedy=f"Choose the next older one: {DEFAULT_RELEASE} down to {list(TRITON_RELEASES)[-1]}, such as 24.05",
        )
    return ONNX_RUNTIMES[TRITON_RELEASES[release].rpartition(".")[0]]


def file_versions(file: Path) -> Reads:
    """Return the operator set and the file format of an ONNX file; needs neither onnx nor an engine."""
    content = read_screened(file)
    ir_version = opset = 0
    for field in read_fields(content, 0, len(content)):
        if field.number == _IR_VERSION:
            ir_version = field.value
        elif field.number == _OPSET_IMPORT:
            domain, version = _operator_set(content, field)
            opset = version if domain in ("", "ai.onnx") else opset
    if not opset or not ir_version:
        raise ExportError(f"{file} does not declare its operator set and file format", remedy="Export the model again")
    return Reads(opset, ir_version)


def _operator_set(content: bytes, field: Field) -> tuple[str, int]:
    found = {inner.number: inner for inner in read_fields(content, field.start, field.end)}
    domain = found.get(_DOMAIN)
    text = "" if domain is None else content[domain.start : domain.end].decode("utf-8", "replace")
    return text, found[_VERSION].value if _VERSION in found else 0


def check_loads(file: Path, release: str, *, from_onnx: bool = False) -> Reads:
    """Return an ONNX file's versions; ExportError for a file that a release of Triton can't load."""
    able, has = release_reads(release), file_versions(file)
    engine = f"Triton {release} (ONNX Runtime {TRITON_RELEASES[release]})"
    opset, ir_version = min(has.opset, able.opset), min(has.ir_version, able.ir_version)
    again = f"Export it again with bnexport fold-and-export --opset {opset} --ir-version {ir_version}"
    if from_onnx:
        again = (
            f"Convert its source to operator set {opset} with onnx.version_converter, save it with IR version {ir_version}"
            " and export it again"
        )
    remedy = f"{again}, or choose a newer release with --triton"
    for what, found, most in (("operator set", has.opset, able.opset), ("IR version", has.ir_version, able.ir_version)):
        if found > most:
            raise ExportError(f"{file} has {what} {found}, and {engine} reads {what}s up to {most}", remedy=remedy)
    return has
