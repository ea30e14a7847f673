"""Match the names in a weights file with the names that a network expects. Only names are compared; no tensor is read.

A name of the file may differ from the network's by a part that a wrapper added: ``module.`` (DataParallel, AveragedModel),
``_orig_mod.`` (torch.compile), the attribute that held the network (``model.``, ``net.``), in any nesting. A part is left out
only if every name at that place has it, so half a prefix or a second network never fits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

#: Attributes in which wrappers of torch keep the wrapped network, anywhere in a name.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: Last parts of names that count something and belong to no layer: AveragedModel's and profilers'.
COUNTERS = frozenset({"n_averaged", "total_ops", "total_params"})
#: Last part of a buffer that eval mode does not read, and that PyTorch before 0.4.1 and converters do not write.
BATCHES = "num_batches_tracked"
#: Old names of published files -> the network's names: torchvision's DenseNets had norm.1 for norm1.
RENAMES: tuple[tuple[re.Pattern[str], str], ...] = ((re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\."), r"\1\2."),)
#: Names with more parts are compared unchanged, and more prefixes are not tried, because both could take very long.
MAX_PARTS, MAX_CANDIDATES = 32, 16


@dataclass(frozen=True)
class Match:
    """The names of a file that fit a network."""

    names: Mapping[str, str]  # Name in the network -> name in the file
    absent: tuple[str, ...]  # Names of the network that the file lacks and does not need
    ignored: tuple[str, ...]  # Counters in the file


@dataclass(frozen=True)
class Misfit:
    """The reason why a file's names do not fit a network."""

    missing: tuple[str, ...]  # Names of the network that the file lacks
    unexpected: tuple[str, ...]  # Names of the file that the network lacks
    candidates: tuple[str, ...]  # Prefixes; the names below each of them would fit without the others


def match_names(
    wanted: Collection[str], found: Collection[str], *, aliases: Mapping[str, Collection[str]] | None = None
) -> Match | Misfit:
    """Map a network's names (``wanted``) to a file's names (``found``), or return the reason why they do not fit.

    ``aliases`` has the names of the same tensor (tied weights) of a name in the network; one of them is enough.
    """
    closest = _closest(wanted, found, aliases or {})
    if isinstance(closest, Match):
        return closest
    return Misfit(closest.missing, closest.unexpected, _candidates(wanted, found, aliases or {}))


def _closest(wanted: Collection[str], found: Collection[str], aliases: Mapping[str, Collection[str]]) -> Match | Misfit:
    counters = COUNTERS - {_last(name) for name in wanted}
    rest = [name for name in found if _last(name) not in counters]
    counted = any(_last(name) == BATCHES for name in rest)
    misfits = []
    for names in _attempts(wanted, rest):
        lacking = [name for name in wanted if name not in names]
        missing = [name for name in lacking if not _is_optional(name, names, wanted, aliases)]
        unexpected = set(rest) - set(names.values())
        if not missing and not unexpected:
            return Match(names, tuple(lacking), tuple(sorted(set(found) - set(rest))))
        missing = lacking if counted else missing
        misfits.append(Misfit(tuple(sorted(missing)), tuple(sorted(unexpected)), ()))
    return min(misfits, key=lambda misfit: len(misfit.missing) + len(misfit.unexpected))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_optional(
    name: str, names: Collection[str], wanted: Collection[str], aliases: Mapping[str, Collection[str]]
) -> bool:
    """Return True if a file may lack a name."""
    if _last(name) == BATCHES and name.removesuffix(BATCHES) + "running_mean" in wanted:
        return True
    return any(other in names for other in aliases.get(name, ()))


def _attempts(wanted: Collection[str], found: Collection[str]) -> Iterator[dict[str, str]]:
    """Yield possible mappings, the plainest first: name in the network -> name in the file."""
    if any(name.count(".") > MAX_PARTS for name in (*wanted, *found)):  # a file may have any names
        yield {name: name for name in found if name in wanted}
        return
    for change in (_unchanged, _renamed, _unwrapped, lambda names: _unwrapped([*_renamed(names).values()], names)):
        theirs, ours = _turned(change(found)), _turned(change(wanted))
        if theirs is None or ours is None:
            continue
        yield {ours[name]: place for name, place in theirs.items() if name in ours}
        for start in _common_starts(theirs):
            yield {ours[short]: place for name, place in theirs.items() if (short := name[len(start) :]) in ours}
        for start in _common_starts(ours):
            yield {ours[start + name]: place for name, place in theirs.items() if start + name in ours}


def _turned(names: Mapping[str, str]) -> dict[str, str] | None:
    """Return new name -> old name; None if two names became equal."""
    turned = {new: old for old, new in names.items()}
    return turned if len(turned) == len(names) else None


def _unchanged(names: Collection[str]) -> dict[str, str]:
    return {name: name for name in names}


def _renamed(names: Collection[str]) -> dict[str, str]:
    new = _unchanged(names)
    for pattern, replacement in RENAMES:
        new = {name: pattern.sub(replacement, text) for name, text in new.items()}
    return new


def _unwrapped(names: Collection[str], keys: Collection[str] | None = None) -> dict[str, str]:
    """Leave out the attributes of wrappers, each if it is the only name at its place."""
    below: dict[tuple[str, ...], set[str]] = defaultdict(set)
    split = [tuple(name.split(".")) for name in names]
    for parts in split:
        for at, part in enumerate(parts):
            below[parts[:at]].add(part)
    return {
        key: ".".join(
            part
            for at, part in enumerate(parts)
            if at == len(parts) - 1 or part not in WRAPPERS or below[parts[:at]] != {part}
        )
        for key, parts in zip(names if keys is None else keys, split, strict=True)
    }


def _common_starts(names: Collection[str]) -> Iterator[str]:
    """Yield the prefixes that all names share and that end with a dot, the shortest first."""
    start = ""
    for level in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(level)) > 1:
            return
        start += level[0] + "."
        yield start


def _candidates(
    wanted: Collection[str], found: Collection[str], aliases: Mapping[str, Collection[str]]
) -> tuple[str, ...]:
    """Return the prefixes below which the names would fit without the others."""
    anchor = next((name for name in wanted if _last(name) != BATCHES), "")
    starts = {name.removesuffix(anchor) for name in found if anchor and name.endswith("." + anchor)}
    fitting: list[str] = []
    for start in sorted(starts)[:MAX_CANDIDATES]:
        inside = [name.removeprefix(start) for name in found if name.startswith(start)]
        if len(inside) < len(found) and isinstance(_closest(wanted, inside, aliases), Match):
            fitting.append(start.rstrip("."))
    return tuple(fitting)
