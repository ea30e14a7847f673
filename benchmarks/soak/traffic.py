"""The requests of a soak: those with known answers, and those that must be refused."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.serving.wires import JSON, Headers, binary_logits, binary_request, json_body, json_logits, tensor
from bnexport.bundle import Bundle
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import BundleError
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.replay import golden_bound, scale
from bnexport.tensors import Array, TensorSpec

#: The engine of the server, which also computes the expected answers.
RUNTIME = "onnxruntime-cpu"
_POOL, _OF_EACH, _MOST_ROWS = 96, 64, 4
_GZIP = {"content-encoding": "gzip"}


@dataclass(frozen=True)
class Request:
    """A request, and the status and logits that its answer must have."""

    name: str  # a row of KINDS, or the fault of a malformed request
    status: int
    method: str
    path: str
    headers: Headers
    body: bytes
    expected: Array | None = None  # the logits (rows, classes)


@dataclass(frozen=True)
class Traffic:
    """All requests; ``bound`` limits the error of a logit."""

    good: Mapping[str, tuple[Request, ...]]  # by kind
    bad: tuple[Request, ...]
    bound: float

    def problem(self, request: Request, status: int, headers: Headers, body: bytes) -> str | None:
        """Return the fault of an answer; None if it is right."""
        if status != request.status:
            shown = body[:200].decode(errors="replace")
            return f"status {status} instead of {request.status}: {shown}"
        if request.expected is None:
            return None
        try:
            logits = np.asarray(_READERS[request.name](headers, body), np.float32).reshape(request.expected.shape)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            return f"it can't be read: {type(error).__name__}: {str(error)[:100]}"
        off = float(np.abs(logits.astype(np.float64) - request.expected).max())
        return None if off <= self.bound else f"a logit is off by {off:.3g}, more than {self.bound:.3g}"


def make_traffic(bundle: Bundle, seed: int) -> Traffic:
    """Make requests with random pictures, and compute their answers with ONNX Runtime in this process.

    BundleError: the bundle is not an image classifier with a variable batch size, or two pictures have equal answers.
    """
    preprocessing, given, wanted = _image_classifier(bundle)
    pixels = _pictures(preprocessing, np.random.default_rng(seed))
    images = preprocessing.apply(pixels)
    with runner_spec(RUNTIME).open(bundle, settings=RunSettings(threads=1)) as runner:
        logits = np.asarray(runner.run({given.name: images})[wanted.name], np.float64)
    bound = golden_bound(bundle.manifest, RUNTIME) * scale(logits)
    nearest = min(float(np.abs(a - b).max()) for a, b in itertools.combinations(logits, 2))
    if not nearest > 2 * bound:
        problem = f"{bundle.path} gives two random pictures the same logits: mixed-up answers could not be seen"
        raise BundleError(problem, remedy="Take a trained network")
    model = f"/v2/models/{bundle.manifest.name}"
    rng = np.random.default_rng(seed + 1)
    good: dict[str, list[Request]] = {kind: [] for kind in KINDS}
    for kind, _ in itertools.product(KINDS, range(_OF_EACH)):
        rows = rng.choice(_POOL, size=1 if kind == "picture" else rng.integers(1, _MOST_ROWS + 1), replace=False)
        path, headers, body = KINDS[kind](pixels[rows], images[rows], given)
        good[kind].append(Request(kind, 200, "POST", model + path, headers, body, logits[rows]))
    return Traffic({kind: tuple(found) for kind, found in good.items()}, _bad(model, images[:1], given), bound)


def _image_classifier(bundle: Bundle) -> tuple[Preprocessing, TensorSpec, TensorSpec]:
    manifest = bundle.manifest
    inputs, outputs = manifest.signature.inputs, manifest.signature.outputs
    if (
        manifest.preprocessing is None
        or len(inputs) != 1
        or len(outputs) != 1
        or len(outputs[0].shape) != 2
        or isinstance(inputs[0].shape[0], int)
        or (inputs[0].dtype, outputs[0].dtype) != ("float32", "float32")
    ):
        problem = f"{bundle.path} is not an image classifier in float32 that takes several images at a time"
        raise BundleError(problem, remedy="Take another bundle, such as models/bn_lenet/1")
    return Preprocessing.from_json(manifest.preprocessing), inputs[0], outputs[0]


def _pictures(preprocessing: Preprocessing, rng: np.random.Generator) -> Array:
    """Random pictures, uint8 (n, height, width[, channels]), each with another brightness."""
    shape = (_POOL, preprocessing.height, preprocessing.width, preprocessing.channels)
    pixels = rng.integers(0, 256, shape) * rng.uniform(0.1, 1.0, (_POOL, 1, 1, 1))
    found: Array = pixels.astype(np.uint8)
    return found[..., 0] if preprocessing.channels == 1 else found


def _as_binary(_pixels: Array, images: Array, given: TensorSpec) -> tuple[str, Headers, bytes]:
    return "/infer", *binary_request(images, given.name)


def _as_picture(pixels: Array, _images: Array, _given: TensorSpec) -> tuple[str, Headers, bytes]:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[0]).save(file, "PNG")
    return "/classify", {"content-type": "image/png"}, file.getvalue()


#: Kind of request -> pixels, images and the input's description to path, headers and body.
KINDS: dict[str, Callable[[Array, Array, TensorSpec], tuple[str, Headers, bytes]]] = {
    "JSON": lambda _, images, given: ("/infer", JSON, json_body(images, given.name)),
    "gzip": lambda _, images, given: ("/infer", JSON | _GZIP, gzip.compress(json_body(images, given.name), 1)),
    "binary": _as_binary,
    "picture": _as_picture,
}
_READERS: dict[str, Callable[[Headers, bytes], object]] = {
    "JSON": json_logits,
    "gzip": json_logits,
    "binary": binary_logits,
    "picture": lambda _, body: [found["logits"] for found in json.loads(body)["predictions"]],
}


def _bad(model: str, image: Array, given: TensorSpec) -> tuple[Request, ...]:
    """A sample of faults: in the body, its form, its values, the address, the method."""
    infer, described = f"{model}/infer", tensor(image, given.name)
    data = image.reshape(-1).tolist()

    def changed(**item: object) -> bytes:
        return json.dumps({"inputs": [described | {"data": data} | item]}).encode()

    whole = changed()
    nan = _as_binary(image, np.full_like(image, np.nan), given)
    short = _as_binary(image, image, given)
    return (
        Request("no JSON", 400, "POST", infer, JSON, b"{"),
        Request("JSON cut short", 400, "POST", infer, JSON, whole[:-5]),
        Request("no inputs", 400, "POST", infer, JSON, b"{}"),
        Request("another shape", 400, "POST", infer, JSON, changed(shape=[1, 3])),
        Request("too few values", 400, "POST", infer, JSON, changed(data=data[:-1])),
        Request("another name", 400, "POST", infer, JSON, changed(name="unknown")),
        Request("another datatype", 400, "POST", infer, JSON, changed(datatype="INT8")),
        Request("10^12 samples", 413, "POST", infer, JSON, changed(shape=[10**12, *image.shape[1:]], data=[])),
        Request("NaN", 400, "POST", infer, nan[1], nan[2]),
        Request("bytes that are missing", 400, "POST", infer, short[1], short[2][:-4]),
        Request("no gzip", 400, "POST", infer, JSON | _GZIP, whole),
        Request("another type", 415, "POST", infer, {"content-type": "text/html"}, whole),
        Request("no picture", 400, "POST", f"{model}/classify", {"content-type": "image/png"}, b"\x89PNG nothing more"),
        Request("no such model", 404, "POST", "/v2/models/unknown/infer", JSON, whole),
        Request("no such version", 404, "GET", f"{model}/versions/987654321", {}, b""),
        Request("no such address", 404, "GET", "/v3", {}, b""),
        Request("another method", 405, "DELETE", infer, {}, b""),
    )
