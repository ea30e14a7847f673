"""Train the chapter's recipe over several seeds for each norm; print the README's table.

``python -m benchmarks.training.accuracy [SEEDS]`` takes some minutes. Complete runs in runs/accuracy are reused.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.command import finish, options
from benchmarks.pages import table_page
from bnexport.nn.lenet import NORMS
from bnexport.training.config import TrainingConfig
from bnexport.training.training_run import TrainingResult, train


def cell(values: list[float]) -> str:
    """Return mean and sample standard deviation; "-" without values."""
    spread = f" +/- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}" if values else "-"


def row(norm: str, results: list[TrainingResult]) -> list[str]:
    """Return the cells of one norm."""
    last = [result.history[-1] for result in results]
    recalibrated = [result.recalibrated_accuracy for result in results if result.recalibrated_accuracy is not None]
    plain = [[entry[key] for entry in last] for key in ("train_loss", "train_accuracy", "test_accuracy")]
    return [norm, *map(cell, plain), cell(recalibrated)]


def main() -> None:
    """Train the missing runs and print the table."""
    parser = options("training.accuracy", __doc__)
    parser.add_argument("seeds", nargs="?", type=int, default=5)
    seeds = parser.parse_args().seeds
    rows = []
    for norm in NORMS:
        out = [Path("runs/accuracy") / f"{norm}-{seed}" for seed in range(seeds)]
        results = [train(TrainingConfig(norm=norm, seed=seed), out=out[seed], resume=True) for seed in range(seeds)]
        rows.append(row(norm, results))
    recipe = results[0].config
    used = f"{recipe.dataset}, lr {recipe.lr}, {recipe.epochs} epochs, batch {recipe.batch_size}, {results[0].device}"
    heads = ["norm", "train loss", "train accuracy", "test accuracy", "test accuracy, statistics re-estimated"]
    print(table_page(heads, rows, f"Mean +/- standard deviation over n = {seeds} seeds from 0; {used}"))


if __name__ == "__main__":
    finish("accuracy", main)
