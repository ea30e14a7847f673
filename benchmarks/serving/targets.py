"""What serving should reach, and whether it did: each target from the figures of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.clock import Spread
from benchmarks.serving.speed import Sample, Speeds, in_words
from benchmarks.serving.ways import WAYS

#: Rows of bnexport whose answer times are judged. Two processes beside the load tool are more than two cores hold.
JUDGED = ("binary", "json", "grpc")
_TAIL_CLIENTS = 8


@dataclass(frozen=True)
class Outcome:
    """One target in one run.

    Attributes:
        words: What is asked for.
        figures: What was found, each as a part of a sentence.
        met: Whether all of it is reached; None when it was not measured.
    """

    words: str
    figures: Sequence[str]
    met: bool | None


def outcomes(speeds: Speeds) -> tuple[Outcome, ...]:
    """Every target, in the order of ``TARGETS``."""
    return tuple(judge(speeds) for judge in TARGETS)


def infer_share(sample: Sample, alone_us: float) -> float:
    """CPU time of a request that is inference, in microseconds.

    The server's own counter is wall time, which a busy machine makes longer; it counts for no more than one image alone takes.
    """
    return alone_us if sample.infer_us is None else min(sample.infer_us, alone_us)


def overheads(speeds: Speeds, name: str, clients: int) -> Spread:
    """CPU time of a request without inference, over that of the echo's, one ratio per round."""
    echo, rows = speeds.samples["echo"][clients], speeds.samples[name][clients]
    turns = zip(rows, echo, speeds.alone, strict=True)
    return Spread.of([(row.cpu_us - infer_share(row, alone.batches[1])) / bare.cpu_us for row, bare, alone in turns])


def cpu_ratios(speeds: Speeds, name: str, other: str, clients: int) -> Spread:
    """Requests per CPU second over another server's, one ratio per round."""
    pairs = zip(speeds.samples[name][clients], speeds.samples[other][clients], strict=True)
    return Spread.of([theirs.cpu_us / ours.cpu_us for ours, theirs in pairs])


def _ranged(spread: Spread) -> str:
    return f"{spread.middle:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _clean(speeds: Speeds, *names: str) -> bool:
    """Whether every request of these servers was answered well: a server that errs may not be called fast."""
    return not any(sample.load.errors for name in names for rows in speeds.samples[name].values() for sample in rows)


def _each(spreads: Mapping[int, Spread], reached: Callable[[float], bool], aside: Mapping[int, str]) -> Iterator[str]:
    """A figure for each count of clients; one that misses says so, with what ``aside`` has to say of it."""
    for count, spread in spreads.items():
        missed = "" if reached(spread.middle) else f" (missed{aside.get(count, '')})"
        yield f"{_ranged(spread)} at {in_words(count)}{missed}"


def _faster(speeds: Speeds) -> Outcome:
    words = "Binary tensors: at least 6 times the requests per CPU second of FastAPI with JSON"
    if "fastapi" not in speeds.samples:
        return Outcome(words, (), None)
    found = {n: cpu_ratios(speeds, "binary", "fastapi", n) for n in speeds.samples["binary"]}
    met = min(spread.middle for spread in found.values()) >= 6.0
    # How much of the way there is without any inference, and without a protocol.
    echo = {n: f"; the echo has {cpu_ratios(speeds, 'echo', 'fastapi', n).middle:.2f}" for n in found}
    figures = tuple(_each(found, lambda ratio: ratio >= 6.0, echo))
    return Outcome(words, figures, met and _clean(speeds, "binary", "fastapi"))


def _tail(speeds: Speeds) -> Outcome:
    words = f"99th percentile at {_TAIL_CLIENTS} clients below 3 times the median"
    found: dict[str, Spread] = {}
    for name in JUDGED:
        if rows := speeds.samples.get(name, {}).get(_TAIL_CLIENTS):
            found[name] = Spread.of([row.load.p99_us / row.load.p50_us for row in rows])
    if not found:
        return Outcome(words, (), None)
    figures = tuple(f"{_ranged(spread)} for {WAYS[name].words}" for name, spread in found.items())
    met = max(spread.middle for spread in found.values()) < 3.0
    return Outcome(words, figures, met and _clean(speeds, *found))


def _overhead(speeds: Speeds) -> Outcome:
    words = "CPU time of a binary request without inference at most 1.5 times that of a bare ASGI echo of the same body"
    found = {n: overheads(speeds, "binary", n) for n in speeds.samples["binary"]}
    met = max(spread.middle for spread in found.values()) <= 1.5
    figures = tuple(_each(found, lambda ratio: ratio <= 1.5, {}))
    return Outcome(words, figures, met and _clean(speeds, "binary", "echo"))


def _memory(speeds: Speeds) -> Outcome:
    words = "Memory flat within 5 % over 1 million requests"
    memory = speeds.memory
    if memory is None or memory.requests[-1] < 1_000_000:
        return Outcome(words, () if memory is None else (_grown(speeds),), None)
    return Outcome(words, (_grown(speeds),), memory.growth <= 0.05)


def _grown(speeds: Speeds) -> str:
    assert speeds.memory is not None
    memory = speeds.memory
    first, last = memory.resident[0] / 2**20, memory.resident[-1] / 2**20
    return f"{memory.growth:+.1%} over {memory.requests[-1]:,} requests ({first:.1f} to {last:.1f} MiB)"


#: Target -> outcome.
TARGETS: tuple[Callable[[Speeds], Outcome], ...] = (_faster, _tail, _overhead, _memory)
