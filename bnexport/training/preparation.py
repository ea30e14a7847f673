"""Preparation of a run: data set, network with its initial weights, optimiser."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnexport.data.dataset_table import Dataset
from bnexport.data.datasets import load_dataset
from bnexport.data.images import prepared
from bnexport.data.preprocessing import Preprocessing
from bnexport.environment import cpu_name
from bnexport.errors import BnexportError, ModelError, RuntimeUnavailable, UsageError
from bnexport.loading.sources import KNOWN, build_known, call_factory
from bnexport.loading.zoo import zoo_of
from bnexport.nn.batch_norm import BATCH_NORMS
from bnexport.nn.calling import to_eval_mode
from bnexport.nn.synced_batch_norm import synchronised
from bnexport.optional import one_line
from bnexport.reproducibility import seeded
from bnexport.training.config import LENET, START_ANEW, TrainingConfig
from bnexport.training.data_parts import DataPart, make_part
from bnexport.training.directory import CHECKPOINT, SavedEpoch
from bnexport.training.listeners import TrainingListener
from bnexport.training.optimisers import make_optimizer, restore_optimizer
from bnexport.training.processes import World
from bnexport.training.step import Step

_LENET_SIDE = 28


def network_facts(config: TrainingConfig, classes: int, preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the facts from which a checkpoint's network is rebuilt: ``{"source": ..., "options": {...}}``."""
    options: dict[str, Any] = dict(config.model_options)
    if config.model == LENET:
        options = {"norm": config.norm, "in_channels": preprocessing.channels, "num_classes": classes}
    elif zoo_of(config.model) is not None:
        options.setdefault("num_classes", classes)
    return {"source": config.model, "options": options}


def build_network(config: TrainingConfig, classes: int, preprocessing: Preprocessing) -> nn.Module:
    """Build the network with weights drawn from the configuration's seed; the caller's random state does not change.

    Raises:
        ModelError: It can't be built, does not accept such images, or returns another number of scores.
    """
    facts = network_facts(config, classes, preprocessing)
    with seeded(config.seed):
        if facts["source"] in KNOWN or zoo_of(facts["source"]) is not None:
            network = build_known(facts)
        else:
            network = call_factory(facts["source"], facts["options"])
        _check_scores(network, facts, classes, preprocessing)
    network.train()
    return network


def leaves_parameters_unused(network: nn.Module, preprocessing: Preprocessing) -> bool:
    """Return True if a step on a copy leaves a parameter without a gradient, as in a head that is switched off."""
    twin = copy.deepcopy(network)
    twin.train()
    with seeded(0), torch.enable_grad():
        scores = twin(torch.rand(2, preprocessing.channels, preprocessing.height, preprocessing.width))
        if not isinstance(scores, Tensor):  # the first step raises the error
            return False
        torch.autograd.backward(scores.sum())
    return any(parameter.requires_grad and parameter.grad is None for parameter in twin.parameters())


def _check_scores(network: nn.Module, facts: Mapping[str, Any], classes: int, preprocessing: Preprocessing) -> None:
    """Run the network on two grey images, in eval mode so that it does not change, and check its scores."""
    shape = (preprocessing.channels, preprocessing.height, preprocessing.width)
    text, source = "x".join(map(str, shape)), facts["source"]
    remedy = "Pass the network's image size with --input, such as 3x64x64, and its constructor's arguments with --model-option"
    if source == LENET and shape[1:] != (_LENET_SIDE, _LENET_SIDE):
        raise ModelError(f"bn_lenet needs images of 28x28, not {text}", remedy="Pass --input 1x28x28 or 3x28x28")
    try:
        with torch.no_grad():
            scores = to_eval_mode(network)(torch.full((2, *shape), 0.5))
    except BnexportError:
        raise
    except Exception as error:
        raise ModelError(f"{source} fails on images of {text}: {one_line(error)}", remedy=remedy) from error
    if not isinstance(scores, Tensor) or scores.dim() != 2 or len(scores) != 2:
        raise ModelError(
            f"{source} does not return scores (images, classes)", remedy="Train a classifier that returns its logits"
        )
    if scores.shape[1] != classes:
        raise ModelError(
            f"{source} returns {scores.shape[1]} scores per image, but the data set has {classes} classes",
            remedy=f"Pass the number of classes to its constructor, such as --model-option num_classes={classes}",
        )


@dataclass(frozen=True)
class Prepared:
    """The objects of a run."""

    config: TrainingConfig  # The configuration
    dataset: Dataset  # The images and labels
    preprocessing: Preprocessing  # Conversion of an image to an input
    model: nn.Module  # The network on this process's device, with the saved weights of a resumed run
    optimizer: torch.optim.Optimizer  # Optimiser of its parameters, with the saved state of a resumed run
    train: DataPart  # The training part
    test: DataPart  # The test part
    world: World  # The processes
    scaler: Mapping[str, Any]  # State of the loss scaler, from the checkpoint
    unused: bool = False  # True if a step leaves parameters without a gradient; determined for several processes only

    def step(self, model: nn.Module) -> Step:
        """Return the training step of a network with these parameters."""
        smoothing, amp = self.config.label_smoothing, self.config.amp
        step = Step(model, self.optimizer, label_smoothing=smoothing, amp=amp, world=self.world, unused=self.unused)
        if self.scaler:
            step.scaler.load_state_dict(dict(self.scaler))
        return step


def prepare(
    config: TrainingConfig,
    saved: SavedEpoch | None,
    world: World,
    *,
    data_dir: str | Path | None,
    listener: TrainingListener,
) -> Prepared:
    """Load the data, and build the network and its optimiser; the errors are those of ``training_run.train``."""
    if config.amp == "float16" and world.device.type != "cuda":
        raise RuntimeUnavailable(
            "--amp float16 needs a CUDA device", remedy="Use --amp bfloat16, which works on a CPU too, or leave it out"
        )
    preprocessing = config.preprocessing()
    # The leading process downloads and decodes; the others read its files.
    dataset = world.leader_first(
        lambda: load_dataset(
            config.dataset,
            data_dir=data_dir,
            progress=listener.on_download,
            preprocessing=preprocessing,
            on_picture=listener.on_files,
        )
    )
    model = build_network(config, len(dataset.labels), preprocessing)
    check_last_batch(config, model, len(dataset.train_labels), world)
    if saved is not None:
        try:
            model.load_state_dict(saved.state)
        except RuntimeError as error:
            message = f"{CHECKPOINT} does not fit the network: {one_line(error)}"
            raise ModelError(message, remedy=START_ANEW) from error
    unused = world.size > 1 and leaves_parameters_unused(model, preprocessing)
    model.to(world.device)
    if config.sync_batch_norm and world.size > 1:
        model = synchronised(model)
    optimizer = make_optimizer(model, config, world.device)
    if saved is not None and saved.optimizer:
        restore_optimizer(optimizer, saved.optimizer)
    train, test = (
        make_part(prepared(images, preprocessing), labels, preprocessing, world.device)
        for images, labels in ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels))
    )
    scaler = saved.scaler if saved is not None else {}
    return Prepared(config, dataset, preprocessing, model, optimizer, train, test, world, scaler, unused)


def check_last_batch(config: TrainingConfig, model: nn.Module, count: int, world: World) -> None:
    """Raise UsageError for a last batch of one image per process: after a linear layer BatchNorm has no variance of it."""
    if not any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        return
    together = config.sync_batch_norm and world.size > 1
    least = 2 if not together else 1  # synchronised, each process needs one image
    for batch in (min(config.batch_size, count), count % config.batch_size):
        if batch and (world.smallest_share(batch) < least or batch < 2):
            if world.size == 1:
                raise UsageError(
                    f"with batch-size {config.batch_size} the last batch has one of the {count} images, "
                    "and BatchNorm needs at least 2",
                    remedy="Choose another --batch-size",
                )
            raise UsageError(
                f"with batch-size {config.batch_size} the last batch has {batch} of the {count} images for "
                f"{world.size} processes, and BatchNorm needs at least {least} in each",
                remedy="Choose another --batch-size, or --sync-batch-norm, or fewer processes",
            )


def made_by(world: World) -> dict[str, Any]:
    """Return the environment on which the last bit of a run's weights depends."""
    cpu = world.device.type == "cpu"
    return {
        "device": "cpu" if cpu else torch.cuda.get_device_name(world.device),
        "processor": cpu_name(),  # kernels are chosen by it
        "processes": world.size,
        "threads": torch.get_num_threads() if cpu else 0,  # of each process
        "torch": torch.__version__,
    }


def resume_note(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return why a resumed run may end with other weights than an uninterrupted one; None if it does not."""
    shared = [name for name in now if name in before]
    if changed := [f"{name} was {before[name]}, is {now[name]}" for name in shared if before[name] != now[name]]:
        return f"the resumed weights may differ by rounding from an uninterrupted run's: {'; '.join(changed)}"
    if now["device"] != "cpu":
        return "the order of sums on a GPU is not fixed: the resumed weights may differ by rounding"
    return None
