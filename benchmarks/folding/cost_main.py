"""How long a fold takes beside the torch.export that it needs, on deep networks; prints a table in Markdown.

Use: python scripts/benchmark_fold.py [torchvision:NAME | timm:NAME ...]     The last of the default ones is timm's.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the trace has one thread, so the proofs get one, too

from benchmarks.folding.cost import COST_HEAD, DEEP, cost_row
from bnexport.environment import describe, environment
from bnexport.errors import BadInput, BnexportError

SECONDS = 120.0


def main(sources: list[str]) -> int:
    print(COST_HEAD, flush=True)
    try:
        for source in sources:
            print(cost_row(source, seconds=SECONDS), flush=True)
    except BnexportError as error:
        print(f"benchmark_fold.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 3
    print(f"\nSeconds: least disturbed of n; ratios of one call each, smallest to largest; {describe(environment())}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(DEEP)))
