"""Validation of the header of a safetensors file: every byte of data belongs to exactly one tensor.

Source: github.com/huggingface/safetensors, "Format". The data are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

from bnexport.files import Refusal
from bnexport.validation.json_text import parse_json
from bnexport.validation.limits import count_elements, limit, shown

#: Element type -> bits.
WIDTHS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "I64": 64, "U64": 64,
    "F64": 64,
}  # fmt: skip
_METADATA = "__metadata__"


def validate_safetensors(file: BinaryIO) -> Any:
    """Read and check the header; return its JSON value."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise Refusal("is cut off: its header is longer than the file")
    if length > limit("safetensors-header"):
        raise Refusal(f"has a header of {length} bytes, more than {limit('safetensors-header')}")
    header = parse_json(file.read(length), max_bytes=limit("safetensors-header"))
    if not isinstance(header, dict):
        raise Refusal("has a header that is not a table of tensors")
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise Refusal("has metadata that are not strings")
    spans = [_span(name, entry) for name, entry in header.items() if name != _METADATA]
    _check_cover(sorted(spans), size - 8 - length)
    return header


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """Return start and end of a tensor's bytes; the sizes must need exactly these bytes."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Refusal(f"has an entry for {shown(name)} that is not a type, sizes and a place")
    kind, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in WIDTHS:
        raise Refusal(f"has {shown(name)} of the unknown element type {shown(str(kind))}")
    if not isinstance(shape, list) or not isinstance(place, list) or len(place) != 2:
        raise Refusal(f"has an entry for {shown(name)} that is not a type, sizes and a place")
    start, end = place
    if type(start) is not int or type(end) is not int or not 0 <= start <= end:
        raise Refusal(f"has {shown(name)} at an impossible offset")
    needed = count_elements(shape) * WIDTHS[kind] // 8
    if end - start != needed:
        raise Refusal(f"has {end - start} bytes for {shown(name)}; its sizes need {needed}")
    return start, end, name


def _check_cover(spans: list[tuple[int, int, str]], size: int) -> None:
    at = 0
    for start, end, name in spans:
        if start != at:
            what = "overlaps another tensor" if start < at else "leaves a gap in front of it"
            raise Refusal(f"has {shown(name)} at a place that {what}")
        at = end
    if at != size:
        raise Refusal(f"declares tensors of {at} bytes, but has {size}")
