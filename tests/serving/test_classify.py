"""Pictures in, labels out, by the bundle's own preprocessing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.bundles import copy_bundle, reseal
from support.pictures import png
from support.serving import Server, serving

from bnexport.bundle import Bundle
from bnexport.serving.predictor import predict_images

PATH = "/v2/models/bn_lenet/classify"


def form(pictures: list[bytes], *, names: bool = True) -> tuple[bytes, dict[str, str]]:
    body = b""
    for index, content in enumerate(pictures):
        name = b'; filename="p%d.png"' % index if names else b""
        body += b'--xx\r\nContent-Disposition: form-data; name="images"%s\r\nContent-Type: image/png\r\n\r\n' % name
        body += content + b"\r\n"
    return body + b"--xx--\r\n", {"content-type": 'multipart/form-data; boundary="xx"'}


@pytest.mark.parametrize(
    ("kind", "mime"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("PNG", ""), ("JPEG", "image/png")]
)
@pytest.mark.parametrize("path", [PATH, "/v2/models/bn_lenet/versions/1/classify"])
def test_one_picture(
    server: Server, models: Path, pixels: np.ndarray, tmp_path: Path, kind: str, mime: str, path: str
) -> None:
    (tmp_path / "picture").write_bytes(content := png(pixels[3], kind))
    (want,) = predict_images(models / "bn_lenet" / "1", tmp_path / "picture")
    answer = server.ask("POST", path, content, {"content-type": mime} if mime else {})
    assert answer.status == 200, answer.body
    assert (answer.json["model_name"], answer.json["model_version"]) == ("bn_lenet", "1")
    (got,) = answer.json["predictions"]
    assert (got["label"], got["index"]) == (want.label, want.index)
    assert got["probability"] == pytest.approx(want.probability, rel=1e-5)
    assert got["logits"] == pytest.approx(list(want.logits), abs=1e-5)


def test_pictures_of_any_size_are_fitted(server: Server, models: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    wide = np.array(Image.fromarray(pixels[0]).resize((71, 40)).convert("RGBA"))
    (tmp_path / "wide.png").write_bytes(content := png(wide))
    (want,) = predict_images(models / "bn_lenet" / "1", tmp_path / "wide.png")
    (got,) = server.ask("POST", PATH, content, {"content-type": "image/png"}).json["predictions"]
    assert got["logits"] == pytest.approx(list(want.logits), abs=1e-5)


@pytest.mark.parametrize("names", [True, False])
def test_several_pictures(server: Server, pixels: np.ndarray, logits: np.ndarray, names: bool) -> None:
    body, headers = form([png(image) for image in pixels], names=names)
    predictions = server.ask("POST", PATH, body, headers).json["predictions"]
    assert [item["image"] for item in predictions] == [f"p{i}.png" if names else f"image {i}" for i in range(12)]
    assert np.allclose([item["logits"] for item in predictions], logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    weights = np.exp(logits - logits.max(1, keepdims=True))
    softmax = (weights / weights.sum(1, keepdims=True)).max(1)
    assert [item["probability"] for item in predictions] == pytest.approx(softmax, rel=1e-4)


def test_the_bundle_s_labels_and_preprocessing(models: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    bundle = Bundle.open(models / "bn_lenet" / "1")
    changed = dict(bundle.manifest.preprocessing or {}, mean=[0.5], std=[2.0])
    labels = tuple(f"class {index}" for index in range(10))
    reseal(copy_bundle(bundle, tmp_path / "b"), preprocessing=changed, labels=labels)
    reseal(copy_bundle(bundle, tmp_path / "m" / "plain" / "1"), name="plain", preprocessing=None)
    (tmp_path / "p.png").write_bytes(png(pixels[5]))
    (want,) = predict_images(tmp_path / "b", tmp_path / "p.png")
    with serving(tmp_path / "b", tmp_path / "log") as server:
        (got,) = server.ask("POST", PATH, png(pixels[5]), {"content-type": "image/png"}).json["predictions"]
        assert got["logits"] == pytest.approx(list(want.logits), abs=1e-5)
        assert got["label"] == f"class {want.index}"
    with serving(tmp_path / "m", tmp_path / "log") as server:
        answer = server.ask("POST", "/v2/models/plain/classify", png(pixels[5]), {"content-type": "image/png"})
        assert (answer.status, "has no preprocessing for pictures" in answer.error) == (400, True)
