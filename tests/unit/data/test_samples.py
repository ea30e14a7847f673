"""A user's own samples: each kind of file, and each way to be wrong, in one sentence with the file and the index."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnexport.data.preprocessing import Preprocessing
from bnexport.data.samples import Samples, load_samples
from bnexport.errors import BadInput, DataError
from bnexport.tensors import Signature, TensorSpec

GREY = Signature(
    (TensorSpec("input", "float32", ("batch", 1, 6, 5)),), (TensorSpec("logits", "float32", ("batch", 3)),)
)
COLOUR = Signature(
    (TensorSpec("input", "float32", ("batch", 3, 6, 5)),), (TensorSpec("logits", "float32", ("batch", 3)),)
)
TWO = Signature(
    (TensorSpec("a", "float32", ("batch", 2)), TensorSpec("b", "int64", ("batch",))),
    (TensorSpec("y", "float32", ("batch", 4)),),
)
GREY_SCALE = Preprocessing(1, 6, 5, mean=(0.5,), std=(0.25,))
COLOURS = Preprocessing(3, 6, 5, mean=(0.0,) * 3, std=(1.0,) * 3)
NAMES = ("cat", "dog", "0ther")
RNG = np.random.default_rng(3)
FLOATS = RNG.random((7, 1, 6, 5), dtype=np.float32)
PIXELS = RNG.integers(0, 256, (7, 6, 5), dtype=np.uint8)


def load(
    path: Path, signature: Signature = GREY, preprocessing: Preprocessing | None = GREY_SCALE, **options
) -> Samples:
    return load_samples(path, signature, preprocessing, labels=NAMES, **options)


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def test_an_array_is_fed_as_it_is(tmp_path: Path) -> None:
    found = load(save(tmp_path / "mine.npy", FLOATS))
    assert (list(found.feeds), found.labels) == (["input"], None)
    assert np.array_equal(found.feeds["input"], FLOATS)
    assert type(found.feeds["input"]) is np.ndarray
    assert found.described == "7 samples of mine.npy, without labels"
    assert str(tmp_path) not in found.described


@pytest.mark.parametrize("shape", [(7, 6, 5), (7, 6, 5, 1)])
def test_grey_pixels_go_through_the_preprocessing(tmp_path: Path, shape: tuple[int, ...]) -> None:
    found = load(save(tmp_path / "mine.npy", PIXELS.reshape(shape)))
    assert np.array_equal(found.feeds["input"], GREY_SCALE.apply(PIXELS))
    assert found.described == "7 images of mine.npy, without labels"


def test_one_image_is_a_batch_of_one(tmp_path: Path) -> None:
    assert np.array_equal(load(save(tmp_path / "a.npy", PIXELS[0])).feeds["input"], GREY_SCALE.apply(PIXELS[:1]))


def test_colour_pixels_keep_their_channels(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    found = load(save(tmp_path / "mine.npy", pixels), COLOUR, COLOURS)
    assert np.array_equal(found.feeds["input"][2, 1], pixels[2, :, :, 1].astype(np.float32) * np.float32(1 / 255))


def test_an_input_of_bytes_gets_bytes(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("input", "uint8", ("batch", 6, 5)),), GREY.outputs)
    assert np.array_equal(load(save(tmp_path / "a.npy", PIXELS), signature).feeds["input"], PIXELS)


def test_half_precision_inputs_get_half_precision(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("input", "float16", ("batch", 1, 6, 5)),), GREY.outputs)
    found = load(save(tmp_path / "a.npy", PIXELS), signature).feeds["input"]
    assert found.dtype == np.float16
    assert np.array_equal(found, GREY_SCALE.apply(PIXELS).astype(np.float16))


def test_named_arrays_with_labels(tmp_path: Path) -> None:
    a, b = RNG.random((5, 2), dtype=np.float32), np.arange(5)
    np.savez_compressed(tmp_path / "two.npz", a=a, b=b, labels=np.array([0, 1, 2, 2, 1], np.uint8))
    found = load_samples(tmp_path / "two.npz", TWO, None)
    assert np.array_equal(found.feeds["a"], a)
    assert np.array_equal(found.feeds["b"], b)
    assert found.labels is not None
    assert (found.labels.dtype, found.labels.tolist()) == (np.int64, [0, 1, 2, 2, 1])
    assert found.described == "5 samples of two.npz, with labels"


def test_pixels_in_an_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", input=PIXELS, labels=np.arange(7) % 3)
    found = load(tmp_path / "p.npz")
    assert np.array_equal(found.feeds["input"], GREY_SCALE.apply(PIXELS))
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_an_input_may_be_called_labels(tmp_path: Path) -> None:
    signature = Signature((TensorSpec("labels", "float32", ("batch", 2)),), GREY.outputs)
    np.savez(tmp_path / "x.npz", labels=np.ones((3, 2), np.float32))
    assert load(tmp_path / "x.npz", signature).labels is None


def pictures(folder: Path, **files: np.ndarray) -> Path:
    for name, pixels in files.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, format="PNG")
    return folder


def test_a_folder_of_pictures_in_the_order_of_names(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "shots", b_png=PIXELS[1], a_PNG=PIXELS[0], c_png=PIXELS[2])
    (folder / ".hidden").write_text("x")
    (folder / "notes.txt").write_text("x")
    found = load(folder)
    assert np.array_equal(found.feeds["input"], GREY_SCALE.apply(PIXELS[:3]))
    assert found.labels is None
    assert found.described == "3 images of shots, without labels; 1 other entries of the folder were left out"


def test_a_folder_of_labels(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "s", dog__1_png=PIXELS[2], cat__2_png=PIXELS[1], cat__1_png=PIXELS[0])
    found = load(folder)
    assert np.array_equal(found.feeds["input"], GREY_SCALE.apply(PIXELS[:3]))
    assert found.labels is not None
    assert found.labels.tolist() == [0, 0, 1]


def test_without_label_names_folders_are_numbers(tmp_path: Path) -> None:
    pictures(tmp_path, **{"2__a_png": PIXELS[0], "0__b_png": PIXELS[1]})
    found = load_samples(tmp_path, GREY, GREY_SCALE)
    assert found.labels is not None
    assert found.labels.tolist() == [0, 2]


def test_a_single_picture_of_another_size_is_fitted(tmp_path: Path) -> None:
    Image.fromarray(np.full((12, 10), 51, np.uint8)).save(tmp_path / "big.jpg")
    assert np.allclose(load(tmp_path / "big.jpg").feeds["input"], (0.2 - 0.5) / 0.25)


def test_a_limit_takes_samples_from_everywhere(tmp_path: Path) -> None:
    found = load(save(tmp_path / "mine.npy", FLOATS), limit=3)
    assert np.array_equal(found.feeds["input"], FLOATS[[0, 3, 6]])
    assert found.described == "3 of 7 samples of mine.npy, without labels"
    folder = pictures(tmp_path / "s", **{f"{name}__{i}_png": PIXELS[i] for name in ("cat", "dog") for i in range(3)})
    limited = load(folder, limit=2)
    assert limited.labels is not None
    assert limited.labels.tolist() == [0, 1]
    np.savez(tmp_path / "p.npz", input=FLOATS, labels=np.arange(7) % 3)
    kept = load(tmp_path / "p.npz", limit=2)
    assert kept.labels is not None
    assert kept.labels.tolist() == [0, 0]
    assert np.array_equal(kept.feeds["input"], FLOATS[[0, 6]])
    np.savez(tmp_path / "q.npz", input=PIXELS, labels=np.array([0, 1, 1, 1, 1, 1, 2]))
    kept = load(tmp_path / "q.npz", limit=2)
    assert kept.labels is not None
    assert kept.labels.tolist() == [0, 2]
    assert np.array_equal(kept.feeds["input"], GREY_SCALE.apply(PIXELS[[0, 6]]))


def test_a_fixed_batch_is_not_cut(tmp_path: Path) -> None:
    fixed = Signature((TensorSpec("input", "float32", (7, 1, 6, 5)),), (TensorSpec("logits", "float32", (7, 3)),))
    assert len(load(save(tmp_path / "a.npy", FLOATS), fixed, limit=3).feeds["input"]) == 7


def test_unscaled_pixels_are_mentioned(tmp_path: Path) -> None:
    description = load(save(tmp_path / "a.npy", FLOATS * 255)).described
    assert "their values reach 248.781" in description
    assert "the bundle's preprocessing gives -2 to 2" in description


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('code of the file ran')",)


def npz(**arrays: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"

    return write


def npy(array: np.ndarray, allow_pickle: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "x.npy", array, allow_pickle=allow_pickle)
        return folder / "x.npy"

    return write


def file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def bomb(folder: Path) -> Path:
    with (
        zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("input.npy", "w") as entry,
    ):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (2_000_000, 1, 6, 5)}
        )
        entry.write(header.getvalue())
        for _ in range(240):
            entry.write(bytes(1_000_000))
    return folder / "x.npz"


def spoiled(array: np.ndarray, index: int, value: float) -> np.ndarray:
    copy = array.copy()
    copy[index, 0, 2, 2] = value
    return copy


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


OBJECTS = np.array([Evil(), Evil()], dtype=object)
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "x.npy", "x.npy does not exist"),
    "empty file": (file("x.npy", b""), "x.npy is empty"),
    "no samples": (npy(FLOATS[:0]), "x.npy holds no sample"),
    "a number": (npy(np.float32(3)), "holds no sample"),
    "another shape": (npy(FLOATS[:, :, :5]), "'input' has shape 7x1x5x5, expected batchx1x6x5"),
    "one sample without a batch": (npy(FLOATS[0]), "has shape 1x6x5"),
    "doubles": (npy(FLOATS.astype(np.float64)), "'input' is float64, expected float32"),
    "another byte order": (npy(FLOATS.astype(">f4")), "is >f4, expected float32"),
    "NaN": (npy(spoiled(FLOATS, 4, np.nan)), "x.npy holds NaN or infinity in sample 4 of 'input'"),
    "infinity": (npy(spoiled(FLOATS, 0, -np.inf)), "in sample 0 of 'input'"),
    "pixels channels first": (npy(PIXELS[:, None]), "which is not a shape of images"),
    "a pickle": (file("x.npy", pickle.dumps(Evil())), "is not a PNG, JPEG, BMP, WebP, GIF, .npy or IDX file"),
    "objects": (npy(OBJECTS, allow_pickle=True), "not of plain numbers"),
    "texts": (npy(np.array(["a", "b"])), "not of plain numbers"),
    "cut off": (file("x.npy", npy_bytes(FLOATS)[:-1]), "declares an array of"),
    "longer than declared": (file("x.npy", npy_bytes(FLOATS) + b"x"), "declares an array of"),
    "damaged header": (file("x.npy", npy_bytes(FLOATS).replace(b"'shape'", b"'shame'")), "has no shape"),
    "objects in an npz": (npz(input=OBJECTS), "not of plain numbers"),
    "objects as labels": (npz(input=FLOATS, labels=OBJECTS), "not of plain numbers"),
    "an npz of another name": (npz(image=FLOATS), "there is no input 'image'"),
    "an npz of labels alone": (npz(labels=np.arange(3)), "the input 'input' is missing"),
    "an empty npz": (npz(), "x.npz is not an .npz file"),
    "labels of another length": (npz(input=FLOATS, labels=np.arange(3)), "shape (3,) for 7 samples"),
    "labels that are numbers with a point": (npz(input=FLOATS, labels=np.ones(7)), "labels of float64"),
    "a negative label": (npz(input=FLOATS, labels=np.array([0, 0, -1, 0, 0, 0, 0])), "the label -1 at index 2"),
    "a label out of range": (
        npz(input=FLOATS, labels=np.arange(7)),
        "the label 3 at index 3, the bundle has 3 classes",
    ),
    "a label out of range for pixels": (npz(input=PIXELS, labels=np.arange(7)), "the label 3 at index 3"),
    "one label too few for pixels": (npz(input=PIXELS, labels=np.arange(6)), "for 7 samples"),
    "a bomb": (bomb, "times its size"),
    "a cut npz": (file("x.npz", b"PK\x03\x04" + bytes(40)), "is not an .npz file"),
    "a text": (file("x.txt", b"hello"), "is not a PNG, JPEG, BMP, WebP, GIF, .npy or IDX file"),
    "half a PNG": (file("x.png", b"\x89PNG\r\n\x1a\n" + bytes(20)), "x.png"),
    "an empty folder": (lambda folder: pictures(folder), "holds no picture"),
    "an unknown label": (lambda folder: pictures(folder, bird__a_png=PIXELS[0]), "bird is named after no label"),
    "pictures beside folders": (
        lambda folder: pictures(folder, a_png=PIXELS[0], cat__a_png=PIXELS[1]),
        "holds pictures next to folders of pictures, such as a.png and cat",
    ),
    "a folder of empty labels": (lambda folder: [(folder / "cat").mkdir(), folder][1], "holds no picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    make, words = BAD[name]
    with pytest.raises(BadInput) as caught:
        load(make(tmp_path))
    assert words in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.remedy


def test_a_damaged_picture_in_a_folder_is_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path, a_png=PIXELS[0], b_png=PIXELS[1])
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"b\.png"):
        load(folder)


def test_images_need_a_preprocessing(tmp_path: Path) -> None:
    for path in (save(tmp_path / "p.npy", PIXELS), pictures(tmp_path / "s", a_png=PIXELS[0]), tmp_path / "s" / "a.png"):
        with pytest.raises(DataError, match="has no preprocessing for images"):
            load(path, preprocessing=None)


def test_a_network_with_two_inputs_needs_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="takes 2 inputs") as caught:
        load_samples(save(tmp_path / "a.npy", FLOATS), TWO, None)
    assert "'a', 'b'" in caught.value.remedy
    np.savez(tmp_path / "x.npz", a=np.ones((3, 2), np.float32), b=np.arange(4))
    with pytest.raises(
        DataError, match="does not fit the bundle: input 'b' has batch = 4, but another input has batch = 3"
    ):
        load_samples(tmp_path / "x.npz", TWO, None)


def test_equal_numbers_are_needed_also_under_two_names_of_the_batch(tmp_path: Path) -> None:
    loose = Signature((TensorSpec("a", "float32", ("n",)), TensorSpec("b", "float32", ("m",))), TWO.outputs)
    np.savez(tmp_path / "x.npz", a=np.ones(3, np.float32), b=np.ones(4, np.float32))
    with pytest.raises(DataError, match="unequal numbers of samples: 3 of 'a', 4 of 'b'"):
        load_samples(tmp_path / "x.npz", loose, None)


def test_labels_of_an_output_without_classes(tmp_path: Path) -> None:
    masks = Signature(GREY.inputs, (TensorSpec("mask", "float32", ("batch", 1, 6, 5)),))
    np.savez(tmp_path / "x.npz", input=FLOATS, labels=np.arange(7))
    with pytest.raises(DataError, match="not one score per class"):
        load_samples(tmp_path / "x.npz", masks, None)
    assert load_samples(save(tmp_path / "a.npy", FLOATS), masks, None).labels is None


def test_a_bundle_s_preprocessing_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'input' has shape 7x1x9x9"):
        load(save(tmp_path / "a.npy", PIXELS), preprocessing=Preprocessing(1, 9, 9))
