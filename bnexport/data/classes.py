"""Checks that a network's labels are a data set's classes in the same order, and that its accuracy is above chance.

An accuracy is at or below chance if two statements hold for the number of right labels (one-sided binomial tests):

1. The count is consistent with chance: P(at least as many right | chance) > 1 %.
2. The count is inconsistent with a useful network: P(at most as many right | useful) < 0.1 %.

Chance is the share of right labels if the network's answers were assigned to the samples at random: the sum over all classes of
(share of samples) x (share of answers), and at least 1 / classes. So a network that predicts one class for every sample is at
chance even if that class is frequent. Useful is twice chance, at least 10 % and at most halfway between chance and 100 %.
Statement 2 bounds the error: for any number of samples, a useful network is refused in less than one case of 1000. Without a
right label the refusal needs 18 samples for 6 balanced classes, and 66 for 1000 classes.
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
#: Smallest probability of the observed count under a useful accuracy that is consistent with a useful network.
_USEFUL = 0.001
#: The lowest useful accuracy for many classes.
_LEAST_USEFUL = 0.1


def check_classes(labels: Sequence[str] | None, classes: Sequence[str], *, dataset: str, scores: int | None) -> None:
    """Refuse a data set whose classes are not the network's; case, spaces, hyphens and underscores are ignored.

    ``labels`` and ``scores`` (the number of scores) are None if they are unknown. A UsageError reports another number of
    classes, other names, or the same names in another order.
    """
    if labels is None:
        if scores is not None and scores != len(classes):
            raise UsageError(
                f"the network returns {scores} scores, but {dataset} has {len(classes)} classes",
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
    """Refuse a data set, named by the user, that can't be used by a network with this preprocessing (JSON), labels and scores.

    A UsageError reports an unknown name, an unknown preprocessing (``remedy``), a ``data_dir`` for embedded images, and classes
    that are not the network's; a DataError reports images that are missing or damaged.
    """
    if not is_dataset(dataset):
        own = f"For your own images pass --dataset folder:{dataset}"
        known = f"Choose one of {', '.join(DATASETS)}, or folder:PATH"
        there = dataset and Path(dataset).is_dir()
        raise UsageError(f"the data set {dataset!r} is unknown", remedy=own if there else known)
    if preprocessing is None:
        raise UsageError(
            f"the images of {dataset} can't be used: the preprocessing of the network is unknown", remedy=remedy
        )
    check_classes(labels, dataset_labels(dataset, data_dir=data_dir), dataset=dataset, scores=scores)
    load_test_images(dataset, data_dir=data_dir, preprocessing=Preprocessing.from_json(preprocessing))


def reordered(labels: Sequence[str], classes: Sequence[str]) -> bool:
    """Return True if the labels are the names of the classes in any order, compared as in ``check_classes``."""
    return sorted(map(_plain, labels)) == sorted(map(_plain, classes))


def known_classes(dataset: str | None) -> tuple[str, ...] | None:
    """Return the classes of a row of DATASETS; None for other names, whose classes depend on files."""
    return DATASETS[dataset].labels if dataset in DATASETS else None


def at_chance(truth: Array, given: npt.NDArray[np.int64], classes: int) -> float | None:
    """Return the chance level if the answers (n,) to the true classes (n,) are at or below it by the tests of this module."""
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
