"""Train the chapter's recipe over several seeds (5, or the first argument) for each norm; print the README's table.

Runs that are complete in runs/accuracy are reused.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from bnexport.environment import describe, environment
from bnexport.errors import BnexportError
from bnexport.nn.lenet import NORMS
from bnexport.training.config import TrainingConfig
from bnexport.training.result import TrainingResult
from bnexport.training.run import train


def cell(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    spread = f" +/- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def row(norm: str, results: list[TrainingResult]) -> str:
    last = [result.history[-1] for result in results]
    recalibrated = [result.recalibrated_accuracy for result in results if result.recalibrated_accuracy is not None]
    plain = [[entry[key] for entry in last] for key in ("train_loss", "train_accuracy", "test_accuracy")]
    return f"| {norm} | {' | '.join(map(cell, plain))} | {cell(recalibrated) if recalibrated else '-'} |"


def main(seeds: int) -> None:
    print("| norm | train loss | train accuracy | test accuracy | test accuracy, statistics re-estimated |")
    print("|---|---|---|---|---|")
    for norm in NORMS:
        out = [Path("runs/accuracy") / f"{norm}-{seed}" for seed in range(seeds)]
        results = [train(TrainingConfig(norm=norm, seed=seed), out=out[seed], resume=True) for seed in range(seeds)]
        print(row(norm, results), flush=True)
    recipe = results[0].config
    used = f"{recipe.dataset}, lr {recipe.lr}, {recipe.epochs} epochs, batch {recipe.batch_size}, {results[0].device}"
    print(f"\nMean +/- standard deviation over n = {seeds} seeds from 0; {used}; {describe(environment())}.")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    except BnexportError as error:
        sys.exit(f"accuracy_table: {error}")
