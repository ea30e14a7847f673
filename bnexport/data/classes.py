"""The classes of a data set and the labels of a network: the same names in the same order, and an accuracy above chance.

An accuracy is at or below chance if two statements hold for the number of right labels (one-sided binomial tests):

1. The network need not be better than chance: P(at least as many right | chance) > 1 %.
2. The network is not a useful one: P(at most as many right | useful) < 0.1 %.

Chance is the share of right labels if the network's answers were dealt to the samples at random: the sum over all classes of
(share of samples) x (share of answers), and at least 1 / classes. A network that gives one class for every sample is therefore
at chance also where that class is frequent. Useful is twice chance, at least 10 % and at most halfway between chance and 100 %.
Statement 2 bounds the error: a useful network is refused by accident in less than one case of 1000, however few samples there
are. With 6 balanced classes and no right label it takes 18 samples, with 1000 classes 66.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bnexport.data.dataset_table import DATASETS, is_dataset
from bnexport.data.datasets import dataset_labels, load_test_images
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import UsageError
from bnexport.tensors import Array

#: Causes of an accuracy at chance.
SUSPECTS = "the order of the labels, the preprocessing (mean and std) and the weights"
#: Largest probability of the observed count under chance that shows an accuracy above chance.
_ABOVE = 0.01
#: Smallest probability of the observed count under a useful accuracy that leaves a useful network possible.
_USEFUL = 0.001
#: The lowest accuracy that counts as useful where there are many classes.
_LEAST_USEFUL = 0.1


def check_classes(labels: Sequence[str] | None, classes: Sequence[str], *, dataset: str, scores: int | None) -> None:
    """Refuse a data set whose classes are not the network's.

    Upper and lower case, spaces, hyphens and underscores do not count.

    Args:
        labels: The network's labels in the order of its scores; None if they are unknown.
        classes: The data set's classes in the order of their numbers.
        dataset: Name of the data set.
        scores: Number of scores of the network; None if it is unknown.

    Raises:
        UsageError: Another number of classes, other names, or the same names in another order.
    """
    if labels is None:
        if scores is not None and scores != len(classes):
            raise UsageError(
                f"the network gives {scores} scores, {dataset} has {len(classes)} classes",
                remedy="Choose the data set that the network was trained on with --dataset",
            )
        return
    mine, theirs = [_plain(name) for name in labels], [_plain(name) for name in classes]
    if mine == theirs:
        return
    different = (k for k, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other)
    at = next(different, min(len(mine), len(theirs)))
    pair = " and ".join(repr(names[at]) if at < len(names) else "nothing" for names in (labels, classes))
    if sorted(mine) == sorted(theirs):
        how = "are the same names in another order"
    elif len(mine) != len(theirs):
        how = f"differ in number, {len(mine)} and {len(theirs)}"
    else:
        how = "differ"
    raise UsageError(
        f"the network's labels and the classes of {dataset} {how}; first difference at class {at}: {pair}",
        remedy="Give the labels in the order of the network's scores, with the names of the data set's classes",
    )


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip()).casefold()


def check_dataset(
    dataset: str,
    *,
    preprocessing: Mapping[str, Any] | None,
    data_dir: str | Path | None = None,
    labels: Sequence[str] | None = None,
    scores: int | None = None,
    remedy: str = "Leave --dataset out",
) -> None:
    """Refuse a data set that the user named and that can't be used.

    Args:
        dataset: A row of DATASETS, or ``folder:PATH``.
        preprocessing: JSON of the network's preprocessing; None if the network takes no images, or it is unknown how.
        data_dir: Folder of the data set; None: the usual places.
        labels: The network's labels, if known.
        scores: Number of the network's scores, if known.
        remedy: Remedy where the preprocessing is unknown.

    Raises:
        UsageError: An unknown name, no preprocessing, a ``data_dir`` for embedded images, or classes that are not the
            network's.
        DataError: The images are missing or damaged.
    """
    if not is_dataset(dataset):
        raise UsageError(f"the data set {dataset!r} is unknown", remedy=dataset_remedy(dataset))
    if preprocessing is None:
        raise UsageError(
            f"the images of {dataset} can't be used: it is not known how an image becomes an input of the network",
            remedy=remedy,
        )
    if data_dir is not None and dataset in DATASETS and DATASETS[dataset].embedded:
        raise UsageError(f"the images of {dataset} are part of bnexport", remedy="Leave --data-dir out")
    check_classes(labels, dataset_labels(dataset, data_dir=data_dir), dataset=dataset, scores=scores)
    load_test_images(dataset, data_dir=data_dir, preprocessing=Preprocessing.from_json(preprocessing))


def dataset_remedy(name: str) -> str:
    """Return the remedy for an unknown name of a data set: the folder of that name if it exists, else the known names."""
    if name and Path(name).is_dir():
        return f"Your own images are --dataset folder:{name}"
    return f"Choose one of {', '.join(DATASETS)}, or folder:PATH"


def reordered(labels: Sequence[str], classes: Sequence[str]) -> bool:
    """Return whether labels are the names of the classes in any order; upper and lower case do not count."""
    return sorted(map(_plain, labels)) == sorted(map(_plain, classes))


def known_classes(dataset: str | None) -> tuple[str, ...] | None:
    """Return the classes of a data set that are known without its files; None for a folder and an unknown name."""
    return DATASETS[dataset].labels if dataset in DATASETS else None


def at_chance(truth: Array, given: npt.NDArray[np.int64], classes: int) -> float | None:
    """Return the chance level if the answers are at or below it, by the two tests of this module; None if they are not.

    Args:
        truth: Classes of the samples, integers (n,).
        given: Classes that the network gives, integers (n,).
        classes: Number of classes.
    """
    n, right = len(truth), int((truth == given).sum())
    if n == 0 or classes < 2:
        return None
    chance = 1 / classes
    if len(np.unique(truth)) > 1:
        shares = [np.bincount(values.astype(np.int64), minlength=classes) / n for values in (truth, given)]
        chance = max(chance, float(shares[0] @ shares[1]))
    useful = min(max(2 * chance, _LEAST_USEFUL), (1 + chance) / 2)
    if 1 - _at_most(right - 1, n, chance) > _ABOVE and _at_most(right, n, useful) < _USEFUL:
        return chance
    return None


def _at_most(k: int, n: int, p: float) -> float:
    """Return the binomial probability of at most k hits in n trials."""
    if k < 0:
        return 0.0
    if p >= 1:
        return float(k >= n)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    i = np.arange(k + 1)
    terms = logs[n] - logs[i] - logs[n - i] + i * np.log(p) + (n - i) * np.log1p(-p)
    return min(1.0, float(np.exp(terms).sum()))
