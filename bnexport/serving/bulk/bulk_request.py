"""Options of a bulk prediction, and the listener of its progress."""

from __future__ import annotations

from dataclasses import dataclass

from bnexport.environment import available_cores
from bnexport.errors import UsageError
from bnexport.runtimes.catalogue import DEFAULT_RUNTIME, runner_spec
from bnexport.tuned import Choice

#: Rows that are read at once, and the images of one call, unless options or tuned.json set other numbers.
_ROWS = 256


@dataclass(frozen=True)
class BulkRequest:
    """Options of a bulk prediction."""

    column: str = "image"  # Column of the images in Parquet files, and name of the array in .npz files
    id_column: str | None = None  # Column of the rows' ids in Parquet files; None uses file name and row number
    logits: bool = False  # Write the raw logits in addition to the probabilities
    runtime: str = DEFAULT_RUNTIME  # A name from ``runtimes.catalogue.RUNNERS``
    batch_size: int | None = None  # Images per call of the engine; None uses 256, or the number in tuned.json
    shard_rows: int = 10_000  # Rows of one written file, and the most that a killed process loses
    # Processes (local) or actors (Ray), each with one session; None uses tuned.json, one per core, or one on a GPU
    workers: int | None = None
    tuning: Choice | None = None  # Numbers of the bundle's tuned.json, for options that are None
    force: bool = False  # Delete another job's files, except those with exactly the rows of this job

    def __post_init__(self) -> None:
        runner_spec(self.runtime)
        for what, value in (
            ("the batch size", 1 if self.batch_size is None else self.batch_size),
            ("the rows of a shard", self.shard_rows),
            ("the number of workers", 1 if self.workers is None else self.workers),
        ):
            if value < 1:
                raise UsageError(f"{what} can't be {value}", remedy="Give at least 1")

    def resolved_batch(self) -> int:
        """Return the number of images per call of the engine."""
        return self.batch_size or (self.tuning.batch if self.tuning else _ROWS)

    def rows_read(self) -> int:
        """Return the number of rows that are read at once; about 256 rows for the small batches of a tuning."""
        batch = self.resolved_batch()
        return batch if self.batch_size else batch * max(1, _ROWS // batch)

    def resolved_threads(self) -> int:
        """Return the number of threads of one session; ``workers`` counts sessions of one thread."""
        return self.tuning.threads if self.tuning and self.workers is None else 1

    def resolved_workers(self) -> int:
        """Return the number of workers."""
        if self.workers is not None:
            return self.workers
        if self.tuning is not None:
            return self.tuning.sessions
        return available_cores() if runner_spec(self.runtime).device == "cpu" else 1


class BulkProgress:
    """Listener of a bulk prediction. Its methods do nothing; override any of them."""

    def on_tuning(self, line: str) -> None:
        """Receive what was applied of the bundle's tuned.json, or the reason why it does not apply."""

    def on_start(self, rows: int, done: int, workers: int) -> None:
        """Receive the number of rows, the rows that an earlier run has written, and the number of workers."""

    def on_shard(self, rows: int) -> None:
        """Receive the number of rows of a newly written file."""
