"""The speed of serving next to other servers of the same model: all in turn, round after round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.command import measured_in_child
from benchmarks.serving.alone import Alone, open_session
from benchmarks.serving.load import Load, need_tools, put_load
from benchmarks.serving.process import Running, counters, started
from benchmarks.serving.servers import WAYS, ServerWay
from benchmarks.serving.wires import WIRES, WireRequest, read_logits
from bnexport.bundle import Bundle
from bnexport.errors import BundleError, ProofError, RuntimeUnavailable
from bnexport.optional import require
from bnexport.tensors import Array

CLIENTS = (1, 8, 64)
#: Servers without which there is nothing to compare.
NEEDED = ("binary", "echo")
#: Allowed error of a server's logits, as a share of the largest of onnxruntime's own.
_TOLERANCE = 1e-5
_WARM_SECONDS, _WARM_CLIENTS = 1, 8
_ALONE_SECONDS = 1.0
#: Requests between two readings of the memory.
_MEMORY_STEP = 50_000


@dataclass(frozen=True)
class ServingPlan:
    """The settings of a measurement."""

    bundle: Path  # a bundle named bn_lenet of a model with one input, "input"
    venvs: Path  # the folder of the environments of other servers
    rounds: int = 3
    seconds: int = 2  # of each load
    memory_requests: int = 1_000_000  # over which the memory is read; 0: not at all
    warm_requests: int = 20_000  # before the first reading of the memory
    clients: Sequence[int] = CLIENTS


@dataclass(frozen=True)
class Sample:
    """One load on one server."""

    load: Load
    cpu_us: float  # CPU time of all the server's processes per request, in microseconds
    infer_us: float | None = None  # the engine's share by the server's own counters; None without counters


@dataclass(frozen=True)
class ServerMemory:
    """A server's memory over many requests."""

    requests: Sequence[int]  # after the warm-up at each reading; the first is 0
    resident: Sequence[int]  # bytes at each reading
    peak: int  # bytes

    @property
    def growth(self) -> float:
        """Growth from the first reading to the last, as a share of the first."""
        return self.resident[-1] / self.resident[0] - 1.0


@dataclass(frozen=True)
class ServingSpeeds:
    """The results of a measurement."""

    samples: Mapping[str, Mapping[int, Sequence[Sample]]]  # server -> number of clients -> one sample per round
    alone: Sequence[Alone]  # onnxruntime without a server, once per round
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # server -> bytes of a request and of its answer
    failed: Mapping[str, str] = field(default_factory=dict)  # server -> reason
    memory: ServerMemory | None = None  # of ``bnexport serve``


def in_words(clients: int) -> str:
    """Return "1 client" or "N clients"."""
    return f"{clients} client" + "s" * (clients > 1)


def measure(
    names: Sequence[str], plan: ServingPlan, *, on_line: Callable[[str], None] = lambda _: None
) -> ServingSpeeds:
    """Measure rows of WAYS, and NEEDED, in turn; each server is started anew in every round.

    MissingDependency: a load tool is missing. RuntimeUnavailable: one of NEEDED can't be measured. ProofError: a server's
    answer is wrong. BundleError: the bundle is of another model.
    """
    bench = _Bench(plan, on_line)
    names = [name for name in WAYS if name in {*names, *NEEDED}]
    need_tools("wrk", *("h2load" for name in names if WIRES[WAYS[name].wire].grpc))
    pythons = bench.prepare(names)
    samples: dict[str, dict[int, list[Sample]]] = {name: {n: [] for n in plan.clients} for name in pythons}
    alone: list[Alone] = []
    for number in range(plan.rounds):
        alone.append(_alone(bench.bundle.path))
        for name, python in pythons.items():
            if name not in bench.failed:
                bench.turn(name, python, samples[name], f"round {number + 1}/{plan.rounds}")
    kept = {name: rows for name, rows in samples.items() if name not in bench.failed}
    memory = bench.memory(pythons["binary"]) if plan.memory_requests else None
    return ServingSpeeds(kept, alone, bench.sizes, bench.failed, memory)


class _Bench:
    """The image, its logits, and the results so far."""

    def __init__(self, plan: ServingPlan, on_line: Callable[[str], None]) -> None:
        self.plan, self.on_line = plan, on_line
        self.bundle = Bundle.open(plan.bundle.resolve())
        if self.bundle.manifest.name != "bn_lenet":
            raise BundleError(f"{plan.bundle} is not a bundle of bn_lenet", remedy="Give models/bn_lenet/1")
        self.image: Array = self.bundle.golden()[0]["input"][:1]
        self.logits: Array = open_session(self.bundle.file("model.onnx")).run(None, {"input": self.image})[0][0]
        self.sizes: dict[str, tuple[int, int]] = {}
        self.failed: dict[str, str] = {}

    def prepare(self, names: Sequence[str]) -> dict[str, Path]:
        """Return server -> its interpreter; servers without one are added to ``failed``."""
        found: dict[str, Path] = {}
        for name in names:
            try:
                found[name] = WAYS[name].interpreter(self.plan.venvs)
            except RuntimeUnavailable as error:
                self._give_up(name, error)
        return found

    def _give_up(self, name: str, error: RuntimeUnavailable) -> None:
        if name in NEEDED:
            raise error
        self.failed[name] = error.message
        self.on_line(f"{WAYS[name].words}: not measured, {error.message}")

    def turn(self, name: str, python: Path, samples: Mapping[int, list[Sample]], prefix: str) -> None:
        """Measure one server from its start to its end: every number of clients once."""
        try:
            with self._running(name, python) as (server, request):
                for clients, rows in samples.items():
                    rows.append(self._sample(WAYS[name], server, request, clients))
                    found = f"{rows[-1].load.per_second:,.0f}/s, {rows[-1].cpu_us:.0f} us of CPU each"
                    self.on_line(f"{prefix}  {WAYS[name].words}, {in_words(clients)}: {found}")
        except RuntimeUnavailable as error:
            self._give_up(name, error)

    @contextmanager
    def _running(self, name: str, python: Path) -> Iterator[tuple[Running, WireRequest]]:
        """A warm server; its answers are right at the start and at the end."""
        way = WAYS[name]
        request = WIRES[way.wire].request(self.image)
        command = partial(
            way.started_by, python, bundle=self.bundle.path, answer_bytes=self.sizes.get("binary", (0, 0))[1]
        )
        with started(lambda ports: command(ports=ports), way.environment()) as server:
            server.wait(lambda: self._check(name, server, request))
            self._load(way, server, request, _WARM_CLIENTS, _WARM_SECONDS)
            yield server, request
            server.wait(lambda: self._check(name, server, request))

    def _load(self, way: ServerWay, server: Running, request: WireRequest, clients: int, seconds: int) -> Load:
        grpc = WIRES[way.wire].grpc
        port = server.ports.grpc if grpc else server.ports.http
        return put_load(port, request, clients=clients, seconds=seconds, grpc=grpc)

    def _check(self, name: str, server: Running, request: WireRequest) -> bool:
        """True if the server answers; ProofError if the answer is wrong."""
        wire = WIRES[WAYS[name].wire]
        if wire.grpc:
            headers: dict[str, str] = {}
            body = grpc_answer(server.ports.grpc, request)
        else:
            status, headers, body = server.post(request)
            if status != 200:
                return False
        self.sizes[name] = len(request.body), len(body)
        logits = read_logits(wire, headers, body)
        if logits is None:
            if len(body) != self.sizes["binary"][1]:
                raise ProofError(f"{WAYS[name].words} answered {len(body)} bytes", remedy="Report it")
            return True
        scale = float(np.abs(self.logits).max())
        if logits.shape != self.logits.shape or not np.abs(logits - self.logits).max() <= _TOLERANCE * scale:
            raise ProofError(
                f"{WAYS[name].words} answers {logits.tolist()}, onnxruntime alone {self.logits.tolist()}",
                remedy="Look at that server first: the speed of wrong answers does not count",
            )
        return True

    def _sample(self, way: ServerWay, server: Running, request: WireRequest, clients: int) -> Sample:
        before = counters(server.ports.http) if way.counted else {}
        begun = server.cpu_seconds()
        load = self._load(way, server, request, clients, self.plan.seconds)
        cpu = (server.cpu_seconds() - begun) / load.requests * 1e6
        if not way.counted:
            return Sample(load, cpu)
        after = counters(server.ports.http)
        grown = {key: after[key] - before[key] for key in after}
        if (lost := load.requests - grown["success"]) > 0:  # a refusal of gRPC has the HTTP status 200 as well
            load = replace(load, errors={**load.errors, "refused": lost})
        return Sample(load, cpu, grown["infer_ns"] / max(grown["infer"], 1) * 1e-3)

    def memory(self, python: Path) -> ServerMemory:
        """Read the resident memory over many binary requests of 8 clients, about every 50,000."""
        way = WAYS["binary"]
        with self._running("binary", python) as (server, request):
            warm, rate = 0, 1.0
            while warm < self.plan.warm_requests or not warm:
                load = self._load(way, server, request, _WARM_CLIENTS, 1)
                warm, rate = warm + load.requests, load.per_second
            requests, resident = [0], [server.resident_bytes()]
            while requests[-1] < self.plan.memory_requests:
                left = min(self.plan.memory_requests - requests[-1], _MEMORY_STEP)
                load = self._load(way, server, request, _WARM_CLIENTS, math.ceil(left / rate))
                rate = load.per_second
                requests.append(requests[-1] + load.requests)
                resident.append(server.resident_bytes())
                self.on_line(f"memory  {requests[-1]:,} requests: {resident[-1] / 2**20:.1f} MiB")
            return ServerMemory(requests, resident, server.peak_bytes())


def grpc_answer(port: int, request: WireRequest) -> bytes:
    """Return the message of a gRPC server's answer; OSError without an answer."""
    grpc = require("grpc", purpose="the benchmark of serving over gRPC")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer: bytes = channel.unary_unary(request.path)(request.body[5:], timeout=10.0)
        except grpc.RpcError as error:
            raise OSError(f"{error.code()}: {error.details()}") from error
    return answer


def _alone(bundle: Path) -> Alone:
    words = ("benchmarks.serving.alone", str(bundle), str(_ALONE_SECONDS))
    env = WAYS["binary"].environment()
    found = measured_in_child("onnxruntime alone", *words, remedy="Run bnexport doctor", env=env, timeout=300)
    return Alone(**found | {"batches": {int(size): us for size, us in found["batches"].items()}})
