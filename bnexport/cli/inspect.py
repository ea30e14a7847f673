"""``bnexport inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from bnexport.cli.options import options_of, values_of
from bnexport.evaluating.network_options import InspectionRequest
from bnexport.optional import need_packages


@click.command("inspect", epilog="Example: bnexport inspect runs/bn_lenet --statistics")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--statistics", is_flag=True, help="Compare the moving statistics with exact ones on 1024 training images."
)
@options_of(InspectionRequest, first="dataset")
@options_of(InspectionRequest, last="labels")
@click.option("--all", "every", is_flag=True, help="Print the numbers of every channel too.")
@click.option("--json", "as_json", is_flag=True, help="Print every number as JSON.")
def command(path: Path, statistics: bool, every: bool, as_json: bool, **options: Any) -> None:
    """Show the BatchNorm statistics of a network: a summary, each layer in the network's order, and unusual channels.

    PATH is a run directory or checkpoint, any other .safetensors file, or a bundle. Dead channels (constant output) and
    exploding ones (scale over 30 times the layer's median) are listed. --statistics, or an option that it needs, adds the
    distance of the moving statistics from the exact ones, layer by layer.
    """
    from bnexport.loading.inspection import inspect_path
    from bnexport.reporting.results import print_statistics

    request = InspectionRequest(**values_of(InspectionRequest, options))
    inspection, stale = inspect_path(path), None
    if statistics or request != InspectionRequest():
        need_packages("bnexport inspect --statistics", "torch", "safetensors")
        from bnexport.evaluating.network import sampled_staleness, trained_network

        stale = sampled_staleness(trained_network(path, request), data_dir=request.data_dir, download=True)
    print_statistics(inspection, stale=stale, as_json=as_json, every=every)
