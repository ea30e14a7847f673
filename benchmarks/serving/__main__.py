"""Measure the speed of serving next to other servers of the same model, in turn; write docs/results/serving_speed.md.

It needs wrk, and for gRPC h2load (apt-get install wrk nghttp2-client); pip installs other servers into separate environments.
It takes about half an hour, on an idle machine. The exit code is 1 if a target is missed.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.command import finish, known, options, progress
from benchmarks.pages import write_page
from benchmarks.serving.page import outcomes, serving_page
from benchmarks.serving.servers import WAYS, default_folder
from benchmarks.serving.speed import ServingPlan, measure
from bnexport.environment import describe, environment


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
