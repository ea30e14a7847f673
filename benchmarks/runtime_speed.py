"""Measure runtimes side by side: every network, precision and engine in turn, and the targets of the tuned settings.

``python -m benchmarks.runtime_speed [NETWORK...]`` writes docs/results/benchmark.md. Every engine runs in its process with
its own defaults; in each round all of them measure in turn. Weights are random, which does not change the speed, and BatchNorm
statistics are random per channel. The targets concern BN-LeNet; ``--no-table`` measures only these. It takes 12 minutes, and 4
with ``--no-table``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from benchmarks import main_job, real_networks
from benchmarks.clock import Spread
from benchmarks.command import finish, known, options, progress
from benchmarks.pages import ranged, render, write_page
from benchmarks.predict import in_processes
from bnexport.benchmarking.benchmark import benchmark
from bnexport.benchmarking.benchmark_report import recommendations
from bnexport.benchmarking.benchmark_request import BenchmarkRequest
from bnexport.bundle import MODEL_ONNX, MODEL_TORCHSCRIPT, WEIGHTS, Bundle
from bnexport.environment import available_cores
from bnexport.errors import BnexportError, RuntimeUnavailable
from bnexport.exporting.export_request import ExportRequest
from bnexport.optional import one_line, require
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import runner_spec
from bnexport.serving.bulk.bulk_prediction import predict_in_bulk
from bnexport.serving.bulk.bulk_request import BulkRequest
from bnexport.tensors import Array
from bnexport.tuned import Choice, Goal, Tuning, write_tuning

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "benchmark.md"
REFERENCE = ROOT / "models" / "bn_lenet" / "1"
LENET, LITE = "bn_lenet", "efficientnet-lite0"
#: Network -> shape of an image, and images per call of the throughput.
NETWORKS: dict[str, tuple[tuple[int, ...], int]] = {
    LENET: ((1, 28, 28), 32),
    "resnet18": ((3, 224, 224), 8),
    "mobilenet_v2": ((3, 224, 224), 8),
    LITE: ((3, 224, 224), 8),
}
#: Smallest throughput over the best peer's, smallest share of the bare loop, and largest latency over bare ONNX Runtime's.
GAIN, SHARE, LATENCY = 1.2, 0.9, 1.05
#: Batches from which the settings of BN-LeNet are chosen, and those of the peers.
TUNED_BATCHES, PEER_BATCHES = (1, 16, 32, 64, 128), (32, 256)
#: Engines with their own defaults, next to the tuned settings.
PEERS = ("ONNX Runtime", "OpenVINO, throughput hint")
_CHILD = "import sys; from benchmarks.runtime_speed import child; child(*sys.argv[1:])"
_INPUTS = 8
Run = Callable[[Array], object]


def _torch(load: Callable[[Any, Path], Any], path: Path, _threads: int | None) -> Run:
    import torch

    module = load(torch, path)
    return torch.inference_mode()(lambda x: module(torch.from_numpy(x)).numpy())


def _onnxruntime(path: Path, threads: int | None) -> Run:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path / MODEL_ONNX, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})


def _openvino(path: Path, threads: int | None) -> Run:
    openvino = require("openvino", purpose="this side")
    hints = {} if threads is None else {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path / MODEL_ONNX, "CPU", hints).create_infer_request()
    return lambda x: request.infer([x])


def _openvino_queue(path: Path, _threads: int | None) -> Run:
    """Return a function that starts a request as soon as one of the queue is free."""
    openvino = require("openvino", purpose="this side")
    compiled = openvino.Core().compile_model(path / MODEL_ONNX, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})
    queue = openvino.AsyncInferQueue(compiled)
    return lambda x: queue.start_async([x])


def _ours(path: Path, threads: int | None, runtime: str) -> Run:
    bundle = Bundle.open(path)
    runner = runner_spec(runtime).open(bundle, settings=RunSettings(threads=threads))
    name = bundle.manifest.signature.inputs[0].name
    return lambda x: runner.run_fitting({name: x})


#: Engine -> opener of its session, with None for its own number of threads. Names of runtimes open bnexport's runner.
#: The files of torch.save are written by this program.
ENGINES: dict[str, Callable[[Path, int | None], Run]] = {
    "torch eager": partial(_torch, lambda torch, path: torch.load(path, weights_only=False)),
    "torch.compile": partial(_torch, lambda torch, path: torch.compile(torch.load(path, weights_only=False))),
    "TorchScript": partial(_torch, lambda torch, path: torch.jit.load(path / MODEL_TORCHSCRIPT)),
    "ONNX Runtime": _onnxruntime,
    "OpenVINO": _openvino,
    "OpenVINO, throughput hint": _openvino_queue,
}
#: Engine -> the precisions that it is measured in; the others need files that bnexport does not write.
MEASURED = {"torch eager": 1, "torch.compile": 1, "TorchScript": 1, "ONNX Runtime": 4, "OpenVINO": 4}
PACKED = "float32, packed pools"
PRECISIONS = ("float32", "int8", "uint8 input", PACKED)


class Sample(NamedTuple):
    """One measurement of one side: images per second of all its processes, and the median milliseconds of a call."""

    rate: float
    p50: float


def opener(engine: str, path: Path, threads: int | None) -> Run:
    """Return the function that runs a batch."""
    return ENGINES[engine](path, threads) if engine in ENGINES else _ours(path, threads, engine)


def child(engine: str, path: str, threads: str) -> None:
    """Open a session, and measure as each line of standard input requests, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines' prints
    try:
        run = opener(engine, Path(path), int(threads) or None)
        answers.write("{}\n")
        answers.flush()
        for line in sys.stdin:
            wanted = json.loads(line)
            answers.write(json.dumps(measured(run, inputs(wanted), wanted["seconds"])) + "\n")
            answers.flush()
    except Exception as error:  # engines raise various classes; the parent prints it
        answers.write(json.dumps({"error": one_line(error)}) + "\n")
        answers.flush()


def inputs(wanted: Mapping[str, Any]) -> list[Array]:
    """Return random batches of a shape and type."""
    rng = np.random.default_rng(0)
    shape = (_INPUTS, *wanted["shape"])
    if wanted["dtype"] == "uint8":
        return list(rng.integers(0, 256, shape, np.uint8))
    return list(rng.standard_normal(shape, np.float32))


def measured(run: Run, batches: Sequence[Array], seconds: float) -> dict[str, float]:
    """Call for some seconds with changing inputs, after a tenth of them for warming up."""
    times: list[float] = []
    for duration in (seconds / 10, seconds):
        times, start = [], time.perf_counter()
        for batch in itertools.cycle(batches):
            before = time.perf_counter()
            run(batch)
            after = time.perf_counter()
            times.append(after - before)
            if after - start >= duration:
                break
    return {"rate": len(times) * len(batches[0]) / (after - start), "p50": statistics.median(times) * 1e3}


class Side:
    """One engine in one or several processes; ``measure`` lets all of them run at once. Use it in a ``with`` block.

    Raises:
        RuntimeUnavailable: The engine can't open its file here.
    """

    def __init__(self, engine: str, path: Path, threads: int = 0, sessions: int = 1) -> None:
        command = [sys.executable, "-W", "ignore", "-c", _CHILD, engine, str(path), str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._engine = engine
        self._children = [subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, **pipes) for _ in range(sessions)]
        try:
            self._answers()
        except BaseException:
            self.__exit__()
            raise

    def measure(self, shape: Sequence[int], seconds: float, dtype: str = "float32") -> Sample:
        """Measure calls of one shape, batch first."""
        line = json.dumps({"shape": list(shape), "seconds": seconds, "dtype": dtype}) + "\n"
        for process in self._children:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        found = self._answers()
        return Sample(sum(item["rate"] for item in found), statistics.median(item["p50"] for item in found))

    def _answers(self) -> list[dict[str, float]]:
        found = []
        for process in self._children:
            assert process.stdout is not None
            found.append(json.loads(process.stdout.readline() or '{"error": "the process ended"}'))
            if "error" in found[-1]:
                raise RuntimeUnavailable(f"{self._engine}: {found[-1]['error']}", remedy="Leave the engine away")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._children:
            process.kill()
            process.communicate()


def exported(network: str, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Write a network and its bundles; return precision -> bundle, and precision -> the reason why there is none."""
    from bnexport.pipeline import fold_and_export

    source = _prepared(network, folder)
    channels = NETWORKS[network][0][0]
    scaling = {} if network == LENET else {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    wanted: dict[str, dict[str, Any]] = {
        "float32": {"formats": ("onnx", "torchscript")},
        "int8": {"precision": "int8", **scaling},
        "uint8 input": {"input_type": "uint8", "formats": ("onnx",), **scaling},
    }
    if network == LENET:
        wanted[PACKED] = {"pack_pools": True}
    found, missing = {}, {}
    for precision, extra in wanted.items():
        progress(f"{network}: {precision}")
        out = folder / network / re.sub(r"\W+", "_", precision) / "1"
        shape = "x".join(map(str, NETWORKS[network][0]))
        try:
            fold_and_export(source, out, request=ExportRequest(inputs=(shape,), force=True, **extra))
            found[precision] = out
        except BnexportError as error:
            missing[precision] = one_line(error)
    return found, missing


def _prepared(network: str, folder: Path) -> Any:
    """Write NETWORK.module for torch, and return the source of its bundles."""
    import torch

    if network != LITE:
        main_job.prepare(network, folder)
        file = folder / f"{network}.module"
        return str(main_job.CHECKPOINT) if network == LENET else torch.load(file, weights_only=False)
    from benchmarks.efficientnet_lite import EfficientNetLite

    row = next(item for item in real_networks.NETWORKS if item.name.lower() == LITE)
    module = EfficientNetLite()
    module.load_state_dict(torch.load(real_networks.unpacked(row) / row.member, weights_only=True))
    module.eval()
    torch.save(module, folder / f"{network}.module")
    return module


class Row(NamedTuple):
    """One row of the table."""

    name: str  # Precision and engine
    latency: list[float]  # Milliseconds of a call with one image, by round
    rate: list[float]  # Images per second of larger calls, by round


def table(network: str, folder: Path, rounds: int, seconds: float) -> tuple[list[Row], dict[str, str]]:
    """Measure every engine on every file of a network in turn; return the rows, and what is missing with its reason."""
    bundles, missing = exported(network, folder)
    shape, batch = NETWORKS[network]
    with ExitStack() as stack:
        sides: dict[str, tuple[Side, str]] = {}
        for engine, count in MEASURED.items():
            for precision in PRECISIONS[:count]:
                file = folder / f"{network}.module" if engine.startswith("torch") else bundles.get(precision)
                if file is None:
                    continue
                try:
                    side = stack.enter_context(Side(engine, file))
                    dtype = "uint8" if precision == "uint8 input" else "float32"
                    side.measure((1, *shape), seconds, dtype)  # compiles, and fails here if it can't
                    side.measure((batch, *shape), seconds, dtype)
                    sides[f"{precision}, {engine}"] = side, dtype
                except RuntimeUnavailable as error:
                    missing[f"{precision}, {engine}"] = error.message
        rows = {name: Row(name, [], []) for name in sides}
        for number in range(1, rounds + 1):
            progress(f"{network}: round {number} of {rounds}")
            for name, (side, dtype) in sides.items():
                rows[name].latency.append(side.measure((1, *shape), seconds, dtype).p50)
                rows[name].rate.append(side.measure((batch, *shape), seconds, dtype).rate)
    return list(rows.values()), missing


def cells_of(rows: Sequence[Row]) -> list[list[str]]:
    """Return the cells of a network's rows, with ratios to the first row in the same rounds."""
    first, found = rows[0], []
    for row in rows:
        slower, faster = Spread.ratio(row.latency, first.latency), Spread.ratio(row.rate, first.rate)
        cells = [ranged(Spread.of(row.latency), 3), ranged(slower), ranged(Spread.of(row.rate), 0), ranged(faster)]
        found.append([row.name, *cells])
    return found


class Target(NamedTuple):
    """One target with its ratios of each round, and the settings that were compared."""

    what: str
    compared: str
    ratio: Spread
    bound: float | None  # None: only for comparison
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Return True if the median ratio meets the bound."""
        if self.bound is None:
            return True
        return self.ratio.middle >= self.bound if self.at_least else self.ratio.middle <= self.bound

    def cells(self) -> list[str]:
        """Return the cells of its row."""
        judged = [f"at {'least' if self.at_least else 'most'} {self.bound}", "met" if self.met else "missed"]
        judged = ["-", "-"] if self.bound is None else judged
        return [self.what, self.compared, ranged(self.ratio, 3), *judged]


class Tuned(NamedTuple):
    """A bundle with settings for it."""

    bundle: Path
    choice: Choice

    def __str__(self) -> str:
        return f"{self.choice}{', packed pools' if self.bundle.parent.name == 'packed' else ''}"


def tuned(bundles: Sequence[Path]) -> tuple[Mapping[Goal, Tuned], Tuned]:
    """Measure bundles by ``bnexport benchmark``, and write each tuned.json even on a busy machine.

    Return the best settings of all bundles by goal, and those of the first bundle for the throughput.
    """
    progress("bnexport benchmark of BN-LeNet")
    names = [name for name in ("onnxruntime-cpu", "openvino-cpu") if runner_spec(name).available() is None]
    request = BenchmarkRequest(tuple(bundles), runtimes=tuple(names), batches=TUNED_BATCHES)
    results = benchmark(request).results
    own: list[dict[Goal, Choice]] = []
    for bundle in bundles:
        rows = [result for result in results if result.variant.subject.bundle.path == bundle]
        own.append({item.goal: item.best.choice for item in recommendations(rows)})
        write_tuning(bundle, Tuning.here(Bundle.open(bundle), own[-1]))
    best: dict[Goal, Tuned] = {
        item.goal: Tuned(item.best.variant.subject.bundle.path, item.best.choice) for item in recommendations(results)
    }
    return best, Tuned(bundles[0], own[0]["throughput"])


def benchmark_app(model: Path, shape: Sequence[int], seconds: float) -> float:
    """Return the images per second that OpenVINO's tool reports with the throughput hint."""
    command = [
        str(Path(sys.executable).with_name("benchmark_app")), "-m", str(model), "-hint", "throughput", "-d", "CPU",
        "-shape", json.dumps(list(shape)).replace(" ", ""), "-t", str(max(1, round(seconds))),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeUnavailable(f"benchmark_app can't be run: {one_line(error)}", remedy="Install openvino") from error
    if (found := re.search(r"Throughput:\s+([\d.]+) FPS", done.stdout)) is None:
        raise RuntimeUnavailable(f"benchmark_app failed: {done.stdout[-300:]}", remedy="Run it by hand")
    return float(found[1])


def throughput(best: Tuned, plain: Tuned, rounds: int, seconds: float) -> Iterator[Target]:
    """Compare tuned settings with each peer's defaults on the plain file, and yield the comparisons, the best peer's first."""
    shape = NETWORKS[LENET][0]
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(c.runtime, path, c.threads, c.sessions)) for path, c in (best, plain)]
        peers = {name: stack.enter_context(Side(name, plain.bundle)) for name in PEERS}
        ours: list[list[float]] = [[], []]
        for number in range(1, rounds + 1):
            progress(f"throughput: round {number} of {rounds}")
            for side, found, (_, choice) in zip(sides, ours, (best, plain), strict=True):
                found.append(side.measure((choice.batch, *shape), seconds).rate)
            for (name, side), batch in itertools.product(peers.items(), PEER_BATCHES):
                rate = side.measure((batch, *shape), seconds).rate
                rates.setdefault(f"{name}, batch {batch}", []).append(rate)
            for batch in PEER_BATCHES:
                rate = benchmark_app(plain.bundle / MODEL_ONNX, (batch, *shape), seconds)
                rates.setdefault(f"benchmark_app -hint throughput, batch {batch}", []).append(rate)
    first, *others = sorted(rates, key=lambda name: -statistics.median(rates[name]))

    def compared(what: str, tuned: Tuned, found: list[float], name: str, bound: float | None) -> Target:
        figures = f"{tuned}: {statistics.median(found):,.0f} images/s; {name}: {statistics.median(rates[name]):,.0f}"
        return Target(f"throughput, {what}", figures, Spread.ratio(found, rates[name]), bound)

    yield compared("tuned over the best peer's default", best, ours[0], first, GAIN)
    for name in others:
        yield compared("tuned over a peer's default", best, ours[0], name, None)
    yield compared("tuned, of the plain file, over the best peer's default", plain, ours[1], first, None)


def latency(best: Tuned, plain: Path, rounds: int, seconds: float) -> Target:
    """Compare the tuned settings at batch 1 with bare ONNX Runtime on the plain file, with the best number of threads."""
    shape, counts, choice = (1, *NETWORKS[LENET][0]), sorted({1, available_cores()}), best.choice
    found: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        own = (choice.runtime, choice.threads)
        sides = {("ONNX Runtime", count): stack.enter_context(Side("ONNX Runtime", plain, count)) for count in counts}
        sides[own] = stack.enter_context(Side(choice.runtime, best.bundle, choice.threads))
        for number in range(1, rounds + 1):
            progress(f"latency: round {number} of {rounds}")
            for key, side in sides.items():
                found.setdefault(key, []).append(side.measure(shape, seconds).p50)
    mine = found.pop(own)
    bare = min(found, key=lambda key: statistics.median(found[key]))
    compared = (
        f"{best}: {statistics.median(mine) * 1e3:.1f} us; "
        f"bare ONNX Runtime, threads: {bare[1]}: {statistics.median(found[bare]) * 1e3:.1f} us"
    )
    what, ratio = "latency of one image, tuned over bare ONNX Runtime", Spread.ratio(mine, found[bare])
    return Target(what, compared, ratio, LATENCY, at_least=False)


def bulk(best: Tuned, rounds: int, images: int) -> Target:
    """Compare ``predict --out``, which reads tuned.json, with bare loops of the same settings.

    Both run over all images and over a tenth of them, and the difference of the times counts, without the start.
    """
    bundle, choice = best
    bare, ours = [], []
    with tempfile.TemporaryDirectory() as place:
        pixels = np.random.default_rng(0).integers(0, 256, (images, *NETWORKS[LENET][0][1:]), np.uint8)
        files = {count: Path(place, f"{count}.npy") for count in (images // 10, images)}
        for count, file in files.items():
            np.save(file, pixels[:count])
        os.sync()  # or the disk would be busy with them

        def loop(file: Path, count: int) -> None:
            in_processes(choice.sessions, count, _bare_loop, bundle, choice, file)

        def predict(file: Path, _count: int) -> None:
            with tempfile.TemporaryDirectory(dir=place) as out:
                predict_in_bulk(bundle, [file], Path(out, "out"), request=BulkRequest(runtime=choice.runtime))

        for number in range(1, rounds + 1):
            progress(f"predict: round {number} of {rounds}")
            bare.append(_rate(files, loop))
            ours.append(_rate(files, predict))
    compared = (
        f"`predict --out --runtime {choice.runtime}`: {statistics.median(ours):,.0f} images/s; "
        f"bare loop of {choice.settings}: {statistics.median(bare):,.0f}"
    )
    what = f"predict --out of {images:,} images, share of the bare loop"
    return Target(what, compared, Spread.ratio(ours, bare), SHARE)


def _rate(files: Mapping[int, Path], run: Callable[[Path, int], object]) -> float:
    """Return the additional images of the larger run per additional second; the start cancels out."""
    (small, few), (large, many) = files.items()
    times = []
    for file, count in ((few, small), (many, large)):
        start = time.perf_counter()
        run(file, count)
        times.append(time.perf_counter() - start)
    return (large - small) / (times[1] - times[0])


def _bare_loop(bundle: Path, choice: Choice, images: Path, start: int, stop: int) -> None:
    """Scale uint8 to float32 and call the engine, and keep no answer."""
    engine = {"onnxruntime-cpu": "ONNX Runtime", "openvino-cpu": "OpenVINO"}[choice.runtime]
    run = opener(engine, bundle, choice.threads)
    array = np.load(images, mmap_mode="r", allow_pickle=False)
    for at in range(start, stop, choice.batch):
        run(array[at : min(at + choice.batch, stop), None].astype(np.float32) / np.float32(255))


def targets(folder: Path, rounds: int, seconds: float, images: int) -> list[Target]:
    """Measure the targets on a copy of the reference bundle, and on a packed one of the same weights."""
    from bnexport.pipeline import fold_and_export

    plain, packed = (folder / name / "1" for name in ("plain", "packed"))
    shutil.copytree(REFERENCE, plain)
    fold_and_export(REFERENCE / WEIGHTS, packed, request=ExportRequest(pack_pools=True))
    choices, first = tuned((plain, packed))
    return [
        *throughput(choices["throughput"], first, rounds, seconds),
        bulk(choices["throughput"], rounds, images),
        latency(choices["latency"], plain, rounds, seconds),
    ]


def main() -> int:
    """Measure, write the page, and return 1 where a target is missed."""
    parser = options("runtime_speed", __doc__)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of one measurement in one round")
    parser.add_argument("--images", type=int, default=1_000_000, help="of predict --out")
    parser.add_argument("--no-table", action="store_true", help="measure only the targets")
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    chosen = known(parser, given.networks, tuple(NETWORKS), "network")
    parts: list[tuple[str, list[list[str]], dict[str, str], int]] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bnexport-runtime-speed-") as place:
        found = targets(Path(place), given.rounds, given.seconds, given.images)
        for network in () if given.no_table else chosen:
            if network == LITE and "BNEXPORT_WHEELS" not in os.environ:
                parts.append((network, [], {LITE: "BNEXPORT_WHEELS names no folder of wheels"}, 1))
                continue
            rows, missing = table(network, Path(place), given.rounds, given.seconds)
            parts.append((network, cells_of(rows), missing, NETWORKS[network][1]))
    page = render(
        "runtime_speed.md.jinja", parts=parts, targets=[item.cells() for item in found], rounds=given.rounds,
        seconds=given.seconds, load=load, load_after=os.getloadavg()[0],
    )  # fmt: skip
    write_page([page], given.out)
    return 0 if all(item.met for item in found) else 1


if __name__ == "__main__":
    finish("runtime_speed", main)
