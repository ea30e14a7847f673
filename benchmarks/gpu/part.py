"""The process of one part of the lane: ``python -m benchmarks.gpu.part REQUEST``, started by ``lane`` alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.gpu.lane import Job, measure_part
from benchmarks.gpu.results import write_results
from bnexport.bundle import Bundle


def main() -> None:
    """Measure the part that the request names, and write its results each time there are more."""
    request = json.loads(sys.argv[1])
    data_dir = None if request["data_dir"] is None else Path(request["data_dir"])
    job = Job(Bundle.open(request["bundle"]), data_dir, request["max_samples"], request["real"])
    measure_part(job, request["part"], lambda lane: write_results(lane, Path(request["out"])))


if __name__ == "__main__":
    main()
