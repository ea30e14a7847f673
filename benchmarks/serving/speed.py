"""How fast serving is, side by side with other servers of the same model: all in turn, round after round."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bnexport import interrupts
from benchmarks.serving.alone import Alone, open_session
from benchmarks.serving.load import Load, need_tools, put_load
from benchmarks.serving.process import Running, counters, started
from benchmarks.serving.ways import WAYS, Place, Way
from benchmarks.serving.wires import WIRES, Request, read_logits
from bnexport.bundle import Bundle
from bnexport.errors import BundleError, ProofError, RuntimeUnavailable
from bnexport.optional import require
from bnexport.tensors import Array

CLIENTS = (1, 8, 64)
#: Without these there is nothing to compare.
NEEDED = ("binary", "echo")
#: A server's logits are right within so much of the largest of onnxruntime's own.
_TOLERANCE = 1e-5
_WARM_SECONDS, _WARM_CLIENTS = 1, 8
_ALONE_SECONDS = 1.0
#: Requests between two readings of the memory.
_MEMORY_STEP = 50_000


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        bundle: A bundle named bn_lenet of a model with one input, "input".
        venvs: Where the environments of other servers are kept.
        rounds: How often.
        seconds: Of each load; whole ones.
        memory_requests: How many requests the server's memory is watched over; 0 leaves that out.
        warm_requests: How many it gets before.
        clients: Numbers of clients.
    """

    bundle: Path
    venvs: Path
    rounds: int = 3
    seconds: int = 2
    memory_requests: int = 1_000_000
    warm_requests: int = 20_000
    clients: Sequence[int] = CLIENTS


@dataclass(frozen=True)
class Sample:
    """One load on one server.

    Attributes:
        load: What the clients saw.
        cpu_us: CPU time of all the server's processes for each request, in microseconds.
        infer_us: Of that, the engine's share by the server's own counters; None where it has none.
    """

    load: Load
    cpu_us: float
    infer_us: float | None = None


@dataclass(frozen=True)
class Memory:
    """A server's memory over many requests.

    Attributes:
        requests: Requests after the warm-up at each reading; the first is 0.
        resident: Bytes at each reading.
        peak: The most that it ever had, in bytes.
    """

    requests: Sequence[int]
    resident: Sequence[int]
    peak: int

    @property
    def growth(self) -> float:
        """From the first reading to the last, as a share of the first."""
        return self.resident[-1] / self.resident[0] - 1.0


@dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
        samples: Way -> number of clients -> one sample per round.
        alone: onnxruntime without a server, once per round.
        sizes: Way -> bytes of a request's body and of its answer's.
        failed: Way -> why it could not be measured.
        memory: Of ``bnexport serve``; None when it was not watched.
    """

    samples: Mapping[str, Mapping[int, Sequence[Sample]]]
    alone: Sequence[Alone]
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    memory: Memory | None = None


def in_words(clients: int) -> str:
    """A number of clients."""
    return f"{clients} client" + "s" * (clients > 1)


@interrupts.terminable()
def measure(names: Sequence[str], plan: Plan, *, tell: Callable[[str], None] = lambda _: None) -> Speeds:
    """Measure servers in turn; each is started anew in every round.

    Args:
        names: Of WAYS; NEEDED are measured too.
        plan: How.
        tell: Told a line after each load.

    Raises:
        MissingDependency: A load tool is missing.
        RuntimeUnavailable: One of NEEDED can't be measured.
        ProofError: A server answers wrongly.
        BundleError: The bundle is none, or of another model.
    """
    bench = _Bench(plan, tell)
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
    return Speeds(kept, alone, bench.sizes, bench.failed, memory)


class _Bench:
    """The image, its logits, and what has been found so far."""

    def __init__(self, plan: Plan, tell: Callable[[str], None]) -> None:
        self.plan, self.tell = plan, tell
        self.bundle = Bundle.open(plan.bundle.resolve())
        if self.bundle.manifest.name != "bn_lenet":
            raise BundleError(f"{plan.bundle} is no bundle of bn_lenet", remedy="Give models/bn_lenet/1")
        self.image: Array = self.bundle.golden()[0]["input"][:1]
        self.logits: Array = open_session(self.bundle.file("model.onnx")).run(None, {"input": self.image})[0][0]
        self.sizes: dict[str, tuple[int, int]] = {}
        self.failed: dict[str, str] = {}

    def prepare(self, names: Sequence[str]) -> dict[str, Path]:
        """Way -> its interpreter; ways that have none go to ``failed``."""
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
        self.tell(f"{WAYS[name].words}: not measured, {error.message}")

    def turn(self, name: str, python: Path, samples: Mapping[int, list[Sample]], prefix: str) -> None:
        """One server, from its start to its end: every number of clients once."""
        try:
            with self._running(name, python) as (server, request):
                for clients, rows in samples.items():
                    rows.append(self._sample(WAYS[name], server, request, clients))
                    told = f"{rows[-1].load.per_second:,.0f}/s, {rows[-1].cpu_us:.0f} us of CPU each"
                    self.tell(f"{prefix}  {WAYS[name].words}, {in_words(clients)}: {told}")
        except RuntimeUnavailable as error:
            self._give_up(name, error)

    @contextmanager
    def _running(self, name: str, python: Path) -> Iterator[tuple[Running, Request]]:
        """A server that has answered rightly and is warm; it must answer rightly at the end as well."""
        way = WAYS[name]
        request = WIRES[way.wire].request(self.image)
        size = self.sizes.get("binary", (0, 0))[1]
        folder = self.bundle.path
        with started(lambda ports: way.command(Place(python, folder, ports, size)), way.environment()) as server:
            server.wait(lambda: self._check(name, server, request))
            self._load(way, server, request, _WARM_CLIENTS, _WARM_SECONDS)
            yield server, request
            server.wait(lambda: self._check(name, server, request))

    def _load(self, way: Way, server: Running, request: Request, clients: int, seconds: int) -> Load:
        grpc = WIRES[way.wire].grpc
        port = server.ports.grpc if grpc else server.ports.http
        return put_load(port, request, clients=clients, seconds=seconds, grpc=grpc)

    def _check(self, name: str, server: Running, request: Request) -> bool:
        """Whether the server answers; what it answers must be right."""
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
                remedy="A wrong answer's speed is worth nothing: look at that server first",
            )
        return True

    def _sample(self, way: Way, server: Running, request: Request, clients: int) -> Sample:
        before = counters(server.ports.http) if way.counted else {}
        cpu = server.cpu_seconds()
        load = self._load(way, server, request, clients, self.plan.seconds)
        cpu = server.cpu_seconds() - cpu
        if not way.counted:
            return Sample(load, cpu / load.requests * 1e6)
        after = counters(server.ports.http)
        grown = {key: after[key] - before[key] for key in after}
        if (lost := load.requests - grown["success"]) > 0:  # of gRPC: a refusal has the HTTP status 200 as well
            load = Load(load.requests, load.seconds, load.p50_us, load.p99_us, {**load.errors, "refused": lost})
        infer = grown["infer_ns"] / max(grown["infer"], 1) * 1e-3
        return Sample(load, cpu / load.requests * 1e6, infer)

    def memory(self, python: Path) -> Memory:
        """Resident memory over many binary requests of 8 clients, read about every 50,000."""
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
                self.tell(f"memory  {requests[-1]:,} requests: {resident[-1] / 2**20:.1f} MiB")
            return Memory(requests, resident, server.peak_bytes())


def grpc_answer(port: int, request: Request) -> bytes:
    """The message that a gRPC server answers.

    Raises:
        MissingDependency: grpcio is not here.
        OSError: The server does not answer, or refuses.
    """
    grpc = require("grpc", purpose="the benchmark of serving over gRPC")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer: bytes = channel.unary_unary(request.path)(request.body[5:], timeout=10.0)
        except grpc.RpcError as error:
            raise OSError(f"{error.code()}: {error.details()}") from error
    return answer


def _alone(bundle: Path) -> Alone:
    command = [sys.executable, "-m", "benchmarks.serving.alone", str(bundle), str(_ALONE_SECONDS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=WAYS["binary"].environment()
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeUnavailable(f"onnxruntime alone can't be measured: {last[:200]}", remedy="Look at bnexport doctor")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return Alone({int(size): us for size, us in found["batches"].items()}, found["rested"], found["pause"])
