"""``bnexport evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.cli.options import options_of, values_of
from bnexport.evaluating.network_options import EvaluationRequest
from bnexport.optional import need_packages


@click.command("evaluate")
@click.argument("path", type=click.Path(path_type=Path))
@options_of(EvaluationRequest, first="dataset")
@options_of(EvaluationRequest, last="labels")
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
    from bnexport.evaluating.evaluate import evaluate_path
    from bnexport.reporting.results import print_evaluation

    request = EvaluationRequest(**values_of(EvaluationRequest, options))
    with prints_aside(), progress_bar("evaluating") as advance:
        found = evaluate_path(path, request, on_batch=advance)
    written = [str(target) for target in (confusion, json_file) if target not in (None, STDOUT)]
    if confusion is not None:
        from bnexport.reporting.figures import confusion_picture

        title = f"{found.n} test images of {found.dataset}: accuracy {found.accuracy:.4f}"
        confusion_picture(found.confusion, [row.label for row in found.classes], confusion, title=title)
    if json_file is not None:
        write_json(json_file, found.to_json())
    if json_file != STDOUT:
        print_evaluation(found, written=written)
