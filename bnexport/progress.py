"""Progress of a long job: the name of the stage, and the finished share of the job."""

from __future__ import annotations

from collections.abc import Callable

#: Called before each step with the stage's name ("tracing"), the finished work and the total work, in any unit.
Progress = Callable[[str, float, float], None]


def silent(_stage: str, _done: float, _total: float) -> None:
    """Report nothing."""


def part_of(progress: Progress, start: float, end: float) -> Progress:
    """Return a function that maps a part's progress to the range ``start`` to ``end``, shares of 1, of the whole job."""

    def report(stage: str, done: float, total: float) -> None:
        progress(stage, start + (end - start) * min(done / total, 1.0) if total else start, 1.0)

    return report
