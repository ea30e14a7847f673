"""Trained networks loaded from checkpoints and bundles, and the comparison of their moving statistics with exact ones.

The code of a network comes from bnexport, from a package, or from the user.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnexport.bundle import MANIFEST, WEIGHTS, Bundle
from bnexport.data.classes import check_classes
from bnexport.data.datasets import dataset_labels, load_train_images
from bnexport.data.images import prepared
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import BnexportError, DataError, ModelError, RuntimeUnavailable, UsageError
from bnexport.evaluating.network_options import InspectionRequest, NetworkOptions, needed_dataset
from bnexport.loading.checkpoint import METADATA_KEY, checkpoint_file, load_checkpoint, read_safetensors
from bnexport.loading.inspection import Inspection, in_order
from bnexport.loading.sources import LoadedModel, checkpoint_of, load_source, unknown_reason
from bnexport.loading.weights import is_safetensors
from bnexport.loading.zoo import zoo_of
from bnexport.nn.calling import place_of
from bnexport.nn.moving_statistics import norm_layers
from bnexport.nn.stale_statistics import StalenessReport, staleness
from bnexport.nn.statistics import eps_of, layer_statistics
from bnexport.optional import one_line
from bnexport.reproducibility import strict_float32
from bnexport.tensors import Array
from bnexport.validation.file_kinds import kind_of

#: Warning that is printed if the preprocessing of a checkpoint is unknown
ASSUMED = (
    "the preprocessing is unknown, so pixels / 255 is assumed, without mean and std; give the values of the training"
    " with --input, --mean and --std"
)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A loaded checkpoint."""

    file: Path  # The file that was read
    model: LoadedModel  # The network in eval mode on the CPU, with its facts
    metadata: Mapping[str, Any]  # Metadata of the checkpoint; for plain weights, the facts of ``model``

    @property
    def preprocessing(self) -> Preprocessing:
        """The checkpoint's preprocessing, or pixels from 0 to 1 if it has none; DataError if it can't be read."""
        found = self.model.preprocessing
        return Preprocessing() if found is None else Preprocessing.from_json(found)

    def dataset(self, given: str | None) -> str:
        """Return the given data set, else the one that the network was trained on; UsageError without either."""
        return needed_dataset(given or self.model.dataset, self.file)

    def classes(self, dataset: str, *, data_dir: Path | None) -> tuple[str, ...]:
        """Return the classes of a data set; UsageError if they are not the network's labels in the same order."""
        found = dataset_labels(dataset, data_dir=data_dir)
        if self.model.labels is not None:
            check_classes(self.model.labels, found, dataset=dataset, scores=None)
        return found


def load_trained(path: Path, options: NetworkOptions | None = None) -> LoadedCheckpoint:
    """Load a run directory, a checkpoint, or with ``options.source`` the weights of a user's network.

    Raises:
        UsageError: The options contradict each other.
        ModelError: The file is missing or damaged, or does not fit the network.
        MissingDependency: The package that defines the network is not installed.
    """
    given, file = options or NetworkOptions(), checkpoint_file(path)
    source = given.source
    metadata: dict[str, Any] = {}
    if is_safetensors(file) and METADATA_KEY in read_safetensors(file)[1]:
        metadata = load_checkpoint(file).metadata
    elif source is None and (kind := kind_of(file)) is not None and kind.name in ("safetensors", "torch", "index"):
        raise ModelError(
            f"{file} has weights but no bnexport metadata, so its network is unknown",
            remedy="Name its code with --source file.py:factory",
        )
    code = str((metadata.get("network") or {}).get("source"))
    if source is None and metadata and ":" in code and zoo_of(code) is None:
        raise ModelError(
            f"{file} has the weights of your own network {code}, but not its code",
            remedy=f"Name its code with --source {code}",
        )
    if source is None:
        if given.model_options:
            raise UsageError(f"{file} states the options of its network", remedy="Leave --model-option out")
        if given.weights_key is not None:
            raise UsageError("a checkpoint of bnexport has one set of weights", remedy="Leave --weights-key out")
        model = load_source(str(file))
    else:
        stated = (metadata.get("network") or {}).get("options") or {}
        model = load_source(
            source, weights=file, weights_key=given.weights_key, options={**stated, **given.model_options}
        )
        labels = metadata.get("labels")
        model = replace(
            model,
            dataset=metadata.get("dataset"),
            labels=model.labels if labels is None else tuple(labels),
            preprocessing=metadata.get("preprocessing") or model.preprocessing,
        )
    model = replace(
        model,
        labels=given.labels or model.labels,
        preprocessing=given.image(model.preprocessing),
        assumed=ASSUMED if given.assumes_pixels(model.preprocessing) else "",
    )
    facts = checkpoint_of(model).metadata
    return LoadedCheckpoint(
        file, model, {**(metadata or facts), **{key: facts[key] for key in ("labels", "preprocessing")}}
    )


def classifier_of(module: nn.Module, preprocessing: Preprocessing, device: torch.device) -> Callable[[Array], Array]:
    """Return a function that computes scores (n, classes) of images in strict float32; ``module`` is moved to the device.

    The images are uint8, (n, height, width) or (n, channels, height, width) of any size. The function raises DataError if they
    do not fit the preprocessing, or the scores are not finite; ModelError if the network fails on the images, or its output has
    no row of scores per image; RuntimeUnavailable if the GPU is out of memory.
    """
    module = module.to(device)

    def logits(images: Array) -> Array:
        X = inputs_of(images, preprocessing).to(device)
        with strict_float32(), torch.inference_mode():
            try:
                Y: Any = module(X)
            except torch.OutOfMemoryError as error:
                raise RuntimeUnavailable(
                    f"{device} is out of memory", remedy="Choose a smaller --batch-size, or --device cpu"
                ) from error
            except Exception as error:  # the module is the user's code
                raise fails_on(X, error, module) from error
        if not isinstance(Y, Tensor) or Y.dim() != 2 or len(Y) != len(X):
            raise ModelError("the network's output has no row of scores per image", remedy="Evaluate a classifier")
        scores: Array = Y.float().cpu().numpy()
        if not np.isfinite(scores).all():
            raise DataError(
                "the network's scores contain NaN or infinity", remedy="Check its weights, or train it again"
            )
        return scores

    return logits


def fails_on(X: Tensor, error: Exception, module: nn.Module) -> ModelError:
    """Return the ModelError of a user's network that fails on a batch."""
    shape = "x".join(map(str, X.shape))
    return ModelError(
        f"the network fails on images of shape {shape}{place_of(error, module)}: {one_line(error, 200)}",
        remedy="Pass the shape of one image with --input, such as 3x64x64, or choose a data set whose images fit the network",
    )


def inputs_of(images: Array, preprocessing: Preprocessing) -> Tensor:
    """Return uint8 images (n, H, W) or (n, C, H, W) as an input (n, channels, height, width), resized if necessary."""
    return torch.from_numpy(preprocessing.apply(prepared(images, preprocessing)))


def input_batches(images: Array, order: Array, batch_size: int, preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Yield the inputs of images[order] in batches of nearly equal size, at most ``batch_size``: none has a single image."""
    for indices in np.array_split(order, max(1, -(-len(order) // batch_size))):
        yield inputs_of(images[indices], preprocessing)


#: Training images of the comparison: enough for 0.03 standard deviations, and a fraction of a second for small networks.
SAMPLE = 1024
#: The default of training.
BATCH_SIZE = 256


def network_of_bundle(bundle: Bundle, source: str) -> nn.Module:
    """Return the unfolded network of a bundle, built by the user's code ``file.py:factory`` with the bundle's options.

    The file may be in another folder than the manifest states. ModelError if the code does not build the network of the
    weights.
    """
    network = bundle.manifest.network
    same = str(network.get("source")).rpartition(":")[2] == source.rpartition(":")[2]
    return load_source(source, weights=bundle.file(WEIGHTS), options=network.get("options") if same else None).module


def trained_network(path: Path, request: InspectionRequest | None = None) -> LoadedModel:
    """Return the network of a run directory, a checkpoint, weights or a bundle; ``request`` replaces facts of the file.

    UsageError if an option does not apply to bundles; other errors are those of ``load_trained`` and ``Bundle.check``.
    """
    given = request or InspectionRequest()
    if (path / MANIFEST).exists():
        from bnexport.runtimes.torch_runners import original_network

        if odd := [name for name in given.given if name != "--source"]:
            raise UsageError(f"{odd[0]} is for a checkpoint, but {path} is a bundle", remedy=f"Leave {odd[0]} out")
        bundle = Bundle.open(path)
        bundle.check()
        manifest = bundle.manifest
        if given.source is None and (reason := unknown_reason(manifest.network)) is not None:
            raise ModelError(
                f"{path} is the bundle of a network {reason}", remedy="Name its code with --source FILE.py:FACTORY"
            )
        module = original_network(bundle) if given.source is None else network_of_bundle(bundle, given.source)
        name, preprocessing = given.dataset or manifest.dataset, manifest.preprocessing
        return LoadedModel(module, manifest.name, manifest.network, dataset=name, preprocessing=preprocessing)
    trained = load_trained(path, given)
    if (name := given.dataset or trained.model.dataset) is not None:
        trained.classes(name, data_dir=given.data_dir)
    return replace(trained.model, dataset=name, preprocessing=trained.preprocessing.to_json())


def inspect_network(path: Path, request: InspectionRequest) -> Inspection:
    """Return the statistics of a weights file of any kind, read into the user's network.

    ModelError if the network has no BatchNorm; other errors are those of ``load_trained``.
    """
    trained = load_trained(path, request)
    eps = eps_of(trained.model.module)
    layers = in_order(layer_statistics(trained.model.module.state_dict(), eps=eps), [*eps])
    if not layers:
        raise ModelError(f"{trained.file} holds no BatchNorm", remedy="Inspect a network with BatchNorm layers")
    return Inspection(trained.file, layers, "; ".join(trained.model.notes))


def sampled_staleness(
    subject: LoadedModel, *, data_dir: str | Path | None = None, download: bool = False
) -> StalenessReport:
    """Compare moving statistics with exact ones over SAMPLE training images, the same in each call; on the CPU.

    Raises:
        UsageError: The training set or the preprocessing of the network is unknown.
        DataError: The images are missing or do not fit.
        NetworkError: A download failed.
        ModelError: The network fails on the images.
    """
    if subject.dataset is None or subject.preprocessing is None:
        raise UsageError(
            "the training images of the network are unknown, so its statistics have nothing to be compared with",
            remedy="Pass --dataset, and for plain weights --input, --mean and --std",
        )
    preprocessing = Preprocessing.from_json(subject.preprocessing)
    if not norm_layers(subject.module):
        return StalenessReport((), 0)
    images, _ = load_train_images(subject.dataset, data_dir=data_dir, download=download, preprocessing=preprocessing)
    order = np.random.default_rng(0).permutation(len(images))[:SAMPLE]
    batches = list(input_batches(images, order, BATCH_SIZE, preprocessing))
    with torch.random.fork_rng(devices=[]):
        try:
            return staleness(copy.deepcopy(subject.module), batches)  # a copy: a user's forward may change its module
        except BnexportError:
            raise
        except Exception as error:  # the module is the user's code
            raise fails_on(batches[0], error, subject.module) from error


def stale_warning(subject: LoadedModel, *, data_dir: str | Path | None = None) -> str:
    """Return the fold report's warning of stale statistics; "" if they are up to date or can't be compared."""
    try:
        report = sampled_staleness(subject, data_dir=data_dir)
    except BnexportError:  # no data, or the network does not accept the images
        return ""
    return report.sentence() if report.stale else ""
