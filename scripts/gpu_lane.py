"""Run every GPU runtime in every setting, judge it, hide libraries from it, and write docs/gpu.md.

Use: python scripts/gpu_lane.py [--bundle DIR] [--out FILE] [--data-dir DIR] [--only RUNTIME ...] [--max-samples N]
Without a GPU the same lane runs with an emulated engine. Exit codes: 0 all as it should be, 1 something failed, 2 bad input,
3 what BNEXPORT_REQUIRE names (cuda, ort-cuda, tensorrt) is not here.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu.lane import MAX_SAMPLES, require, run_lane
from benchmarks.gpu.page import write_document
from bnexport.bundle import Bundle
from bnexport.errors import BadInput, BnexportError

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, default=ROOT / "models" / "bn_lenet" / "1")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu.md", help="the page")
    parser.add_argument("--data-dir", type=Path, help="where the data set lies; default: BNEXPORT_DATA, then the cache")
    parser.add_argument("--only", action="append", default=[], help="this GPU runtime; may be given again")
    parser.add_argument("--max-samples", type=int, default=MAX_SAMPLES, help="at most so many of each kind")
    given = parser.parse_args()
    try:
        require(os.environ.get("BNEXPORT_REQUIRE", ""))
        lane = run_lane(
            Bundle.open(given.bundle),
            only=given.only,
            data_dir=given.data_dir,
            max_samples=given.max_samples,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
        write_document(lane, given.out)
    except BnexportError as error:
        print(f"gpu_lane.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 3
    print(f"{'PASS' if lane.passed else 'FAIL'}: {len(lane.runs)} settings; {given.out}")
    return 0 if lane.passed else 1


if __name__ == "__main__":
    sys.exit(main())
