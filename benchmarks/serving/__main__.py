"""How fast serving is beside other servers of the same model, in turn in one run; writes docs/serving_speed.md.

Use: python scripts/benchmark_serving.py [--out FILE] [--rounds N] [--seconds S] [--memory-requests N] [--venvs FOLDER]
         [--bundle FOLDER] [--note TEXT] [SERVER ...]
It needs wrk, and for gRPC h2load (apt-get install wrk nghttp2-client). Other servers are installed by pip into environments of
their own. Nothing else should run meanwhile. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.pages import write_page
from benchmarks.serving.page import serving_page
from benchmarks.serving.speed import Plan, measure
from benchmarks.serving.targets import outcomes
from benchmarks.serving.venvs import default_folder
from benchmarks.serving.ways import WAYS
from bnexport.environment import describe, environment
from bnexport.errors import BnexportError, ProofError, Unavailable


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*", metavar="SERVER", help=f"of {', '.join(WAYS)}; default all")
    parser.add_argument("--out", type=Path, default=Path("docs/serving_speed.md"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=2, help="of each load")
    parser.add_argument("--memory-requests", type=int, default=1_000_000, help="0 leaves the memory out")
    parser.add_argument("--venvs", type=Path, default=default_folder(), help="where other servers are installed")
    parser.add_argument("--bundle", type=Path, default=Path("models/bn_lenet/1"))
    parser.add_argument("--note", default="", help="what else a reader must know of the conditions")
    given = parser.parse_args()
    if (unknown := sorted(set(given.servers) - set(WAYS))) or min(given.rounds, given.seconds) < 1:
        parser.error(f"unknown server {unknown[0]}" if unknown else "rounds and seconds start at 1")
    plan = Plan(given.bundle, given.venvs.resolve(), given.rounds, given.seconds, given.memory_requests)
    try:
        speeds = measure(given.servers or list(WAYS), plan, tell=lambda line: print(line, flush=True))
        write_page(serving_page(speeds, f"{describe(environment())}. {given.note}".rstrip(". ")), given.out)
    except (BnexportError, KeyboardInterrupt) as error:
        print(f"benchmark_serving.py: {str(error) or 'interrupted, so there is no page'}", file=sys.stderr)
        codes = {KeyboardInterrupt: 130, Unavailable: 3, ProofError: 1}
        return next((code for kind, code in codes.items() if isinstance(error, kind)), 2)
    return 1 if any(outcome.met is False for outcome in outcomes(speeds)) else 0


if __name__ == "__main__":
    sys.exit(main())
