"""Load on a server: wrk for HTTP/1.1, h2load for gRPC. Every client has one connection with one request at a time."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.command import last_line, output_of
from benchmarks.serving.wires import WireRequest
from bnexport.errors import MissingDependency, RuntimeUnavailable

#: Program -> Debian's package.
TOOLS: Mapping[str, str] = {"wrk": "wrk", "h2load": "nghttp2-client"}
#: Seconds in addition to those of the load itself.
_PATIENCE = 60.0
#: wrk calls ``done`` with its counters; its own report rounds times. The body is read from the working folder.
_SCRIPT = """\
wrk.method = "POST"
%s
local file = assert(io.open("body", "rb"))
wrk.body = file:read("*a")
file:close()
done = function(summary, latency)
  local errors = summary.errors
  print(string.format('{"requests": %%d, "us": %%d, "p50_us": %%d, "p99_us": %%d, "errors": {"connect": %%d, "read": %%d,'
    .. ' "write": %%d, "status": %%d, "timeout": %%d}}', summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), errors.connect, errors.read, errors.write, errors.status, errors.timeout))
end
"""
_TOTALS = re.compile(
    r"^finished in ([\d.]+)(ms|s|us),.*?^requests: .*? (\d+) failed, (\d+) errored, (\d+) timeout", re.M | re.S
)
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Load:
    """The report of a load tool."""

    requests: int  # with an answer
    seconds: float
    p50_us: float
    p99_us: float  # wrk counts a slow answer once more for each request that it delayed
    errors: Mapping[str, int] = field(default_factory=dict)  # kinds that happened -> count

    @property
    def per_second(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def need_tools(*names: str) -> None:
    """Raise MissingDependency if one of these rows of TOOLS is not installed."""
    for name in names:
        if shutil.which(name) is None:
            problem = f"the benchmark of serving needs {name}, which is not installed here"
            raise MissingDependency(problem, remedy=f"Install it: apt-get install {TOOLS[name]}")


def put_load(port: int, request: WireRequest, *, clients: int, seconds: int, grpc: bool = False) -> Load:
    """Send one request repeatedly for whole seconds; with ``grpc`` over HTTP/2, as gRPC does.

    RuntimeUnavailable: the load tool failed, or no request was answered.
    """
    url = f"http://127.0.0.1:{port}{request.path}"
    with tempfile.TemporaryDirectory(prefix="bnexport-benchmark-") as name:
        folder = Path(name)
        (folder / "body").write_bytes(request.body)
        if grpc:
            log = folder / "log"
            headers = [word for key, value in request.headers.items() for word in ("-H", f"{key}: {value}")]
            shape = ["-t", "1", "-c", str(clients), "-m", "1", "-D", str(seconds), f"--log-file={log}", "-d", "body"]
            text = _run(["h2load", *shape, *headers, url], folder, seconds)
            return parse_h2load(text, log.read_text(encoding="ascii") if log.exists() else "")
        (folder / "post.lua").write_text(wrk_script(request.headers), encoding="ascii")
        shape = ["-t", "1", "-c", str(clients), "-d", f"{seconds}s", "-s", "post.lua"]
        return parse_wrk(_run(["wrk", *shape, url], folder, seconds))


def wrk_script(headers: Mapping[str, str]) -> str:
    """Return wrk's program in Lua: post the file ``body``, print one line of JSON at the end."""
    lines = (f"wrk.headers[{json.dumps(key)}] = {json.dumps(value)}" for key, value in headers.items())
    return _SCRIPT % "\n".join(lines)


def parse_wrk(text: str) -> Load:
    """Read the output of wrk with ``wrk_script``; RuntimeUnavailable without a result."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines or not (found := json.loads(lines[-1]))["requests"]:
        raise _no_result("wrk", text)
    errors = {kind: count for kind, count in found["errors"].items() if count}
    return Load(found["requests"], found["us"] * 1e-6, found["p50_us"], found["p99_us"], errors)


def parse_h2load(text: str, log: str) -> Load:
    """Read the output of h2load, and its log: of each request the begin, the HTTP status, and the microseconds."""
    totals = _TOTALS.search(text)
    rows = [line.split() for line in log.splitlines()]
    times = [int(row[2]) for row in rows if row[1] == "200"]
    if totals is None or not times:
        raise _no_result("h2load", text)
    kinds = zip(("failed", "errored", "timeout"), totals.group(3, 4, 5), strict=True)
    errors = {kind: int(count) for kind, count in kinds if int(count)}
    if wrong := len(rows) - len(times):
        errors["status"] = wrong
    p50, p99 = (float(value) for value in np.percentile(times, (50, 99)))
    return Load(len(times), float(totals[1]) * _UNITS[totals[2]], p50, p99, errors)


def _run(command: list[str], folder: Path, seconds: int) -> str:
    return output_of(command, partial(_no_result, command[0]), timeout=seconds + _PATIENCE, cwd=folder)


def _no_result(tool: str, text: str) -> RuntimeUnavailable:
    remedy = "Check that the server still answers"
    return RuntimeUnavailable(f"{tool} gave no result: {last_line(text)}", remedy=remedy)
