"""``bnexport predict``: labels of a few images on the terminal, or of many in Parquet files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bnexport.cli.options import PATH, RUNTIME, given_options
from bnexport.cli.output import BarDisplay
from bnexport.errors import UsageError
from bnexport.optional import require
from bnexport.runtimes.catalogue import DEFAULT_RUNTIME
from bnexport.serving.bulk.bulk_request import BulkProgress

if TYPE_CHECKING:
    from rich.console import Console

    from bnexport.serving.bulk.bulk_prediction import BulkResult


#: Seconds between two lines of a log.
_PAUSE = 10.0


class BulkDisplay(BarDisplay, BulkProgress):
    """Listener of a bulk job that prints."""

    def __init__(self, console: Console | None = None, *, pause: float = _PAUSE) -> None:
        if console is None:
            from rich.console import Console

            console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        super().__init__(console, "images")
        self._pause, self._printed = pause, time.monotonic()
        self._rows = self._done = 0

    def on_tuning(self, line: str) -> None:
        """Print the line."""
        self._console.print(line)

    def on_start(self, rows: int, done: int, workers: int) -> None:
        """Print the number of images and workers."""
        self._rows, self._done = rows, done
        before = f", {done} of them are there already" if done else ""
        self._console.print(f"{rows} images{before}; {workers} worker{'s' if workers > 1 else ''}")
        self._bar.update(self._task, completed=done, total=rows, visible=True)

    def on_shard(self, rows: int) -> None:
        """Move the bar; in a log, print a line from time to time."""
        self._done += rows
        self._bar.update(self._task, completed=self._done)
        if not self._console.is_terminal and time.monotonic() - self._printed >= self._pause:
            self._printed = time.monotonic()
            self._console.print(f"{self._done} of {self._rows} images")


@click.command("predict", epilog="Example: bnexport predict models/bn_lenet/1 shirt.png")
@click.argument("bundle", type=PATH)
@click.argument("images", nargs=-1, required=True, type=PATH)
@click.option(
    "--runtime", type=RUNTIME, default=DEFAULT_RUNTIME, show_default=True, metavar="NAME",
    help="Engine and device. bnexport doctor lists them.",
)  # fmt: skip
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object per image; with --out, one for the whole job."
)
@click.option("--out", type=PATH, help="Write Parquet files into this folder instead of printing.")
@click.option(
    "--engine",
    type=click.Choice(("local", "ray")),
    help="With --out: run in processes of this machine or on a Ray cluster.  [default: local]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="With --out: number of sessions with one thread each.  [default: tuned.json, or one per core; GPU: 1]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="With --out: images per call.  [default: tuned.json, or 256]"
)
@click.option("--shard-rows", type=click.IntRange(min=1), help="With --out: number of rows per file.  [default: 10000]")
@click.option("--column", help="With --out: column of Parquet and .npz files that holds the images.  [default: image]")
@click.option(
    "--id-column", help="With --out: column of Parquet files that holds the ids.  [default: file name and row]"
)
@click.option("--logits", is_flag=True, default=None, help="With --out: write the raw logits too.")
@click.option("--force", is_flag=True, default=None, help="With --out: delete the files of another job in that folder.")
def command(bundle: Path, images: tuple[Path, ...], runtime: str, as_json: bool, out: Path | None, **bulk: Any) -> None:
    """Print the label and probability of each of IMAGES (PNG, JPEG, BMP, WebP, GIF, .npy, IDX).

    With --out, IMAGES are folders of pictures, .npy and .npz files of uint8 images, and Parquet files with image bytes, of
    any size. OUT receives Parquet files with id, label and probabilities. The same command resumes a stopped job.
    """
    given = {key: value for key, value in bulk.items() if value is not None}
    if out is not None:
        _in_bulk(bundle, images, out, {"runtime": runtime, **given}, as_json=as_json)
        return
    if given:
        flag = given_options()[next(iter(given))]
        raise UsageError(f"{flag} is for --out", remedy="Pass --out FOLDER, or leave the option out")
    if many := [image for image in images if image.is_dir() or image.suffix.lower() in (".parquet", ".npz")]:
        few = f", or the pictures themselves: {many[0]}/*" if many[0].is_dir() else ""
        raise UsageError(
            f"{many[0]} holds many images, and predictions of many images are written to Parquet files",
            remedy=f"Pass --out FOLDER for these files{few}",
        )
    from bnexport.reporting.results import print_predictions
    from bnexport.serving.predictor import predict_images

    print_predictions(predict_images(bundle, *images, runtime=runtime), as_json=as_json)


def _in_bulk(bundle: Path, sources: tuple[Path, ...], out: Path, options: dict[str, Any], *, as_json: bool) -> None:
    engine = options.pop("engine", "local")
    for name in ("pyarrow",) if engine == "local" else ("ray", "pyarrow"):  # ray's extra installs pyarrow, too
        require(name, purpose=f"bnexport predict --out with --engine {engine}")
    from bnexport.serving.bulk.bulk_prediction import predict_in_bulk
    from bnexport.serving.bulk.bulk_request import BulkRequest

    with BulkDisplay() as display:
        result = predict_in_bulk(bundle, sources, out, engine=engine, request=BulkRequest(**options), progress=display)
    _print_result(result, as_json=as_json)


def _print_result(result: BulkResult, *, as_json: bool) -> None:
    if as_json:
        from bnexport.reporting.results import print_json

        print_json(result.to_json())
        return
    fresh = result.rows - result.resumed_rows
    rate = f", {fresh / result.seconds:.0f} images/s" if fresh and result.seconds else ""
    before = f" ({result.resumed_rows} were there already)" if result.resumed_rows else ""
    files = "1 file" if result.shards == 1 else f"{result.shards} files"
    click.echo(f"{result.rows} {'row' if result.rows == 1 else 'rows'} in {files} of {result.out}{before}{rate}")
