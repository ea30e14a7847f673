"""Reads columns of image bytes and writes predictions as Parquet, with pyarrow (extra ``parquet``)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnexport.errors import DataError
from bnexport.optional import one_line, require
from bnexport.serving.bulk.bulk_request import BulkRequest
from bnexport.serving.predictor import softmax
from bnexport.tensors import Array

_REMEDY = "Give Parquet with the bytes of PNG, JPEG, BMP, WebP or GIF files in a binary column, named with --column"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a ``pyarrow.parquet.ParquetFile``."""
    arrow, parquet = _arrow(), require("pyarrow.parquet", purpose="Parquet")
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (OSError, arrow.ArrowException) as error:
        raise DataError(
            f"{path} is not a Parquet file that pyarrow can read: {one_line(error)}", remedy=_REMEDY
        ) from error


def _arrow() -> Any:
    return require("pyarrow", purpose="Parquet")


def check_columns(path: Path, schema: Any, request: BulkRequest) -> None:
    """Refuse a file without a column of bytes, or of structs with a field "bytes" as Hugging Face writes them."""
    names = ", ".join(map(repr, schema.names)) or "none"
    for name in (request.column, request.id_column):
        if name is not None and name not in schema.names:
            raise DataError(
                f"{path} has no column {name!r}, only {names}", remedy="Name one with --column or --id-column"
            )
        if schema.names.count(name) > 1:
            raise DataError(f"{path} has several columns {name!r}", remedy="Give each column a different name")
    kind = schema.field(request.column).type
    if not _is_binary(kind) and not (_arrow().types.is_struct(kind) and _has_bytes(kind)):
        raise DataError(f"{path}: column {request.column!r} is {kind}, expected bytes", remedy=_REMEDY)
    if request.id_column is not None and not _is_plain(kind := schema.field(request.id_column).type):
        raise DataError(
            f"{path}: column {request.id_column!r} is {kind}, expected text or numbers",
            remedy="Name another column with --id-column, or omit the option",
        )


def _is_binary(kind: Any) -> bool:
    types = _arrow().types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_plain(kind: Any) -> bool:
    """Return True for a type whose values have an unambiguous text form."""
    return not (_is_binary(kind) or _arrow().types.is_fixed_size_binary(kind) or _arrow().types.is_nested(kind))


def _has_bytes(kind: Any) -> bool:
    index = kind.get_field_index("bytes")
    return index >= 0 and _is_binary(kind.field(index).type)


def encoded_images(
    path: Path, request: BulkRequest, *, row_groups: Sequence[int], start: int
) -> Iterator[tuple[list[str], list[bytes | None]]]:
    """Yield ids and image bytes of row groups, in batches; None for a row without an image."""
    columns = [name for name in (request.column, request.id_column) if name is not None]
    row = start
    with opened(path) as file:
        for batch in file.iter_batches(request.rows_read(), row_groups=list(row_groups), columns=columns):
            column = batch.column(request.column)
            if _arrow().types.is_struct(column.type):
                column = column.field("bytes")
            if request.id_column is None:
                ids = [f"{path}[{number}]" for number in range(row, row + len(column))]
            else:
                ids = _ids(path, row, batch.column(request.id_column))
            row += len(column)
            yield ids, column.to_pylist()


def _ids(path: Path, start: int, column: Any) -> list[str]:
    try:
        values = column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} has ids that are not UTF-8: {one_line(error)}", remedy="Write the ids as UTF-8"
        ) from error
    if None in values:
        raise DataError(f"{path}[{start + values.index(None)}] has no id", remedy="Remove rows without an id")
    return [str(value) for value in values]


def encode(ids: Sequence[str], logits: Array, *, labels: Sequence[str], keep_logits: bool, about: str) -> bytes:
    """Return predictions as the bytes of a Parquet file.

    Columns: ``id`` and ``label`` (string), ``probabilities`` (float32, one per class), and ``logits`` if requested.
    """
    arrow, parquet = _arrow(), require("pyarrow.parquet", purpose="Parquet")
    # With the classes first, numpy adds whole rows, which takes a sixth of the time.
    probabilities = softmax(np.ascontiguousarray(logits.T), axis=0).T.astype(np.float32, order="C")
    classes = logits.shape[1]
    chosen = arrow.array(logits.argmax(1).astype(np.int32))
    columns = {
        "id": arrow.array(ids, arrow.string()),
        "label": arrow.array(list(labels), arrow.string()).take(chosen),
        "probabilities": arrow.FixedSizeListArray.from_arrays(arrow.array(probabilities.ravel()), classes),
    }
    if keep_logits:
        columns["logits"] = arrow.FixedSizeListArray.from_arrays(arrow.array(logits.ravel()), classes)
    table = arrow.table(columns).replace_schema_metadata({"bnexport": about})
    file = io.BytesIO()
    # Dictionaries and stronger compression only cost time: probabilities and logits are noise to them.
    parquet.write_table(table, file, use_dictionary=["label"], compression="snappy")
    return file.getvalue()


def rows_in(path: Path, *, about: str) -> int | None:
    """Return the rows of a written file from its footer; None if it is incomplete or has another ``about``."""
    arrow, parquet = _arrow(), require("pyarrow.parquet", purpose="Parquet")
    try:
        with path.open("rb") as file:  # pyarrow would try a missing path as a URL
            footer = parquet.read_metadata(file)
    except (OSError, arrow.ArrowException):
        return None
    return int(footer.num_rows) if (footer.metadata or {}).get(b"bnexport") == about.encode() else None
