"""Stale statistics of whatever holds a network, on a sample of the training images that are at hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bnexport.bundle import MANIFEST, Bundle
from bnexport.data.datasets import load_train_images
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import BnexportError, UsageError
from bnexport.evaluating.network import fails_on, input_batches, load_trained
from bnexport.nn.moving_statistics import norm_layers
from bnexport.nn.stale_statistics import StalenessReport, staleness

#: Training images that are looked at: enough for 0.03 standard deviations, and a fraction of a second for small networks.
SAMPLE = 1024
#: As in training by default.
BATCH_SIZE = 256


@dataclass(frozen=True)
class Subject:
    """A network, and how images of its training set become its inputs.

    Attributes:
        module: With BatchNorm layers; it is not changed.
        dataset: What it was trained on; None when unknown.
        preprocessing: JSON of the preprocessing; None when unknown.
    """

    module: nn.Module
    dataset: str | None
    preprocessing: Mapping[str, Any] | None


def subject_of(path: Path) -> Subject:
    """The network of a run directory, a checkpoint or a bundle that bnexport can rebuild.

    Raises:
        BundleError: The bundle was changed or holds no weights.
        ModelError: The checkpoint is missing or damaged, or its network's code is its author's alone.
        MissingDependency: The package that defines the network is not installed.
    """
    if (path / MANIFEST).exists():
        from bnexport.runtimes.torch_runners import original_network

        bundle = Bundle.open(path)
        bundle.check()
        return Subject(original_network(bundle), bundle.manifest.dataset, bundle.manifest.preprocessing)
    trained = load_trained(path)
    return Subject(trained.model.module, trained.model.dataset, trained.preprocessing.to_json())


def sampled_staleness(
    subject: Subject, *, data_dir: str | Path | None = None, download: bool = False
) -> StalenessReport:
    """Compare moving statistics with exact ones over SAMPLE training images, always the same; on the CPU.

    Raises:
        UsageError: It is not known on which data set the network was trained, or how images become inputs.
        DataError: The images are not here, or do not fit.
        NetworkError: They could not be downloaded.
        ModelError: The network fails on them.
    """
    if subject.dataset is None or subject.preprocessing is None:
        raise UsageError(
            "it is not known on which images the network was trained, so there is nothing to compare with",
            remedy="Give a checkpoint of bnexport train, or a bundle of one",
        )
    preprocessing = Preprocessing.from_json(subject.preprocessing)
    if not norm_layers(subject.module):
        return StalenessReport((), 0)
    images, _ = load_train_images(subject.dataset, data_dir=data_dir, download=download, preprocessing=preprocessing)
    order = np.random.default_rng(0).permutation(len(images))[:SAMPLE]
    batches = list(input_batches(images, order, BATCH_SIZE, preprocessing))
    with torch.random.fork_rng(devices=[]):
        try:
            return staleness(copy.deepcopy(subject.module), batches)  # a copy: a user's forward may keep things
        except BnexportError:
            raise
        except Exception as error:  # the module is the user's code
            raise fails_on(batches[0], error, subject.module) from error


def stale_warning(subject: Subject, *, data_dir: str | Path | None = None) -> str:
    """What a fold's account should say of the statistics that it folds; "" when they are up to date or nothing tells."""
    try:
        report = sampled_staleness(subject, data_dir=data_dir)
    except BnexportError:  # no data here, or a network that takes no such images: nothing to warn of
        return ""
    return report.sentence() if report.stale else ""
