"""``bnexport deploy``: one subcommand per target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bnexport.cli.options import PATH
from bnexport.deploying.deploy_request import DEVICES, SCALE_METRICS, DeployRequest, Scaling
from bnexport.deploying.releases import DEFAULT_RELEASE, TRITON_RELEASES
from bnexport.optional import require

if TYPE_CHECKING:
    from bnexport.deploying.deploy_request import Deployment

Command = TypeVar("Command", bound=Callable[..., Any])

#: Arguments and options of every target.
_COMMON = (
    click.argument("bundle", type=PATH),
    click.option("--out", required=True, type=PATH, help="Folder to write."),
    click.option("--name", help="Name of the deployed model.  [default: the bundle's]"),
    click.option(
        "--triton", metavar="RELEASE", default=DEFAULT_RELEASE, show_default=True,
        help=f"Release of Triton, {list(TRITON_RELEASES)[-1]} to {DEFAULT_RELEASE}, that must be able to load the file.",
    ),
    click.option(
        "--device", type=click.Choice(DEVICES), default="cpu", show_default=True, help="Device on which Triton runs the model."
    ),
    click.option(
        "--instances", type=click.IntRange(min=1),
        help="Copies of the model that run at once in one Triton. On CPUs, use one per core.  [default: tuned.json, or 1]",
    ),
    click.option(
        "--max-batch-size", type=click.IntRange(min=1), help="Largest batch that Triton forms.  [default: 64]"
    ),
    click.option("--force", is_flag=True, help="Replace an existing deployment."),
)  # fmt: skip


def _common(command: Command) -> Command:
    for decorate in reversed(_COMMON):
        command = decorate(command)
    return command


@click.group("deploy", epilog="Example: bnexport deploy triton models/bn_lenet/1 --out repository")
def command() -> None:
    """Write the files that other servers need to serve a bundle.

    Each file is checked before it is written: Triton's configuration by protobuf, KServe's YAML by a strict schema, the
    model's operator set and file format against the ONNX Runtime in that release of Triton.
    """


@command.command(
    "triton",
    short_help="Write a model repository of Triton Inference Server.",
    epilog="Example: bnexport deploy triton models/bn_lenet/1 --out repository",
)
@_common
def triton(bundle: Path, out: Path, **options: Any) -> None:
    """Write BUNDLE as a model repository of Triton Inference Server."""
    from bnexport.bundle import Bundle
    from bnexport.deploying.triton_repository import deploy_triton

    _print_result(deploy_triton(Bundle.open(bundle), out, DeployRequest(**options)))


@command.command(
    "kserve",
    short_help="Write an InferenceService for KServe, and the repository.",
    epilog="Example: bnexport deploy kserve models/bn_lenet/1 --out kserve --storage-uri s3://bucket/models",
)
@_common
@click.option(
    "--storage-uri", required=True, metavar="URI", help="Storage that will hold the repository, as s3://bucket/models."
)
@click.option("--namespace", help="Namespace of the service.  [default: kubectl's]")
@click.option(
    "--min-replicas",
    type=int,
    default=1,
    show_default=True,
    help="Least number of pods. With 0 the service stops when idle (Knative only).",
)
@click.option("--max-replicas", type=int, default=4, show_default=True, help="Largest number of pods.")
@click.option(
    "--scale-metric", type=click.Choice(SCALE_METRICS), default="concurrency", show_default=True,
    help="Measure that decides the number of pods. concurrency and rps need Knative, cpu and memory a standard deployment.",
)  # fmt: skip
@click.option("--scale-target", type=int, default=8, show_default=True, help="Value of the scale metric per pod.")
def kserve(bundle: Path, out: Path, storage_uri: str, namespace: str | None, **options: Any) -> None:
    """Write BUNDLE as a KServe InferenceService that runs Triton, and the repository to upload."""
    for name in ("yaml", "jsonschema"):
        require(name, purpose="bnexport deploy kserve")
    from bnexport.bundle import Bundle
    from bnexport.deploying.kserve import deploy_kserve

    sizes = {key: options.pop(key) for key in ("min_replicas", "max_replicas")}
    scaling = Scaling(storage_uri, **sizes, metric=options.pop("scale_metric"), target=options.pop("scale_target"))
    _print_result(deploy_kserve(Bundle.open(bundle), out, DeployRequest(**options), scaling, namespace=namespace))


@command.command(
    "docker",
    short_help="Write a Dockerfile and compose file for bnexport serve.",
    epilog="Example: bnexport deploy docker models/bn_lenet/1 --out image",
)
@_common
@click.option("--wheel", type=PATH, help="Wheel of bnexport to install in the image.  [default: from pip's index]")
def docker(bundle: Path, out: Path, wheel: Path | None, **options: Any) -> None:
    """Write BUNDLE with a Dockerfile for bnexport serve, and a compose file for it and for Triton."""
    from bnexport.bundle import Bundle
    from bnexport.deploying.docker import deploy_docker

    _print_result(deploy_docker(Bundle.open(bundle), out, DeployRequest(**options), wheel=wheel))


def _print_result(done: Deployment) -> None:
    for name in done.files:
        click.echo(f"written: {done.path / name}")
    if done.tuning is not None:
        click.echo(done.tuning)
    for step in done.next_steps:
        click.echo(f"next: {step}")
