"""Traffic on bnexport serve, right and malformed, while its processes are killed; ends with a verdict.

Use: python scripts/soak_serving.py [BUNDLE] [--seconds S] [--processes N] [--clients N] [--seed N] [--kill-every S] [--out F]
Exit code 0 when every demand was met, else 1. Linux alone; the server runs on a free port of 127.0.0.1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.soak.soak import SoakSettings, run_soak
from benchmarks.soak.verdict import lines, to_json
from bnexport.bundle import Bundle
from bnexport.environment import describe, environment
from bnexport.errors import BadInput, BnexportError
from bnexport.files import write_atomically


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default=Path(__file__).parents[1] / "models" / "bn_lenet" / "1")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds, on average")
    parser.add_argument("--out", type=Path, help="write everything there as JSON")
    given = vars(parser.parse_args())
    out, bundle = given.pop("out"), given.pop("bundle")
    try:
        soak = run_soak(Bundle.open(bundle), SoakSettings(**given), tell=lambda line: print(line, file=sys.stderr))
        print("\n".join([*lines(soak), describe(environment())]))
        found = to_json(soak) | {"environment": environment()}
        if out is not None:
            write_atomically(out, json.dumps(found, indent=1).encode())
    except BnexportError as error:
        print(f"soak_serving.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInput) else 3
    except KeyboardInterrupt:
        print("soak_serving.py: interrupted, so there is no verdict", file=sys.stderr)
        return 130
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
