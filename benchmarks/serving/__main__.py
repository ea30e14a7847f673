"""Measure the speed of serving next to other servers of the same model, in turn; write docs/results/serving_speed.md.

It needs wrk, and for gRPC h2load (apt-get install wrk nghttp2-client); pip installs other servers into separate environments.
It takes about half an hour, on an idle machine. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clock import Spread
from benchmarks.command import finish, known, options, progress
from benchmarks.pages import ranged, render, write_page
from benchmarks.serving.alone import BATCHES
from benchmarks.serving.servers import VENVS, WAYS, default_folder
from benchmarks.serving.speed import Sample, ServingPlan, ServingSpeeds, in_words, measure
from bnexport.environment import describe, environment

#: Rows of bnexport whose answer times are judged; two processes and the load tool are too much for two cores.
JUDGED = ("binary", "json", "grpc")
_TAIL_CLIENTS = 8
_VERDICTS = {True: "**met**", False: "**missed**", None: "**not measured**"}
#: Readings of the memory on the page, in addition to the last.
_READINGS = 10


@dataclass(frozen=True)
class TargetOutcome:
    """One target in one run."""

    words: str
    figures: Sequence[str]  # each a part of a sentence
    met: bool | None  # None: not measured


def outcomes(speeds: ServingSpeeds) -> tuple[TargetOutcome, ...]:
    """Judge every target, in the order of ``TARGETS``."""
    return tuple(judge(speeds) for judge in TARGETS)


def infer_share(sample: Sample, alone_us: float) -> float:
    """Return the microseconds of inference in a request's CPU time.

    The server's own counter is wall time, which a busy machine makes longer; it counts at most as one image alone.
    """
    return alone_us if sample.infer_us is None else min(sample.infer_us, alone_us)


def overheads(speeds: ServingSpeeds, name: str, clients: int) -> Spread:
    """Return CPU time of a request without inference over that of the echo's, one ratio per round."""
    echo, rows = speeds.samples["echo"][clients], speeds.samples[name][clients]
    turns = zip(rows, echo, speeds.alone, strict=True)
    return Spread.of([(row.cpu_us - infer_share(row, alone.batches[1])) / bare.cpu_us for row, bare, alone in turns])


def cpu_ratios(speeds: ServingSpeeds, name: str, other: str, clients: int) -> Spread:
    """Return requests per CPU second over another server's, one ratio per round."""
    ours, theirs = ((row.cpu_us for row in speeds.samples[each][clients]) for each in (name, other))
    return Spread.ratio(theirs, ours)


def _clean(speeds: ServingSpeeds, *names: str) -> bool:
    """Return True if no request of these servers failed: a server with errors does not meet a target."""
    return not any(sample.load.errors for name in names for rows in speeds.samples[name].values() for sample in rows)


def _judged(
    words: str, found: Mapping[str, Spread], reached: Callable[[float], bool], *, clean: bool, aside: Mapping[str, str]
) -> TargetOutcome:
    """Judge the worst of some medians; a figure that misses the target has the note of ``aside``."""
    missed = {
        where: f" (missed{aside.get(where, '')})" for where, spread in found.items() if not reached(spread.middle)
    }
    figures = tuple(f"{ranged(spread)} {where}{missed.get(where, '')}" for where, spread in found.items())
    return TargetOutcome(words, figures, clean and not missed if found else None)


def _faster(speeds: ServingSpeeds) -> TargetOutcome:
    words = "Binary tensors: at least 6 times the requests per CPU second of FastAPI with JSON"
    if "fastapi" not in speeds.samples:
        return TargetOutcome(words, (), None)
    counts = {f"at {in_words(n)}": n for n in speeds.samples["binary"]}
    found = {where: cpu_ratios(speeds, "binary", "fastapi", n) for where, n in counts.items()}
    # The echo is the bound: no inference, no protocol.
    echo = {
        where: f"; the echo has {cpu_ratios(speeds, 'echo', 'fastapi', n).middle:.2f}" for where, n in counts.items()
    }
    return _judged(words, found, lambda ratio: ratio >= 6.0, clean=_clean(speeds, "binary", "fastapi"), aside=echo)


def _tail(speeds: ServingSpeeds) -> TargetOutcome:
    words = f"99th percentile at {_TAIL_CLIENTS} clients below 3 times the median"
    judged = {name: rows for name in JUDGED if (rows := speeds.samples.get(name, {}).get(_TAIL_CLIENTS))}
    found = {f"for {WAYS[name].words}": _tails(rows) for name, rows in judged.items()}
    return _judged(words, found, lambda ratio: ratio < 3.0, clean=_clean(speeds, *judged), aside={})


def _tails(rows: Sequence[Sample]) -> Spread:
    return Spread.ratio((row.load.p99_us for row in rows), (row.load.p50_us for row in rows))


def _overhead(speeds: ServingSpeeds) -> TargetOutcome:
    words = "CPU time of a binary request without inference at most 1.5 times that of a bare ASGI echo of the same body"
    found = {f"at {in_words(n)}": overheads(speeds, "binary", n) for n in speeds.samples["binary"]}
    return _judged(words, found, lambda ratio: ratio <= 1.5, clean=_clean(speeds, "binary", "echo"), aside={})


def _memory(speeds: ServingSpeeds) -> TargetOutcome:
    words = "Memory flat within 5 % over 1 million requests"
    memory = speeds.memory
    if memory is None:
        return TargetOutcome(words, (), None)
    first, last = memory.resident[0] / 2**20, memory.resident[-1] / 2**20
    grown = f"{memory.growth:+.1%} over {memory.requests[-1]:,} requests ({first:.1f} to {last:.1f} MiB)"
    return TargetOutcome(words, (grown,), memory.growth <= 0.05 if memory.requests[-1] >= 1_000_000 else None)


#: Target -> outcome.
TARGETS: tuple[Callable[[ServingSpeeds], TargetOutcome], ...] = (_faster, _tail, _overhead, _memory)


def serving_page(speeds: ServingSpeeds, conditions: str) -> str:
    """Return the page; ``conditions``: hardware and versions as a sentence without its full stop."""
    loads = [row.load for columns in speeds.samples.values() for rows in columns.values() for row in rows]
    return render(
        "serving/page.md.jinja", speeds=speeds, conditions=conditions, rounds=len(speeds.alone), ways=WAYS,
        seconds=Spread.of([load.seconds for load in loads]), requests=Spread.of([load.requests for load in loads]),
        venvs={name: ", ".join(items).replace("==", " ") for name, items in VENVS.items()},
        targets=[(each.words, "; ".join(each.figures), _VERDICTS[each.met]) for each in outcomes(speeds)],
        speed_rows=[_speed_cells(speeds, *place) for place in _places(speeds)],
        path_rows=[_path_cells(speeds, *place) for place in _places(speeds) if WAYS[place[0]].counted],
        errors=list(_errors(speeds)), memory_rows=_memory_rows(speeds),
        alone={size: Spread.of([turn.batches[size] for turn in speeds.alone]) for size in BATCHES},
        rested=Spread.of([turn.rested for turn in speeds.alone]), pause=Spread.of([turn.pause for turn in speeds.alone]),
    )  # fmt: skip


def _places(speeds: ServingSpeeds) -> list[tuple[str, int, Sequence[Sample]]]:
    return [(name, clients, rows) for name, columns in speeds.samples.items() for clients, rows in columns.items()]


def _speed_cells(speeds: ServingSpeeds, name: str, clients: int, rows: Sequence[Sample]) -> list[object]:
    rates = Spread.of([row.load.per_second for row in rows])
    values = ([row.cpu_us for row in rows], [row.load.p50_us for row in rows], [row.load.p99_us for row in rows])
    share = f"{cpu_ratios(speeds, name, 'fastapi', clients).middle:.2f}" if "fastapi" in speeds.samples else "-"
    middles = (f"{Spread.of(found).middle:,.0f}" for found in values)
    cells = [f"{rates.high:,.0f} to {rates.low:,.0f}", *middles, f"{_tails(rows).middle:.1f}", share]
    return [WAYS[name].words, clients, *cells]


def _path_cells(speeds: ServingSpeeds, name: str, clients: int, rows: Sequence[Sample]) -> list[object]:
    turns = zip(rows, speeds.alone, strict=True)
    infer = Spread.of([infer_share(row, alone.batches[1]) for row, alone in turns])
    path, whole = overheads(speeds, name, clients), cpu_ratios(speeds, "echo", name, clients)
    cpu = ranged(Spread.of([row.cpu_us for row in rows]), 0)
    return [WAYS[name].words, clients, cpu, f"{infer.middle:.1f}", ranged(path), f"{whole.middle:.2f}"]


def _errors(speeds: ServingSpeeds) -> Iterator[str]:
    for name, clients, rows in _places(speeds):
        counts: Counter[str] = Counter()
        for row in rows:
            counts.update(row.load.errors)
        if counts:
            parts = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            yield f"{WAYS[name].words} at {in_words(clients)} had errors, so its figures do not count: {parts}."


def _memory_rows(speeds: ServingSpeeds) -> list[list[str]]:
    if (memory := speeds.memory) is None:
        return []
    count = len(memory.requests)
    shown = sorted({*range(0, count, max(1, count // _READINGS)), count - 1})
    return [[f"{memory.requests[index]:,}", f"{memory.resident[index] / 2**20:.1f}"] for index in shown]


def main() -> int:
    """Measure, write the page, and judge the targets."""
    parser = options("serving", __doc__)
    parser.add_argument("servers", nargs="*", metavar="SERVER", help=f"of {', '.join(WAYS)}; default all")
    parser.add_argument("--out", type=Path, default=Path("docs/results/serving_speed.md"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2, help="duration of each load")
    parser.add_argument("--memory-requests", type=int, default=1_000_000, help="0 leaves the memory out")
    parser.add_argument(
        "--venvs", type=Path, default=default_folder(), help="folder of the other servers' environments"
    )
    parser.add_argument("--bundle", type=Path, default=Path("models/bn_lenet/1"))
    parser.add_argument("--note", default="", help="more conditions for the reader")
    given = parser.parse_args()
    servers = known(parser, given.servers, list(WAYS), "server")
    if min(given.rounds, given.seconds) < 1:
        parser.error("rounds and seconds start at 1")
    plan = ServingPlan(given.bundle, given.venvs.resolve(), given.rounds, given.seconds, given.memory_requests)
    speeds = measure(servers, plan, on_line=progress)
    write_page([serving_page(speeds, f"{describe(environment())}. {given.note}".rstrip(". "))], given.out)
    return int(any(outcome.met is False for outcome in outcomes(speeds)))


if __name__ == "__main__":
    finish("serving", main)
