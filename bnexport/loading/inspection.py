"""The BatchNorm statistics of a run, a checkpoint, a plain safetensors file or a bundle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bnexport.bundle import MANIFEST, WEIGHTS, Bundle
from bnexport.errors import MissingDependency, ModelError
from bnexport.files import Refusal
from bnexport.loading.checkpoint import METADATA_KEY, checkpoint_file, load_checkpoint, read_arrays
from bnexport.nn.statistics import DEFAULT_EPS, LayerStatistics, eps_of, layer_statistics
from bnexport.optional import installed
from bnexport.validation.file_kinds import refuse_other_kinds
from bnexport.validation.json_text import parse_json
from bnexport.validation.limits import limit

_BY_NAME = "the layers are sorted by name, because this file does not state their order"
_ASSUMED = f"eps is not in this file: {DEFAULT_EPS:g} is assumed"
#: Kind of a file that is read by its network's code alone -> its name in words.
_WITH_CODE = {"torch": "a file of torch.save", "index": "the index of weights in several files"}


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
    if (kind := refuse_other_kinds(file, "safetensors", *_WITH_CODE)) in _WITH_CODE:
        raise ModelError(
            f"{file} is {_WITH_CODE[kind]}, which is inspected only with the code of its network",
            remedy="Run bnexport inspect --source file.py:factory, or inspect the bundle of the network",
        )
    state, metadata = read_arrays(file)
    eps = _known_eps(file, metadata)
    layers = in_order(layer_statistics(state, eps=eps), [*eps] or order)
    if not layers:
        raise ModelError(
            f"{file} holds no BatchNorm", remedy="Inspect a network that was trained with batch normalization"
        )
    notes += ([] if all(layer.name in eps for layer in layers) else [_ASSUMED]) + ([] if eps or order else [_BY_NAME])
    return Inspection(file, layers, "; ".join(notes))


def _known_eps(file: Path, metadata: Mapping[str, str]) -> dict[str, float]:
    """Return path -> eps of a checkpoint's layers in the network's order: as stated, else of the network built again.

    Files of earlier versions do not state eps. Without torch, and for a user's network, the result is empty then.
    """
    if METADATA_KEY not in metadata:
        return {}
    try:
        stated = parse_json(metadata[METADATA_KEY].encode(), max_bytes=limit("safetensors-header"))
    except Refusal:  # the statistics can be read without it
        return {}
    eps = stated.get("eps") if isinstance(stated, dict) else None
    if isinstance(eps, dict) and all(type(value) in (int, float) for value in eps.values()):
        return {name: float(value) for name, value in eps.items()}
    if not installed("torch"):
        return {}
    from bnexport.loading.sources import build_known

    try:
        return eps_of(build_known(load_checkpoint(file).metadata["network"]))
    except (ModelError, MissingDependency):
        return {}


def in_order(layers: list[LayerStatistics], order: Sequence[str]) -> tuple[LayerStatistics, ...]:
    """Sort layers by their place in the network, and others by name, with numbers in numerical order."""
    places = {name: place for place, name in enumerate(dict.fromkeys(order))}

    def key(layer: LayerStatistics) -> tuple[int, list[str | int]]:
        parts = re.split(r"(\d+)", layer.name)  # text and numbers in turn
        return places.get(layer.name, len(places)), [int(part) if at % 2 else part for at, part in enumerate(parts)]

    return tuple(sorted(layers, key=key))
