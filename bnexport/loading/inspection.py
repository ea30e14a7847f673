"""The BatchNorm statistics of a run, a checkpoint, a plain safetensors file or a bundle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bnexport.bundle import MANIFEST, WEIGHTS, Bundle
from bnexport.errors import MissingDependency, ModelError
from bnexport.loading.checkpoint import METADATA_KEY, checkpoint_file, load_checkpoint, read_arrays
from bnexport.nn.statistics import DEFAULT_EPS, LayerStatistics, layer_statistics
from bnexport.optional import installed
from bnexport.validation.file_kinds import kind_of

if TYPE_CHECKING:
    from torch import nn


_BY_NAME = "the layers are sorted by name, because this file does not state their order"
_ASSUMED = f"eps is not in this file: {DEFAULT_EPS:g} is assumed"


@dataclass(frozen=True)
class Inspection:
    """The facts that ``bnexport inspect`` shows."""

    file: Path  # The file that was read
    layers: tuple[LayerStatistics, ...]  # Every BatchNorm, in the network's order if that is known, else by name
    note: str = ""  # Assumptions behind the numbers and the order; "" for none


def inspect_path(path: Path) -> Inspection:
    """Read the statistics; a ModelError refuses a damaged file, and one without a BatchNorm."""
    notes = []
    if (path / MANIFEST).exists():
        bundle = Bundle.open(path)
        bundle.check()
        file = bundle.file(WEIGHTS)
        rows = bundle.manifest.fold.get("rows")
        order = [str(row.get("module")) for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        notes += ["the bundle's files take pixels as uint8"] if bundle.manifest.takes_pixels else []
    else:
        file, order = checkpoint_file(path), []
    kind = kind_of(file)
    if kind is not None and kind.name == "torch":
        raise ModelError(
            f"{file} is a file of torch.save; only safetensors files are inspected",
            remedy="Inspect the bundle that fold-and-export made of it, or save the weights with safetensors.torch.save_file",
        )
    state, metadata = read_arrays(file)
    module = _network(file) if METADATA_KEY in metadata else None
    if module is not None:
        order = [name for name, _ in module.named_modules()]
    layers = _in_order(layer_statistics(state, module=module), order)
    if not layers:
        raise ModelError(
            f"{file} holds no BatchNorm", remedy="Inspect a network that was trained with batch normalization"
        )
    notes += ([] if module is not None else [_ASSUMED]) + ([] if order else [_BY_NAME])
    return Inspection(file, layers, "; ".join(notes))


def _network(file: Path) -> nn.Module | None:
    """Return the network of a checkpoint, for the order of its layers and their eps; None if it can't be built."""
    if not installed("torch"):
        return None
    from bnexport.loading.sources import build_known

    try:
        return build_known(load_checkpoint(file).metadata["network"])
    except (ModelError, MissingDependency):  # a user's or timm's network: its statistics can still be read
        return None


def _in_order(layers: list[LayerStatistics], order: Sequence[str]) -> tuple[LayerStatistics, ...]:
    """Sort layers by their place in the network, and others by name, with numbers in numerical order."""
    places = {name: place for place, name in enumerate(dict.fromkeys(order))}

    def key(layer: LayerStatistics) -> tuple[int, list[str | int]]:
        parts = re.split(r"(\d+)", layer.name)  # text and numbers in turn
        return places.get(layer.name, len(places)), [int(part) if at % 2 else part for at, part in enumerate(parts)]

    return tuple(sorted(layers, key=key))
