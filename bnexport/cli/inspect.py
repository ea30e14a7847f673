"""``bnexport inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from bnexport.optional import need_packages


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--statistics", is_flag=True, help="Compare the moving statistics with exact ones on 1024 training images."
)
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder of data sets; --statistics.")
@click.option("--json", "as_json", is_flag=True, help="Every number, as JSON.")
def command(path: Path, statistics: bool, data_dir: Path | None, as_json: bool) -> None:
    """Show gamma, beta, the moving statistics and the folded scale of every BatchNorm channel.

    PATH is a run directory or checkpoint, any other .safetensors file, or a bundle. Dead channels (constant output) and
    exploding ones (scaled over 30 times the layer's median) are marked. With --statistics or --data-dir it also shows,
    layer by layer, how far the moving statistics are from the exact ones.
    """
    from bnexport.loading.inspection import inspect_path
    from bnexport.reporting.results import print_statistics

    inspection, stale = inspect_path(path), None
    if statistics or data_dir is not None:
        need_packages("bnexport inspect --statistics", "torch", "safetensors")
        from bnexport.evaluating.network import sampled_staleness, subject_of

        stale = sampled_staleness(subject_of(path), data_dir=data_dir, download=True)
    print_statistics(inspection, stale=stale, as_json=as_json)
