"""``bnexport serve``: the Open Inference Protocol over HTTP and gRPC."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from bnexport.cli.options import PATH, RUNTIME
from bnexport.errors import UsageError
from bnexport.optional import require
from bnexport.runtimes.catalogue import DEFAULT_RUNTIME

#: Options that are fields of ServerSettings under the same name.
_PLAIN = (
    "host", "port", "grpc_port", "reuse_port", "grace", "poll", "access_log", "token_file", "middleware", "allow_load",
)  # fmt: skip


class _Workers(click.ParamType[int | None]):
    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Return a number from 1, or None for "auto"."""
        if value in (None, "auto"):
            return None
        try:
            return int(click.IntRange(1, 256).convert(value, param, ctx))
        except click.BadParameter:
            self.fail(f"{value!r} is neither auto nor a number from 1 to 256.", param, ctx)


class _Seconds(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return a finite number; click's ranges accept NaN and infinity."""
        found: float = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return found


@click.command("serve", epilog="Example: bnexport serve models --port 8000 --processes 4")
@click.argument("path", type=PATH)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on. 0.0.0.0 means every address."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port of HTTP. 0 chooses a free port.",
)
@click.option(
    "--grpc-port", type=click.IntRange(0, 65535), metavar="N", help="Also serve gRPC on this port; 8001 is usual."
)
@click.option("--reuse-port", is_flag=True, help="Share the port with other servers that have this option.")
@click.option(
    "--processes",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Number of processes. Each uses one core.",
)
@click.option(
    "--runtime",
    type=RUNTIME,
    default=DEFAULT_RUNTIME,
    show_default=True,
    metavar="NAME",
    help="Engine and device. bnexport doctor lists them. A missing runtime is an error and is never replaced by another.",
)
@click.option(
    "--workers",
    type=_Workers(),
    default="auto",
    show_default=True,
    help="Number of sessions with one thread each. auto: tuned.json, or measured.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1, 65536),
    help="Largest number of samples that are run as one batch.  [default: tuned.json with --workers auto, or 64]",
)
@click.option(
    "--limit", "limits", multiple=True, metavar="NAME=N",
    help="Change a limit, as batch=64. Repeatable. docs/serving_reference.md lists the limits.",
)  # fmt: skip
@click.option("--poll", type=_Seconds(0.1), help="Seconds between two searches for new versions.  [default: never]")
@click.option(
    "--grace",
    type=_Seconds(0.1),
    default=30.0,
    show_default=True,
    help="Seconds in which running requests may finish at the end.",
)
@click.option("--token-file", type=PATH, help="File with a token that every client must send.")
@click.option("--tls-cert", type=PATH, help="Certificate of the server (PEM), with --tls-key.")
@click.option("--tls-key", type=PATH, help="Key of the certificate (PEM).")
@click.option("--allow-load", is_flag=True, help="Let clients load and unload models.")
@click.option("--access-log/--no-access-log", default=True, show_default=True, help="Print one JSON line per request.")
@click.option(
    "--middleware", metavar="MODULE:NAME", help="Wrapper of the ASGI application, for example of OpenTelemetry."
)
def command(path: Path, **options: Any) -> None:
    """Serve PATH, a bundle or a folder of models, over the Open Inference Protocol v2 until SIGTERM or Ctrl-C."""
    for name in ("uvicorn", "httptools", "orjson", "prometheus_client"):
        require(name, purpose="bnexport serve")
    if options["grpc_port"] is not None:
        import bnexport.serving.grpc  # noqa: F401 -- before gRPC, whose log it turns off

        for name in ("grpc", "google.protobuf"):
            require(name, purpose="bnexport serve --grpc-port")
    from bnexport.serving.http.http_server import leave_engines, serve
    from bnexport.serving.http.supervisor import supervise

    settings = _settings(options)
    (serve if options["processes"] == 1 else supervise)(path, settings, announce=click.echo)
    leave_engines()


def _settings(options: dict[str, Any]) -> Any:
    from bnexport.serving.http.http_server import ServerSettings
    from bnexport.serving.served_model import ServingSettings
    from bnexport.serving.serving_limits import limits_from

    certificate, key = options["tls_cert"], options["tls_key"]
    if (certificate is None) != (key is None):
        raise UsageError("only one of --tls-cert and --tls-key is given", remedy="Give both, or neither")
    if options["port"] == options["grpc_port"] != 0:
        raise UsageError(
            f"--port and --grpc-port are both {options['port']}",
            remedy="Choose two different ports, such as 8000 and 8001",
        )
    models = ServingSettings(
        **{name: options[name] for name in ("runtime", "workers", "max_batch", "processes")},
        limits=limits_from(options["limits"]),
    )
    return ServerSettings(
        **{name: options[name] for name in _PLAIN},
        tls=None if certificate is None else (certificate, key),
        models=models,
    )
