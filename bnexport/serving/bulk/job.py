"""A folder of predictions: plans a job, finds its existing files, and refuses files of another job.

::

    OUT/_job.json             the job: bundle, sources, columns
    OUT/part-00000.parquet    one file per shard, complete or absent

Readers of Parquet folders ignore names that start with _ or a dot.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bnexport.bundle import MANIFEST, Bundle
from bnexport.errors import OutputError, UsageError
from bnexport.files import held, output_errors, refuse_overlap, sha256, write_atomically
from bnexport.optional import one_line
from bnexport.serving.bulk.bulk_request import BulkRequest
from bnexport.serving.bulk.image_sources import Shard, plan
from bnexport.serving.bulk.parquet import rows_in

JOB = "_job.json"
FORMAT = "bnexport-predictions"
FORMAT_VERSION = 2
#: Keys of the description that concern all shards together.
_OF_ALL = ("sources", "fingerprint", "rows", "shards")


@dataclass(frozen=True)
class BulkJob:
    """A bulk prediction."""

    bundle: str  # Directory of the bundle
    out: str  # The folder of predictions
    request: BulkRequest  # Options
    shards: tuple[Shard, ...]  # All shards, in order
    description: dict[str, Any]  # Content of _job.json

    @property
    def rows(self) -> int:
        """Number of rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    def about(self, shard: Shard) -> str:
        """Return the metadata of a shard's file: everything that determines its rows."""
        common = {key: value for key, value in self.description.items() if key not in _OF_ALL}
        mine = {"source": shard.path, "start": shard.start, "rows": shard.rows, "stat": shard.stat}
        return json.dumps(common | mine, sort_keys=True)

    def without_shards(self) -> BulkJob:
        """Return a copy for workers, which receive shards one by one."""
        return replace(self, shards=())

    def missing(self) -> list[Shard]:
        """Return the shards whose file is missing, incomplete, or of another job or a changed source."""
        out = Path(self.out)
        return [shard for shard in self.shards if rows_in(part_file(out, shard), about=self.about(shard)) != shard.rows]


def part_file(out: Path, shard: Shard) -> Path:
    """Return the path of a shard's file."""
    return out / f"part-{shard.number:05d}.parquet"


def make_job(bundle: Bundle, sources: tuple[Path, ...], out: Path, request: BulkRequest) -> BulkJob:
    """Plan a job from its sources without writing anything."""
    refuse_overlap(out, bundle.path)
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise UsageError(f"{out} is inside the source {source}", remedy="Choose a folder outside of it")
    planned = plan(sources, request)
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": bundle.manifest.name,
        "version": bundle.manifest.version,
        "manifest": sha256(bundle.path / MANIFEST),
        "sources": [str(path) for path in sources],
        "fingerprint": planned.fingerprint,
        "rows": sum(shard.rows for shard in planned.shards),
        "shards": len(planned.shards),
        "shard_rows": request.shard_rows,
        "column": request.column,
        "id_column": request.id_column,
        "logits": request.logits,
        "runtime": request.runtime,
    }
    return BulkJob(str(bundle.path), str(out), request, tuple(planned.shards), description)


@contextlib.contextmanager
def folder_of(job: BulkJob) -> Iterator[None]:
    """Lock the folder of predictions, and open it for a job."""
    out = Path(job.out)
    if out.exists() and not out.is_dir():
        raise _no_folder(out)
    with held(out):
        _begin(job, out)
        yield


def _no_folder(out: Path) -> OutputError:
    return OutputError(
        f"{out} is not a folder of predictions", remedy="Choose another folder; --force does not replace this one"
    )


def _begin(job: BulkJob, out: Path) -> None:
    """Begin a job in its locked folder, or resume it."""
    before = _description(out)
    if before == job.description:
        _remove(out.glob(".part-*.part"))  # unfinished files of a killed process
        return
    if before is None and any(out.iterdir()):
        raise _no_folder(out)
    if before is not None:
        if not job.request.force:
            raise OutputError(
                f"{out} contains the predictions of another job: {_difference(before, job.description)}",
                remedy="Choose another folder, or delete the other job's files with --force",
            )
        kept = {part_file(out, shard) for shard in job.shards} - {part_file(out, shard) for shard in job.missing()}
        _remove([*({*out.glob("part-*.parquet")} - kept), *out.glob(".part-*.part")])
    write_atomically(out / JOB, (json.dumps(job.description, indent=1) + "\n").encode())


def _description(out: Path) -> dict[str, Any] | None:
    """Return the content of the folder's _job.json; None without the file."""
    file = out / JOB
    try:
        value = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{file} can't be read: {one_line(error)}", remedy="Choose another folder") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise OutputError(f"{file} was not written by bnexport", remedy="Choose another folder")
    return value


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    key = next(key for key in (*now, *before) if before.get(key) != now.get(key))
    if key == "fingerprint":
        return "a source has changed"
    return f"{key} was {before.get(key)!r}, now {now.get(key)!r}"


def _remove(files: Iterator[Path] | list[Path]) -> None:
    for file in files:
        with output_errors(file):
            file.unlink(missing_ok=True)
