"""A user's own inputs for a verification: arrays, or images that go through the bundle's preprocessing.

Wrong inputs are reported before any engine runs: no engine can distinguish pixels from 0 to 255 from those between 0
and 1, and NaN inputs give NaN on both sides of a comparison.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bnexport.data.images import ENDINGS, fit_stack, folder_entries, load_images, map_npy, start_of
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, FeedError
from bnexport.optional import one_line
from bnexport.tensors import Array, Signature, TensorSpec, check_feeds
from bnexport.validation import validate_archive
from bnexport.validation.archives import NPY_MAGIC
from bnexport.validation.limits import refusing

#: Name of the array in an .npz file that holds the true classes.
LABELS = "labels"
#: First bytes of any zip archive, also an empty one.
_ZIP = b"PK"
_REMEDY = "Give a .npy or .npz file of inputs or uint8 images, an image, or a folder of images"
#: Values beyond this multiple of the preprocessing's range cause a warning: pixels that were not scaled are at 255 times.
_FAR = 4.0


@dataclass(frozen=True)
class Samples:
    """Inputs that fit a signature, input name -> (n, ...), and the true class of each sample, int64 (n,), if known.

    ``described`` is for the report; it does not name the folders of this machine.
    """

    feeds: Mapping[str, Array]
    labels: Array | None
    described: str


@dataclass(frozen=True)
class _Target:
    """The facts of the bundle that samples must fit."""

    path: Path
    signature: Signature
    preprocessing: Preprocessing | None
    labels: tuple[str, ...] | None
    limit: int | None

    @property
    def classes(self) -> int | None:
        """Return the number of classes; None where it is not known."""
        if self.labels is not None:
            return len(self.labels)
        shape = self.signature.outputs[0].shape
        return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None

    def chosen(self, n: int) -> Array:
        """Return the indices of the samples to use: all, or ``limit`` of them spread evenly, so that no class is left out."""
        fixed = isinstance(self.signature.inputs[0].shape[0], int)
        if self.limit is None or n <= self.limit or fixed:
            return np.arange(n)
        return np.linspace(0, n - 1, self.limit).round().astype(np.int64)


def load_samples(
    path: str | Path,
    signature: Signature,
    preprocessing: Preprocessing | None,
    *,
    labels: Sequence[str] | None = None,
    limit: int | None = None,
) -> Samples:
    """Read at most ``limit`` samples of a user, spread evenly, and check that they fit the bundle with the given properties.

    ``path`` is a .npy file for a network with one input: arrays of its type and shape, or uint8 images, which go through the
    preprocessing; an .npz file with one array for each input, by name, and perhaps "labels"; a picture or IDX file; or a folder
    of pictures, whose sub-folders, if any, are named after the labels. Errors name the file and the index.
    """
    target = _Target(Path(path), signature, preprocessing, None if labels is None else tuple(labels), limit)
    if target.path.is_dir():
        return _from_folder(target)
    start = start_of(target.path)
    if start.startswith(_ZIP):
        return _from_npz(target)
    if start.startswith(NPY_MAGIC):
        return _from_npy(target)
    named = load_images(target.path, _preprocessing(target))
    return _from_images(target, len(named), lambda index: named[index][1], None)


def _from_npy(target: _Target) -> Samples:
    if len(target.signature.inputs) != 1:
        names = ", ".join(repr(spec.name) for spec in target.signature.inputs)
        raise DataError(
            f"{target.path} holds one array, the network takes {len(target.signature.inputs)} inputs",
            remedy=f"Save an .npz file with the arrays {names}",
        )
    spec = target.signature.inputs[0]
    return _checked(target, {spec.name: map_npy(target.path, remedy=_REMEDY)}, None)  # only chosen samples are read


def _from_npz(target: _Target) -> Samples:
    validate_archive(target.path, "npz")
    odd = refusing(f"{target.path} can't be used: it", DataError, remedy=_REMEDY)
    try:
        with odd, np.load(target.path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, MemoryError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{target.path} can't be read: {one_line(error)}", remedy="Save plain arrays again") from error
    is_input = any(spec.name == LABELS for spec in target.signature.inputs)
    labels = None if is_input else arrays.pop(LABELS, None)
    return _checked(target, arrays, labels)


def _checked(target: _Target, arrays: Mapping[str, Array], labels: Array | None) -> Samples:
    """Return arrays as feeds: images preprocessed, the others unchanged, all of one length and finite."""
    for name, array in arrays.items():
        if array.ndim == 0 or len(array) == 0:
            raise DataError(f"{target.path} holds no sample of {name!r}", remedy="Give at least one sample")
    specs = {spec.name: spec for spec in target.signature.inputs}
    known = target.preprocessing is not None
    images = [name for name, array in arrays.items() if name in specs and _is_image(specs[name], array, known=known)]
    if images:
        return _from_pixels(target, arrays, labels)
    _check_fit(target, arrays)
    n = len(next(iter(arrays.values())))
    if any(len(array) != n for array in arrays.values()):
        counts = ", ".join(f"{len(array)} of {name!r}" for name, array in arrays.items())
        raise DataError(f"{target.path} holds unequal numbers of samples: {counts}", remedy="Give as many of each")
    kept = target.chosen(n)
    feeds = {name: np.array(array[kept]) for name, array in arrays.items()}
    for name, array in feeds.items():
        _check_finite(target.path, name, array, kept)
    true = _check_labels(target, labels, n)
    text = _description(target, len(kept), n, "samples", true) + _far_off(target, feeds)
    return Samples(feeds, None if true is None else true[kept], text)


def _is_image(spec: TensorSpec, array: Array, *, known: bool) -> bool:
    """Return True if an array holds images, also where the files take pixels; ``known``: there is a preprocessing."""
    fits = spec.dtype == "uint8" and not (known and spec.problem(array))
    return array.dtype == np.uint8 and not fits


def _from_pixels(target: _Target, arrays: Mapping[str, Array], labels: Array | None) -> Samples:
    if len(arrays) != 1:
        raise DataError(f"{target.path} holds uint8 images next to other inputs", remedy="Give inputs as they are fed")
    preprocessing = _preprocessing(target)
    pixels = next(iter(arrays.values()))
    stack = fit_stack(target.path, np.asarray(pixels), preprocessing)
    return _from_images(target, len(stack), lambda index: stack[index][1], _check_labels(target, labels, len(stack)))


def _from_images(target: _Target, n: int, read: Callable[[int], Array], labels: Array | None) -> Samples:
    """Return the chosen ones of n images, which ``read`` returns fitted, as inputs of the signature's element type."""
    kept, preprocessing, spec = target.chosen(n), _preprocessing(target), target.signature.inputs[0]
    inputs = preprocessing.apply(np.stack([read(index) for index in kept]))
    feeds = {spec.name: inputs.astype(spec.dtype) if spec.dtype.startswith("float") else inputs}
    _check_fit(target, feeds)
    text = _description(target, len(kept), n, "images", labels)
    return Samples(feeds, None if labels is None else labels[kept], text)


def _preprocessing(target: _Target) -> Preprocessing:
    if target.preprocessing is None or len(target.signature.inputs) != 1:
        raise DataError(
            f"{target.path} can only be read as images, and the bundle has no preprocessing for images",
            remedy="Give arrays as the network takes them, or export again by bnexport fold-and-export with --mean and --std",
        )
    return target.preprocessing


def _from_folder(target: _Target) -> Samples:
    """Read a folder of pictures, or of one folder per class."""
    files, folders, others = _listing(target.path)
    if folders and files:
        raise DataError(
            f"{target.path} holds pictures next to folders of pictures, such as {files[0].name} and {folders[0].name}",
            remedy="Put every picture into the folder of its label, or all of them into one",
        )
    true: list[int] = []
    for folder in folders:
        inside, deeper, odd = _listing(folder)
        others += odd + len(deeper)
        index = _class_of(target, folder)
        files += inside
        true += [index] * len(inside)
    if not files:
        raise DataError(f"{target.path} holds no picture (PNG, JPEG, BMP, WebP, GIF)", remedy=_REMEDY)
    preprocessing, labels = _preprocessing(target), np.array(true, np.int64) if folders else None
    found = _from_images(target, len(files), lambda index: load_images(files[index], preprocessing)[0][1], labels)
    left = f"; {others} other entries of the folder were left out" if others else ""
    return replace(found, described=found.described + left)


def _listing(folder: Path) -> tuple[list[Path], list[Path], int]:
    """Return pictures and folders in the order of their names, and the number of other entries; hidden ones don't count."""
    folders, others = folder_entries(folder)
    files = [entry for entry in others if entry.name.lower().endswith(ENDINGS)]
    return files, folders, len(others) - len(files)


def _class_of(target: _Target, folder: Path) -> int:
    """Return the class of a folder: by its label, or by its number where the bundle has no labels."""
    name, known = folder.name, target.labels or tuple(map(str, range(target.classes or 0)))
    if name in known:
        return known.index(name)
    shown = ", ".join(map(repr, known[:10])) + (", ..." if len(known) > 10 else "")
    raise DataError(
        f"{folder} is named after no label of the bundle",
        remedy=f"The labels are {shown}" if known else "The bundle has no labels: put all pictures into one folder",
    )


def _check_fit(target: _Target, feeds: Mapping[str, Array]) -> None:
    try:
        check_feeds(target.signature, feeds)
    except FeedError as error:
        raise DataError(f"{target.path} does not fit the bundle: {error.message}", remedy=error.remedy) from error


def _check_finite(path: Path, name: str, array: Array, indices: Array) -> None:
    if array.dtype.kind != "f":
        return
    odd = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if odd.any():
        index = int(indices[int(odd.argmax())])
        raise DataError(f"{path} holds NaN or infinity in sample {index} of {name!r}", remedy="Give finite numbers")


def _check_labels(target: _Target, labels: Array | None, n: int) -> Array | None:
    if labels is None:
        return None
    if labels.dtype.kind not in "iu" or labels.shape != (n,):
        raise DataError(
            f"{target.path} holds labels of {labels.dtype.name} and shape {labels.shape} for {n} samples",
            remedy="Give one whole number per sample",
        )
    if target.classes is None:
        raise DataError(
            f"{target.path} holds labels, and the bundle's first output is not one score per class",
            remedy="Leave them out",
        )
    odd = (labels < 0) | (labels >= target.classes)
    if odd.any():
        index = int(odd.argmax())
        raise DataError(
            f"{target.path} holds the label {labels[index]} at index {index}, the bundle has {target.classes} classes",
            remedy="Count the classes from 0, in the order of the bundle's labels",
        )
    return labels.astype(np.int64)


def _description(target: _Target, n: int, there: int, what: str, labels: Array | None) -> str:
    """Return "20 of 100 images of shoes, with labels"; reports contain it, so it has only the end of the path."""
    of = "" if n == there else f" of {there}"
    name = target.path.resolve().name
    return f"{n}{of} {what} of {name}, {'without' if labels is None else 'with'} labels"


def _far_off(target: _Target, feeds: Mapping[str, Array]) -> str:
    """Return a warning where values lie far outside the range of the bundle's preprocessing; "" elsewhere."""
    preprocessing = target.preprocessing
    array = next(iter(feeds.values()))
    if preprocessing is None or len(feeds) != 1 or array.dtype == np.uint8:
        return ""
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    ends = np.concatenate([-mean / std, (255 * preprocessing.scale - mean) / std])
    largest = float(np.abs(array.astype(np.float64)).max()) if array.size else 0.0
    if largest <= _FAR * float(np.abs(ends).max()):
        return ""
    return f"; their values reach {largest:g}, the bundle's preprocessing gives {ends.min():.3g} to {ends.max():.3g}"
