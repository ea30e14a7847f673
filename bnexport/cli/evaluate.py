"""``bnexport evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.cli.options import DatasetName
from bnexport.optional import need_packages
from bnexport.runtimes.catalogue import RUNNERS
from bnexport.training.config import DEVICES


@click.command("evaluate")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--dataset", type=DatasetName(), help="Whose test images.  [default: PATH's own]")
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder of data sets.")
@click.option(
    "--runtime",
    type=click.Choice([spec.name for spec in RUNNERS]),
    metavar="NAME",
    help=f"Of a bundle: {', '.join(spec.name for spec in RUNNERS)}.  [default: onnxruntime-cpu]",
)
@click.option("--device", type=click.Choice(DEVICES), help="Of a checkpoint.  [default: auto]")
@click.option("--source", metavar="FILE.py:FACTORY", help="Of a checkpoint: the code of your own network.")
@click.option("--weights-key", metavar="NAME", help="With --source: weights to take, of a file with several sets.")
@click.option("--batch-size", type=int, default=1000, show_default=True, help="Images at once.")
@click.option(
    "--confusion", type=click.Path(path_type=Path), metavar="FILE", help="Draw the confusion matrix: .png, .svg."
)
@click.option("--json", "json_file", metavar="FILE", help="Write everything as JSON; - prints it instead of the table.")
def command(path: Path, confusion: Path | None, json_file: str | None, **options: Any) -> None:
    """Count what a network gets right on a data set's test images: accuracy, loss, classes, confusion matrix.

    PATH is a run directory or checkpoint, which torch runs, or a bundle, which any runtime runs. The accuracy has its 95 %
    Wilson interval.
    """
    if confusion is not None:
        need_packages("bnexport evaluate --confusion", "matplotlib")
        from bnexport.reporting.figures import check_suffix

        check_suffix(confusion)
    from bnexport.cli.output import STDOUT, prints_aside, progress_bar, write_json
    from bnexport.evaluating.evaluate import EvaluationRequest, evaluate_path
    from bnexport.reporting.results import print_evaluation

    with prints_aside(), progress_bar("evaluating") as advance:
        found = evaluate_path(path, EvaluationRequest(**options), on_batch=advance)
    written = [str(target) for target in (confusion, json_file) if target not in (None, STDOUT)]
    if confusion is not None:
        from bnexport.reporting.figures import confusion_picture

        title = f"{found.n} test images of {found.dataset}: accuracy {found.accuracy:.4f}"
        confusion_picture(found.confusion, [row.label for row in found.classes], confusion, title=title)
    if json_file is not None:
        write_json(json_file, found.to_json())
    if json_file != STDOUT:
        print_evaluation(found, written=written)
