"""Put traffic, right and malformed, on bnexport serve while its processes are killed; print a verdict.

It takes the given seconds, on Linux only; the server runs on a free port of 127.0.0.1. The exit code is 0 if every demand is
met, else 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.command import finish, options, progress
from benchmarks.soak.clients import ACTIONS, LOST, RIGHT, WRONG, Fault
from benchmarks.soak.soak import Soak, SoakSettings, run_soak
from benchmarks.soak.traffic import KINDS
from bnexport.bundle import Bundle
from bnexport.environment import describe, environment
from bnexport.files import write_atomically

#: Faults per demand that are printed.
_SHOWN = 5


def unexplained(soak: Soak) -> list[Fault]:
    """Return the lost requests on connections of no killed process."""
    return [fault for fault in soak.ledger.lost if not any(kill.explains(fault) for kill in soak.kills)]


def _wrong(soak: Soak) -> Iterator[str]:
    for fault in soak.ledger.wrong:
        yield f"{fault.kind}: {fault.reason}"


def _lost(soak: Soak) -> Iterator[str]:
    for fault in unexplained(soak):
        before = [kill for kill in soak.kills if kill.begun <= fault.ended]
        since = whose = ""
        if before:
            since = f", {fault.started - before[-1].done:+.3f} s after process {before[-1].process} was gone"
            whose = ", of its connections" if fault.port in before[-1].ports else ", not its connection"
        yield f"{fault.kind}: {fault.reason}{since}{whose}"
    if more := soak.ledger.outcomes(LOST) - len(soak.ledger.lost):
        yield f"{more} more, without details"


def _recovered(soak: Soak) -> Iterator[str]:
    for kill in soak.kills:
        if kill.recovery is None:
            yield f"process {kill.process} (pid {kill.pid}) was not replaced"


def _killed(soak: Soak) -> Iterator[str]:
    every = soak.settings.kill_every
    if every is not None and soak.settings.seconds > 2 * every and not soak.kills:
        yield "no process was killed, so the effect of a kill is unknown"


def _asked(soak: Soak) -> Iterator[str]:
    for kind in (*KINDS, *(name for name in ACTIONS if name != "good")):
        if not soak.ledger.counts[kind, RIGHT]:
            yield f"no request of the kind {kind!r} got its answer"


def _stopped(soak: Soak) -> Iterator[str]:
    if soak.exit_code != 0:
        yield "it did not stop in time" if soak.exit_code is None else f"it stopped with exit code {soak.exit_code}"
    for pid in soak.left:
        yield f"process {pid} was still there after the stop"
    if soak.stuck:
        yield f"{soak.stuck} clients got no answer"


#: Demand -> its violations, one sentence each.
DEMANDS: dict[str, Callable[[Soak], Iterator[str]]] = {
    "every answer is the right one": _wrong,
    "no request is lost except on the connections of a killed process": _lost,
    "counters never fall": lambda soak: iter(soak.ledger.fallen),
    "processes were killed": _killed,
    "every killed process is replaced": _recovered,
    "no process dies by itself": lambda soak: iter(soak.died),
    "every kind of request was answered": _asked,
    "it stops on SIGTERM, and no process is left": _stopped,
}


def verdict(soak: Soak) -> dict[str, list[str]]:
    """Return demand -> its violations; the soak passes if all lists are empty."""
    return {name: list(broken(soak)) for name, broken in DEMANDS.items()}


def lines(soak: Soak) -> Iterator[str]:
    """Yield the outcome for a terminal."""
    ledger, found = soak.ledger, verdict(soak)
    yield f"{'requests':<14}{'right':>10}{'wrong':>8}{'no answer':>11}"
    for kind in dict.fromkeys(kind for kind, _ in ledger.counts):
        right, wrong, lost = (ledger.counts[kind, outcome] for outcome in (RIGHT, WRONG, LOST))
        yield f"{kind:<14}{right:>10}{wrong:>8}{lost:>11}"
    total = sum(ledger.counts.values())
    yield f"{total} requests in {soak.seconds:.0f} s; {len(ledger.lost) - len(unexplained(soak))} lost in kills"
    if soak.kills:
        times = sorted(kill.recovery for kill in soak.kills if kill.recovery is not None)
        took = f"{times[0]:.2f} to {times[-1]:.2f} s (median {times[len(times) // 2]:.2f})" if times else "never"
        counts = [len(kill.ports) for kill in soak.kills]
        yield f"{len(counts)} kills, {min(counts)} to {max(counts)} connections each; replaced after {took}"
    for memory in soak.memory.values():
        first, last, most = (size / 2**20 for size in (memory.first, memory.last, memory.most))
        yield f"process {memory.process}, pid {memory.pid}: {first:.1f} MiB at first, {last:.1f} at last, {most:.1f} at most"
    for demand, broken in found.items():
        yield f"{'FAIL' if broken else 'PASS'}  {demand}" + (f" ({len(broken)} times not)" if broken else "")
        yield from (f"      {reason}" for reason in broken[:_SHOWN])
    yield "Verdict: FAIL" if any(found.values()) else "Verdict: PASS"


def to_json(soak: Soak) -> dict[str, Any]:
    """Return everything as plain JSON values."""
    found = verdict(soak)
    return {
        "passed": not any(found.values()),
        "settings": asdict(soak.settings),
        "seconds": soak.seconds,
        "counts": [[kind, outcome, count] for (kind, outcome), count in sorted(soak.ledger.counts.items())],
        "demands": found,
        "lost": [asdict(fault) | {"explained": fault not in unexplained(soak)} for fault in soak.ledger.lost],
        "kills": [asdict(kill) | {"ports": sorted(kill.ports)} for kill in soak.kills],
        "memory": [asdict(memory) for memory in soak.memory.values()],
        "exit_code": soak.exit_code,
    }


def main() -> int:
    """Soak, and print the verdict."""
    parser = options("soak", __doc__)
    parser.add_argument("bundle", nargs="?", default="models/bn_lenet/1")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds, on average")
    parser.add_argument("--out", type=Path, help="write all results to this file as JSON")
    given = vars(parser.parse_args())
    out, bundle = given.pop("out"), Bundle.open(given.pop("bundle"))
    soak = run_soak(bundle, SoakSettings(**given), on_line=progress)
    print("\n".join([*lines(soak), describe(environment())]))
    found = to_json(soak) | {"environment": environment()}
    if out is not None:
        write_atomically(out, json.dumps(found, indent=1).encode())
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    finish("soak", main)
