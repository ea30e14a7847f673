"""Compare int8 files of bnexport with those of onnxruntime's quantizer: labels, noise, saturation, time.

``python -m benchmarks.int8 [--page] [--photos FOLDER]`` measures the reference bundle on the test images of Fashion-MNIST, and
with a folder of photos EfficientNet-lite0 on crops of them. With --page it writes docs/results/int8.md. Calibration uses other
images than the measurement, and onnxruntime's quantizer gets the same ones. The reference bundle takes about 5 minutes on two
cores, the photos more than 10.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from benchmarks.command import finish, options, progress
from benchmarks.pages import render, write_page
from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.environment import describe, environment
from bnexport.errors import DataError
from bnexport.onnx_files.models import read_model
from bnexport.optional import require
from bnexport.quantization.integer_emulation import EXACT, IntegerEmulator, int8_layers
from bnexport.quantization.moments import seen_in_module
from bnexport.quantization.quantize import Calibration, quantise
from bnexport.tensors import Array

ROOT = Path(__file__).parents[1]
_BUNDLE, _PAGE = ROOT / "models" / "bn_lenet" / "1", ROOT / "docs" / "results" / "int8.md"
_CALIBRATION, _CROPS, _EMULATED, _ROUNDS = 1000, 64, 32, 7
_PICTURES = ("*.png", "*.jpg")


@dataclass(frozen=True)
class Subject:
    """A folded float32 network with its original, preprocessing, and images for calibration and measurement."""

    name: str
    model: ModelProto
    module: Any
    preprocessing: Mapping[str, Any]
    calibration: Array
    images: Array
    labels: Array | None


#: Name in the table -> arguments of onnxruntime's ``quantize_static``; None: bnexport without data, or calibrated.
PEERS: dict[str, dict[str, Any]] = {
    "quantize_static, defaults": {},
    "quantize_static, per channel": {"per_channel": True},
    "quantize_static, per channel, reduce_range": {"per_channel": True, "reduce_range": True},
}


def files(subject: Subject) -> Iterator[tuple[str, ModelProto]]:
    """Yield each way's name and int8 model."""
    for name, settings in PEERS.items():
        progress(f"{subject.name}: {name}")
        yield name, _by_onnxruntime(subject, settings)
    example = {"input": np.random.default_rng(0).standard_normal((2, *subject.images.shape[1:])).astype(np.float32)}
    calibrated = Calibration({"input": subject.calibration}, f"{len(subject.calibration)} images")
    for name, calibration in (("bnexport, without data", None), ("bnexport, calibrated", calibrated)):
        progress(f"{subject.name}: {name}")
        result = quantise(
            subject.model, example, lambda feeds: seen_in_module(subject.module, feeds),
            preprocessing=subject.preprocessing, calibration=calibration,
        )  # fmt: skip
        yield name, result.model


def _by_onnxruntime(subject: Subject, settings: Mapping[str, Any]) -> ModelProto:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(np.array_split(subject.calibration, max(len(subject.calibration) // 16, 1)))

        def get_next(self) -> dict[str, Array] | None:
            part = next(self._left, None)
            return None if part is None else {"input": part}

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        before.write_bytes(subject.model.SerializeToString())
        quantize_static(before, after, Reader(), **settings)
        return read_model(after.read_bytes())


def runner(model: ModelProto, *, precise: bool = False) -> Callable[[Array], Array]:
    """Return a function that runs a model in onnxruntime on one thread."""
    ort = require("onnxruntime", purpose="the comparison")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    if precise:
        settings.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return lambda images: np.concatenate(
        [session.run(None, {"input": part})[0] for part in np.array_split(images, max(len(images) // 64, 1))]
    )


def table_of(subject: Subject) -> list[list[str]]:
    """Return one row per file and kind of kernels."""
    plain = runner(subject.model)
    exact = plain(subject.images)
    rows = [_row("float32", "", exact, exact, subject.labels, "", "", "")]
    for name, model in files(subject):
        layers = int8_layers(model)
        unsafe = f"{sum(int(layer.unsafe.sum()) for layer in layers)} of {sum(len(layer.codes) for layer in layers)}"
        predicted = _emulated(subject, model, exact)
        for kernels in ("default", "precise"):
            run = runner(model, precise=kernels == "precise")
            ratio = _times(plain, run, subject.images[:1])
            rows.append(
                _row(name, kernels, run(subject.images), exact, subject.labels, unsafe, predicted, f"{ratio:.2f}")
            )
    return rows


def _row(
    name: str, kernels: str, scores: Array, exact: Array, labels: Array | None, unsafe: str, predicted: str, ratio: str
) -> list[str]:
    chosen = scores.argmax(axis=1)
    changed = int((chosen != exact.argmax(axis=1)).sum())
    right = "" if labels is None else f"{(chosen == labels).mean():.4f}"
    snr = "" if name == "float32" else f"{_snr(scores, exact):.1f}"
    return [name, kernels, right, f"{changed} of {len(exact)}", snr, predicted, unsafe, ratio]


def _snr(scores: Array, exact: Array) -> float:
    wide = exact.astype(np.float64)
    return float(10 * np.log10((wide**2).sum() / ((scores - wide) ** 2).sum()))


def _emulated(subject: Subject, model: ModelProto, exact: Array) -> str:
    """Return the noise of the emulated file on a few images, as a signal-to-noise ratio."""
    images = subject.images[:_EMULATED]
    outputs = IntegerEmulator(model, EXACT).evaluate({"input": images})
    return f"{_snr(next(iter(outputs.values())), exact[:_EMULATED]):.1f}"


def _times(one: Callable[[Array], Array], other: Callable[[Array], Array], image: Array) -> float:
    """Return the shortest time of the first over that of the second, run in turn."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for run, times in zip((one, other), taken, strict=True):
            start = time.perf_counter()
            for _ in range(3):
                run(image)
            times.append(time.perf_counter() - start)
    return min(taken[0]) / min(taken[1])


def reference_bundle() -> Subject:
    """Return the reference bundle, calibrated on training images and measured on the 10,000 test images."""
    from bnexport.data.datasets import load_test_images, load_train_images
    from bnexport.data.preprocessing import Preprocessing
    from bnexport.runtimes.torch_runners import original_network

    bundle = Bundle.open(_BUNDLE)
    image = Preprocessing.from_json(bundle.manifest.preprocessing or {})
    pixels, labels = load_test_images("fashion-mnist")
    training = image.apply(load_train_images("fashion-mnist")[0][:_CALIBRATION])
    module, model = original_network(bundle), read_model(bundle.file(MODEL_ONNX))
    return Subject("BN-LeNet", model, module, image.to_json(), training, image.apply(pixels), labels)


def efficientnet(photos: Path) -> Subject:
    """Return EfficientNet-lite0 with crops of photos: every second one for calibration, the others for measurement."""
    import torch

    from benchmarks.real_networks import NETWORKS, _module
    from bnexport.data.preprocessing import Preprocessing
    from bnexport.exporting.export_onnx import export_onnx
    from bnexport.exporting.signature import signature_of
    from bnexport.folding.fold import fold

    module = _module(next(network for network in NETWORKS if network.name == "EfficientNet-lite0"))
    inputs = (torch.randn(2, 3, 224, 224),)
    folded = fold(module, inputs).model
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, MODEL_ONNX)
        export_onnx(folded, inputs, file, signature=signature_of(folded, inputs, input_names=("input",)))
        model = read_model(file)
    image = Preprocessing(3, 224, 224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    crops = image.apply(_crops(photos, 2 * _CROPS))
    return Subject("EfficientNet-lite0", model, module, image.to_json(), crops[1::2], crops[::2], None)


def _crops(photos: Path, n: int) -> Array:
    """Return random square crops of a folder's colour photos, of at least 180 pixels, resized to 224."""
    picture = require("PIL.Image", purpose="photos")
    opened = [picture.open(path) for pattern in _PICTURES for path in sorted(photos.glob(pattern))]
    found = [item for item in opened if item.mode == "RGB" and min(item.size) >= 256]
    if not found:
        raise DataError(f"{photos} has no colour photo of 256 pixels or more", remedy="Give skimage's data folder")
    rng, crops = np.random.default_rng(0), []
    for number in range(n):
        photo = found[number % len(found)]
        side = int(rng.integers(180, min(photo.size) + 1))
        left, top = (int(rng.integers(0, size - side + 1)) for size in photo.size)
        crops.append(np.asarray(photo.crop((left, top, left + side, top + side)).resize((224, 224))))
    return np.stack(crops)


def page(tables: Sequence[tuple[str, int, int, list[list[str]]]]) -> str:
    """Return the page of the tables: name, calibration images, measured images, rows."""
    machine, load = describe(environment()), os.getloadavg()[0]
    return render("int8.md.jinja", tables=tables, machine=machine, load=load)


def main() -> int:
    """Measure, print, and write the page where that is requested."""
    parser = options("int8", __doc__)
    parser.add_argument("--page", action="store_true", help="Write docs/results/int8.md.")
    parser.add_argument("--photos", type=Path, help="Folder of colour photos, as skimage's data folder.")
    given = parser.parse_args()
    subjects = [reference_bundle()]
    if given.photos is not None:
        subjects.append(efficientnet(given.photos))
    text = page([(item.name, len(item.calibration), len(item.images), table_of(item)) for item in subjects])
    print(text)
    if given.page:
        write_page(text.split("\n"), _PAGE)
    return 0


if __name__ == "__main__":
    finish("int8", main)
