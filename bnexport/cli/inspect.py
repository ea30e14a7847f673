"""``bnexport inspect``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Every number, as JSON.")
def command(path: Path, as_json: bool) -> None:
    """Show gamma, beta, the moving statistics and the folded scale of every BatchNorm channel.

    PATH is a run directory or checkpoint, any other .safetensors file, or a bundle. Dead channels (constant output) and
    exploding ones (scaled over 30 times the layer's median) are marked.
    """
    from bnexport.nn.inspection import inspect_path
    from bnexport.reporting.results import print_statistics

    print_statistics(inspect_path(path), as_json=as_json)
