"""One model version that is ready to answer, verified on the sessions that serve it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bnexport.bundle import MODEL_EXPORTED, MODEL_ONNX, MODEL_TORCHSCRIPT, TUNED, WEIGHTS, Bundle
from bnexport.data.preprocessing import Preprocessing
from bnexport.environment import available_cores
from bnexport.errors import BnexportError
from bnexport.runtimes.base import Runner, RunSettings
from bnexport.runtimes.catalogue import DEFAULT_RUNTIME, RunnerSpec, runner_spec
from bnexport.runtimes.replay import Replay, replay_golden
from bnexport.serving.batcher import INLINE_SECONDS, Batcher, BatchLimits, Cost
from bnexport.serving.counters import ModelStatistics
from bnexport.serving.predictor import batches, check_labels, image_preprocessing
from bnexport.serving.protocol.decoding import Decoder
from bnexport.serving.protocol.messages import DATATYPES, InferRequest, InferResponse, answer
from bnexport.serving.serving_limits import ServingLimits
from bnexport.tensors import Array, TensorSpec
from bnexport.tuned import Choice, tuned_choice, tuning_line

#: File that a runtime reads -> Triton's name of the platform.
PLATFORMS = {
    MODEL_ONNX: "onnxruntime_onnx",
    MODEL_TORCHSCRIPT: "pytorch_libtorch",
    MODEL_EXPORTED: "pytorch_export",
    WEIGHTS: "pytorch_eager",
}
#: Samples of a batch of several requests, unless options or tuned.json set another number.
MAX_BATCH = 64
#: Seconds of one measurement of ``--workers auto``, and the throughput gain (factor) that justifies another session's memory.
_MEASURED_SECONDS, _WORTH = 0.2, 1.1


@dataclass(frozen=True)
class ServingSettings:
    """Options for opening models."""

    runtime: str = DEFAULT_RUNTIME  # A name from ``runtimes.catalogue.RUNNERS``
    # Sessions per model, each with one thread; None uses the bundle's tuned.json, or measures the useful number
    workers: int | None = None
    # Samples of a batch that is made of several requests; None uses the bundle's tuned.json if ``workers`` is None, or 64
    max_batch: int | None = None
    limits: ServingLimits = field(default_factory=ServingLimits)  # Limits of one request
    processes: int = 1  # Processes that serve the same models and share the cores


@dataclass
class ServedModel:
    """A model that answers requests; ``open_served`` creates it."""

    name: str  # Name in URLs
    version: str  # Version in URLs
    bundle: Bundle  # Its bundle
    spec: RunnerSpec  # Row of its runtime
    batcher: Batcher  # The queue before its sessions
    replay: Replay  # Result of the golden vectors on the worst session
    decoder: Decoder  # Decoder of its requests
    preprocessing: Preprocessing | None = None  # Preprocessing of pictures; None if it is not an image classifier
    threads: int = 1  # Threads of one session
    tuning: str | None = None  # What was applied of tuned.json, or why nothing was; None without the file

    def __post_init__(self) -> None:
        self.signature = self.bundle.manifest.signature
        self.labels = self.bundle.manifest.labels
        self.platform = PLATFORMS[self.spec.file]

    @property
    def statistics(self) -> ModelStatistics:
        """Counters of the model."""
        return self.batcher.statistics

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request."""
        return self.response(request, await self.batcher.submit(request.inputs, request.rows, request.timeout))

    def response(self, request: InferRequest, arrays: dict[str, Array]) -> InferResponse:
        """Return the answer with the requested outputs (rows, ...)."""
        return InferResponse(self.name, self.version, answer(arrays, request.outputs, self.labels), request.id)

    async def logits(self, pixels: Array) -> Array:
        """Return logits (n, classes) of images of the model's size: uint8 (n, height, width[, channels])."""
        assert self.preprocessing is not None
        spec, output = self.signature.inputs[0], self.signature.outputs[0].name
        parts = []
        for batch, rows in batches(self.preprocessing.apply(pixels), spec):
            parts.append((await self.batcher.submit({spec.name: batch}, rows))[output][:rows])
        return np.concatenate(parts)

    def metadata(self, versions: Sequence[str]) -> dict[str, Any]:
        """Return the protocol's "Model Metadata Response JSON Object"."""
        return {
            "name": self.name,
            "versions": list(versions),
            "platform": self.platform,
            "inputs": [_tensor(spec) for spec in self.signature.inputs],
            "outputs": [_tensor(spec) for spec in self.signature.outputs],
        }

    def config(self) -> dict[str, Any]:
        """Return Triton's model configuration as JSON ("Model Configuration Extension")."""
        batched = self.signature.batched
        return {
            "name": self.name,
            "platform": self.platform,
            "backend": self.platform.partition("_")[0],
            "max_batch_size": self.batcher.limits.rows if batched else 0,
            "input": [_config_tensor(spec, batched=batched) for spec in self.signature.inputs],
            "output": [_config_tensor(spec, batched=batched) for spec in self.signature.outputs],
            **({"dynamic_batching": {}} if batched else {}),
            "instance_group": [
                {"count": self.batcher.workers, "kind": "KIND_CPU" if self.spec.device == "cpu" else "KIND_GPU"}
            ],
            "parameters": {"intra_op_thread_count": {"string_value": str(self.threads)}},
        }

    async def close(self) -> None:
        """Answer accepted requests, then free the sessions."""
        await self.batcher.close()


def open_served(name: str, version: str, path: Path, settings: ServingSettings) -> ServedModel:
    """Check a bundle, open its sessions, and replay the golden vectors on each of them."""
    bundle = Bundle.open(path)
    bundle.check()
    check_labels(bundle)
    spec = runner_spec(settings.runtime)
    spec.require()
    found = _tuned(bundle, settings)
    tuned = found if isinstance(found, Choice) else None
    threads = tuned.threads if tuned else 1
    with ExitStack() as opened:
        runners: list[Runner] = []
        replays: list[Replay] = []

        def another() -> Runner:
            # TensorRT takes its precision from the environment that its process starts with.
            isolated = spec.device == "tensorrt"
            runner = opened.enter_context(spec.open(bundle, settings=RunSettings(threads=threads, isolated=isolated)))
            replays.append(replay_golden(runner, bundle))
            runners.append(runner)
            return runner

        another()
        feeds = _sample(bundle)
        cost = measured_cost(runners[0], feeds)
        # One session is enough for a model that runs on the event loop: the loop is the limit.
        inline = cost.seconds(_bytes(_one(runners[0], feeds))) < INLINE_SECONDS
        if settings.workers is None and tuned is None and not inline:
            add_workers(runners, another, feeds, most=max(1, available_cores() // settings.processes))
        wanted = tuned.sessions if tuned and not inline else settings.workers or 1
        while len(runners) < wanted:
            another()
        limits = settings.limits
        rows = settings.max_batch or (tuned.batch if tuned else MAX_BATCH)
        applied = replace(tuned, sessions=len(runners), batch=rows) if tuned else found
        batched = bundle.manifest.signature.batched
        batch_limits = BatchLimits(rows, limits.queue, limits.deadline)
        batcher = Batcher(runners, cost, batch_limits, batches=batched)
        worst = max(replays, key=lambda replay: replay.error)
        decoder = Decoder(bundle.manifest.signature, limits)
        opened.pop_all()
        tuning = None if applied is None else tuning_line(applied)
        model = ServedModel(name, version, bundle, spec, batcher, worst, decoder, threads=threads, tuning=tuning)
        with suppress(BnexportError):
            model.preprocessing = image_preprocessing(bundle)
        return model


def _tuned(bundle: Bundle, settings: ServingSettings) -> Choice | str | None:
    """Return the tuned settings that ``--workers auto`` uses; as in ``tuned_choice``, a reason or None without them."""
    if settings.workers is not None:
        return None
    found = tuned_choice(bundle, "throughput", settings.runtime)
    if isinstance(found, Choice) and settings.processes > 1:
        return f"{TUNED} was measured with one process; this server has {settings.processes}"
    return found


def measured_cost(runner: Runner, feeds: dict[str, Array]) -> Cost:
    """Measure the cost of one sample and of all ``feeds``, each as the best of several runs."""
    one = _one(runner, feeds)
    size_one, size_all = _bytes(one), _bytes(feeds)
    first, rest = _best(lambda: runner.run(one)), _best(lambda: runner.run(feeds))
    per_byte = max(rest - first, 0.0) / (size_all - size_one) if size_all > size_one else first / max(size_one, 1)
    return Cost(max(first - per_byte * size_one, 0.0), per_byte)


def add_workers(runners: list[Runner], another: Callable[[], Runner], feeds: dict[str, Array], *, most: int) -> None:
    """Open more sessions while each adds enough throughput for its memory."""
    one = _one(runners[0], feeds)
    rate = throughput(runners, one)
    while len(runners) < most:
        another()
        more = throughput(runners, one)
        if more < rate * _WORTH:
            runners.pop().close()
            return
        rate = more


def throughput(runners: Sequence[Runner], feeds: dict[str, Array], seconds: float = _MEASURED_SECONDS) -> float:
    """Return the batches per second of concurrent sessions, each in a separate thread."""
    start = time.perf_counter()

    def batches_of(runner: Runner) -> int:
        count = 0
        while time.perf_counter() < start + seconds:
            runner.run(feeds)
            count += 1
        return count

    with ThreadPoolExecutor(len(runners)) as pool:
        return sum(pool.map(batches_of, runners)) / (time.perf_counter() - start)


def _sample(bundle: Bundle) -> dict[str, Array]:
    """Return the golden inputs, repeated to at least eight samples if the batch varies."""
    inputs, _ = bundle.golden()
    if not bundle.manifest.signature.batched:
        return inputs
    return {name: np.concatenate([array] * -(-8 // len(array))) for name, array in inputs.items()}


def _one(runner: Runner, feeds: dict[str, Array]) -> dict[str, Array]:
    """Return one sample, or all samples of a fixed batch."""
    return {name: array[:1] for name, array in feeds.items()} if runner.signature.batched else feeds


def _bytes(feeds: dict[str, Array]) -> int:
    return sum(array.nbytes for array in feeds.values())


def _best(call: Callable[[], object], runs: int = 5) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if sum(times) > 1.0:
            break
    return min(times)


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": _sizes(spec.shape)}


def _config_tensor(spec: TensorSpec, *, batched: bool) -> dict[str, Any]:
    dims = _sizes(spec.sample_shape if batched else spec.shape)
    return {"name": spec.name, "data_type": f"TYPE_{DATATYPES[spec.dtype]}", "dims": dims}


def _sizes(shape: Sequence[int | str]) -> list[int]:
    return [-1 if isinstance(dim, str) else dim for dim in shape]
