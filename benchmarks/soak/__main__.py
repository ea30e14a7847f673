"""Put traffic, right and malformed, on bnexport serve while its processes are killed; print a verdict.

It takes the given seconds, on Linux only; the server runs on a free port of 127.0.0.1. The exit code is 0 if every demand is
met, else 1.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.command import finish, options, progress
from benchmarks.soak.soak import SoakSettings, run_soak
from benchmarks.soak.verdict import lines, to_json
from bnexport.bundle import Bundle
from bnexport.environment import describe, environment
from bnexport.files import write_atomically


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
