"""The page on the speed of serving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.clock import Spread
from benchmarks.serving.alone import BATCHES
from benchmarks.serving.speed import Sample, Speeds, in_words
from benchmarks.serving.targets import cpu_ratios, infer_share, outcomes, overheads
from benchmarks.serving.venvs import VENVS
from benchmarks.serving.ways import WAYS

_VERDICTS = {True: "**met**", False: "**missed**", None: "**not measured**"}
#: Readings of the memory that are shown, beside the last.
_READINGS = 10


def serving_page(speeds: Speeds, conditions: str) -> Iterator[str]:
    """The document, part by part.

    Args:
        speeds: What was measured.
        conditions: Hardware and versions, as a sentence without its full stop.
    """
    yield "# The speed of serving\n"
    yield (
        "`bnexport serve` beside other servers of the same `model.onnx` (BN-LeNet, one image per request, always the same): "
        "written by `python scripts/benchmark_serving.py`. Every server has one session of one thread of ONNX Runtime on the "
        "CPU and no access log, and runs alone, started anew in each round; all take turns, round after round, and a ratio is "
        "of one round. Before and after its loads each server's answer is compared with ONNX Runtime's own logits; a wrong one "
        "stops the benchmark. CPU time is user and system time of all the server's processes, and depends less on how busy "
        "the cores were than answer times do: the load tool (`wrk`, for gRPC `h2load`, one thread) shares the cores, and "
        "nothing is pinned. FastAPI's endpoint is `async def`, which costs it less than the other usual form. "
        "`wrk` counts a slow answer once more for each request that it held up, so its 99th percentile is the stricter one.\n"
    )
    yield f"{_amount(speeds)} {conditions}. Environments of the other servers: {_peers()}.\n"
    yield "## Targets\n"
    yield "A ratio is the median of the rounds, with its range; the worst one decides.\n"
    for outcome in outcomes(speeds):
        figures = "; ".join(outcome.figures)
        yield f"- {outcome.words}: {figures + ': ' if figures else ''}{_VERDICTS[outcome.met]}."
    yield "\n## Requests per second\n"
    yield from _table(speeds)
    for name, reason in speeds.failed.items():
        yield f"\n{WAYS[name].words}: not measured, {reason}."
    yield from _errors(speeds)
    yield "\n" + _sizes(speeds)
    yield from _path(speeds)
    yield from _memory(speeds)


def _peers() -> str:
    rows = ((name, ", ".join(item.replace("==", " ") for item in items)) for name, items in VENVS.items())
    return "; ".join(f"{name} ({items})" for name, items in rows)


def _amount(speeds: Speeds) -> str:
    """How much was measured, from the loads themselves."""
    loads = [row.load for columns in speeds.samples.values() for rows in columns.values() for row in rows]
    seconds, requests = Spread.of([load.seconds for load in loads]), Spread.of([load.requests for load in loads])
    return (
        f"Rounds: {len(speeds.alone)}; each load took {seconds.low:.1f} to {seconds.high:.1f} s and "
        f"{requests.low:,} to {requests.high:,} requests."
    )


def _table(speeds: Speeds) -> Iterator[str]:
    yield (
        "Requests per second of the best round and of the worst; the other columns are medians of the rounds, and the last is "
        "requests per CPU second over FastAPI's at as many clients.\n"
    )
    yield "| server | clients | requests/s | CPU us/request | p50, us | p99, us | p99 / p50 | x FastAPI |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, columns in speeds.samples.items():
        for clients, rows in columns.items():
            yield f"| {WAYS[name].words} | {clients} | {' | '.join(_cells(speeds, name, clients, rows))} |"


def _cells(speeds: Speeds, name: str, clients: int, rows: Sequence[Sample]) -> Iterator[str]:
    rates = Spread.of([row.load.per_second for row in rows])
    yield f"{rates.high:,.0f} to {rates.low:,.0f}"
    yield f"{Spread.of([row.cpu_us for row in rows]).middle:,.0f}"
    for values in ([row.load.p50_us for row in rows], [row.load.p99_us for row in rows]):
        yield f"{Spread.of(values).middle:,.0f}"
    yield f"{Spread.of([row.load.p99_us / row.load.p50_us for row in rows]).middle:.1f}"
    yield f"{cpu_ratios(speeds, name, 'fastapi', clients).middle:.2f}" if "fastapi" in speeds.samples else "-"


def _errors(speeds: Speeds) -> Iterator[str]:
    for name, columns in speeds.samples.items():
        for clients, rows in columns.items():
            counts: dict[str, int] = {}
            for kind, count in (item for row in rows for item in row.load.errors.items()):
                counts[kind] = counts.get(kind, 0) + count
            if counts:
                told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
                yield f"\n{WAYS[name].words} at {in_words(clients)} had errors, so its figures do not count: {told}."


def _sizes(speeds: Speeds) -> str:
    parts = (f"{WAYS[name].words} {sent:,} and {got:,}" for name, (sent, got) in speeds.sizes.items())
    return f"Bytes of a request's body and of its answer's: {'; '.join(parts)}."


def _path(speeds: Speeds) -> Iterator[str]:
    alone = {size: Spread.of([turn.batches[size] for turn in speeds.alone]) for size in BATCHES}
    rested, pause = (
        Spread.of(values) for values in zip(*((turn.rested, turn.pause) for turn in speeds.alone), strict=True)
    )
    yield "\n## The path of a request\n"
    yield (
        "ONNX Runtime alone, called in a loop by one thread, takes "
        + " and ".join(
            f"{spread.middle:.1f} us of CPU per image in batches of {size}" for size, spread in alone.items()
        )
        + ". The inference of a request is what the server's own counters say, which fewer images in a batch or a busy "
        "machine make longer, but never more than one image takes alone. What is left is the path: protocol, queue, checks.\n"
    )
    yield (
        f"After a pause of {pause.middle:.0f} us ONNX Runtime alone takes {rested.middle:.1f} us ({rested.low:.1f} to "
        f"{rested.high:.1f}) for one image, {rested.middle / alone[1].middle:.1f} times as much as in the loop: the core has "
        "slept, and begins with cold caches. A server with one client sleeps after each answer, and all that it runs costs "
        "more for that, the engine too; the table counts that as path, which is to the server's disadvantage at 1 client.\n"
    )
    yield "| server | clients | CPU us/request | of it inference | path / echo | whole request / echo |"
    yield "|---|---|---|---|---|---|"
    for name, columns in speeds.samples.items():
        if not WAYS[name].counted:
            continue
        for clients, rows in columns.items():
            cpu = Spread.of([row.cpu_us for row in rows])
            turns = zip(rows, speeds.alone, strict=True)
            infer = Spread.of([infer_share(row, alone_then.batches[1]) for row, alone_then in turns])
            path, whole = overheads(speeds, name, clients), cpu_ratios(speeds, "echo", name, clients)
            yield (
                f"| {WAYS[name].words} | {clients} | {cpu.middle:.0f} ({cpu.low:.0f} to {cpu.high:.0f}) | {infer.middle:.1f} | "
                f"{path.middle:.2f} ({path.low:.2f} to {path.high:.2f}) | {whole.middle:.2f} |"
            )


def _memory(speeds: Speeds) -> Iterator[str]:
    yield "\n## Memory\n"
    memory = speeds.memory
    if memory is None:
        yield "Not measured."
        return
    yield (
        "Resident memory of `bnexport serve` under binary requests of 8 clients, first read after a warm-up, then about every "
        f"50,000 requests; its peak was {memory.peak / 2**20:.1f} MiB. Some of the readings:\n"
    )
    yield "| requests | MiB |"
    yield "|---|---|"
    step = max(1, len(memory.requests) // _READINGS)
    shown = sorted({*range(0, len(memory.requests), step), len(memory.requests) - 1})
    for index in shown:
        yield f"| {memory.requests[index]:,} | {memory.resident[index] / 2**20:.1f} |"
