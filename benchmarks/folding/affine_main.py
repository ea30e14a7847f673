"""Measure which ONNX form of a standalone affine is fastest on each execution provider here; write docs/affine_form.md.

Use: python scripts/benchmark_affine_form.py [DOCUMENT]     Takes a few minutes, on a machine that does nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.folding.affine_form import measure_forms, winners
from benchmarks.folding.affine_page import write_document
from bnexport.environment import environment
from bnexport.errors import BnexportError

ROUNDS, SEED = 15, 0


def main(document: Path) -> int:
    try:
        rows = measure_forms(rounds=ROUNDS, seed=SEED, tell=lambda line: print(line, file=sys.stderr, flush=True))
        write_document(rows, document, record=environment(), rounds=ROUNDS, seed=SEED)
    except BnexportError as error:
        print(f"benchmark_affine_form.py: {error}", file=sys.stderr)
        return 3
    for provider, form in winners(rows).items():
        print(f"{provider}: {form}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "affine_form.md"))
