"""How fast training is beside the chapter's own code, in turn in one run; writes docs/training_speed.md.

Use: python scripts/benchmark_training.py [--out FILE] [--rounds N] [--seconds S] [--note TEXT] [WAY ...]
Fashion-MNIST must lie where BNEXPORT_DATA says. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.pages import write_page
from benchmarks.training.speed import measure, speed_page
from benchmarks.training.ways import WAYS
from bnexport.environment import describe, environment
from bnexport.errors import BadInput, BnexportError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}; default all")
    parser.add_argument("--out", type=Path, default=Path("docs/training_speed.md"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--note", default="", help="what else a reader must know of the conditions")
    given = parser.parse_args()
    if unknown := sorted(set(given.ways) - set(WAYS)):
        parser.error(f"unknown way {unknown[0]}")
    try:
        speeds = measure(
            given.ways or list(WAYS),
            rounds=given.rounds,
            seconds=given.seconds,
            tell=lambda line: print(line, flush=True),
        )
        write_page(speed_page(speeds, f"{describe(environment())}. {given.note}".rstrip(". ")), given.out)
    except BnexportError as error:
        print(f"benchmark_training.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
