"""Progress of a long job: the name of the stage, and the share of the job that is done."""

from __future__ import annotations

from collections.abc import Callable

#: Called before each step: the stage's name ("tracing"), the work done so far, and the work in all, in any unit.
Progress = Callable[[str, float, float], None]


def silent(_stage: str, _done: float, _total: float) -> None:
    """Report nothing."""


def part_of(progress: Progress, start: float, end: float) -> Progress:
    """Return the progress of a part that takes a job from ``start`` to ``end``, as shares of 1; its calls count from 0."""

    def report(stage: str, done: float, total: float) -> None:
        progress(stage, start + (end - start) * min(done / total, 1.0) if total else start, 1.0)

    return report
