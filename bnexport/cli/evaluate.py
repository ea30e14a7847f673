"""``bnexport evaluate``, ``bnexport recalibrate`` and ``bnexport inspect``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bnexport.cli.options import PATH, options_of, values_of
from bnexport.cli.output import STDOUT, prints_aside, progress_bar, warn, write_json
from bnexport.evaluating.network_options import EvaluationRequest, InspectionRequest, RecalibrationRequest
from bnexport.optional import need_packages
from bnexport.validation.file_kinds import kind_of


@click.command("evaluate", epilog="Example: bnexport evaluate models/bn_lenet/1 --confusion confusion.png")
@click.argument("path", type=PATH)
@options_of(EvaluationRequest, first="dataset")
@options_of(EvaluationRequest, last="labels")
@click.option("--confusion", type=PATH, metavar="FILE", help="Draw the confusion matrix into this .png or .svg file.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write the whole result as JSON. - prints it instead of the table."
)
def evaluate(path: Path, confusion: Path | None, json_file: str | None, **options: Any) -> None:
    """Measure a network on the test images of a data set: accuracy, loss, scores per class, confusion matrix.

    PATH is a run directory or checkpoint, or with --source the weights of your own network, which torch runs; or a bundle,
    which any runtime runs. The accuracy is printed with its 95 % Wilson interval.
    """
    if confusion is not None:
        need_packages("bnexport evaluate --confusion", "matplotlib")
        from bnexport.reporting.figures import check_suffix

        check_suffix(confusion)
    from bnexport.evaluating.evaluate import evaluate_path
    from bnexport.reporting.results import print_evaluation

    request = EvaluationRequest(**values_of(EvaluationRequest, options))
    with prints_aside(), progress_bar("evaluating") as advance:
        found = evaluate_path(path, request, on_batch=advance)
    warn(found.assumed)
    written = [str(target) for target in (confusion, json_file) if target not in (None, STDOUT)]
    if confusion is not None:
        from bnexport.reporting.figures import confusion_picture

        title = f"{found.n} test images of {found.dataset}: accuracy {found.accuracy:.4f}"
        confusion_picture(found.confusion, [row.label for row in found.classes], confusion, title=title)
    if json_file is not None:
        write_json(json_file, found.to_json())
    if json_file != STDOUT:
        print_evaluation(found, written=written)


@click.command("recalibrate", epilog="Example: bnexport recalibrate runs/bn_lenet --samples 10000")
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, metavar="FILE", help="Checkpoint to write.  [default: *.recalibrated.safetensors]")
@options_of(RecalibrationRequest, first="definition")
@options_of(RecalibrationRequest, last="labels")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def recalibrate(checkpoint: Path, out: Path | None, as_json: bool, **options: Any) -> None:
    """Re-estimate the moving statistics of every BatchNorm exactly, over training images, into a new checkpoint.

    CHECKPOINT is a run directory or checkpoint, or with --source any weights file. It is not changed. The output is the
    distance of the old statistics from the exact ones, layer by layer, and the accuracy on test images before and after.
    """
    need_packages("bnexport recalibrate", "torch", "safetensors")
    from bnexport.evaluating.recalibration import recalibrate_checkpoint
    from bnexport.reporting.results import print_recalibration

    request = RecalibrationRequest(**values_of(RecalibrationRequest, options))
    with prints_aside(), progress_bar("re-estimating") as advance:
        done = recalibrate_checkpoint(checkpoint, out, request, on_batch=advance)
    warn(done.assumed)
    print_recalibration(done, as_json=as_json)


@click.command("inspect", epilog="Example: bnexport inspect runs/bn_lenet --statistics")
@click.argument("path", type=PATH)
@click.option(
    "--statistics", is_flag=True, help="Compare the moving statistics with exact ones on 1024 training images."
)
@options_of(InspectionRequest, first="dataset")
@options_of(InspectionRequest, last="labels")
@click.option("--all", "every", is_flag=True, help="Print the numbers of every channel too.")
@click.option("--json", "as_json", is_flag=True, help="Print every number as JSON.")
def inspect(path: Path, statistics: bool, every: bool, as_json: bool, **options: Any) -> None:
    """Show the BatchNorm statistics of a network: a summary, each layer in the network's order, and unusual channels.

    PATH is a run directory or checkpoint, any other .safetensors file, a bundle, or with --source a weights file of torch.
    Dead channels (constant output) and exploding ones (scale over 30 times the layer's median) are listed. --statistics,
    or an option that it needs, adds the distance of the moving statistics from the exact ones, layer by layer.
    """
    from bnexport.loading.inspection import inspect_path
    from bnexport.reporting.results import print_statistics

    request = InspectionRequest(**values_of(InspectionRequest, options))
    compared = request
    if _is_torch_file(path, request):
        compared = replace(request, source=None, weights_key=None, model_options={})  # every other option requests it
        need_packages("bnexport inspect --source", "torch", "safetensors")
        from bnexport.evaluating.network import inspect_network

        with prints_aside():
            inspection = inspect_network(path, request)
    else:
        inspection = inspect_path(path)
    stale = None
    if statistics or compared != InspectionRequest():
        need_packages("bnexport inspect --statistics", "torch", "safetensors")
        from bnexport.evaluating.network import sampled_staleness, trained_network

        with prints_aside():
            network = trained_network(path, request)
            warn(network.assumed)
            stale = sampled_staleness(network, data_dir=request.data_dir, download=True)
    print_statistics(inspection, stale=stale, as_json=as_json, every=every)


def _is_torch_file(path: Path, request: InspectionRequest) -> bool:
    """Return True for a weights file that only its network, named by --source, can read."""
    kind = None if request.source is None or path.is_dir() else kind_of(path)
    return kind is not None and kind.name in ("torch", "index")
