"""The part of the proof that a verification covers: the requested images, the reference's accuracy, and the full check."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnexport.bundle import WEIGHTS, Bundle, Manifest
from bnexport.data.classes import SUSPECTS, at_chance, check_dataset
from bnexport.data.dataset_table import folder_of
from bnexport.errors import UsageError
from bnexport.optional import installed, require
from bnexport.tensors import Array
from bnexport.verification.inputs import Case, score_count
from bnexport.verification.reference import not_rebuilt
from bnexport.verification.verdict import Row, VerificationReport

if TYPE_CHECKING:
    from torch import nn

#: Coverage of a verification without the original network; it is part of the verdict.
GOLDEN_ONLY = "files and golden vectors only"


def on_dataset(
    bundle: Bundle,
    dataset: str | None,
    data_dir: str | Path | None,
    *,
    samples: str | Path | None = None,
    module: nn.Module | None = None,
) -> tuple[Bundle, Path | None]:
    """Return the bundle with the requested data set in its manifest, and the folder of that data set.

    Arguments and errors are those of ``verify``. UsageError: samples and a data set, no original network, no data set, no
    preprocessing, or classes that are not the bundle's.
    """
    place = None if data_dir is None else Path(data_dir)
    if dataset is None and place is None:
        return bundle, None
    option = "--data-dir" if dataset is None else "--dataset"
    if samples is not None:
        raise UsageError(
            f"--samples and {option} are both given", remedy="Give one: samples replace the data set's images"
        )
    manifest = bundle.manifest if dataset is None else replace(bundle.manifest, dataset=dataset)
    if manifest.dataset is None:
        raise UsageError(f"the manifest of {bundle.path} names no data set", remedy="Pass --dataset folder:PATH")
    if module is None and (why := not_rebuilt(bundle)) is not None:
        require("torch", purpose=f"{option}, which needs the original network in float64,")
        raise UsageError(
            f"{option} needs the original network, {why}",
            remedy="Give the original network with --source FILE.py:FACTORY",
        )
    if dataset is not None and place is None:
        place = folder_of(dataset)
    check_dataset(
        manifest.dataset,
        preprocessing=manifest.preprocessing if len(manifest.signature.inputs) == 1 else None,
        remedy="Export it again: bnexport fold-and-export with --mean and --std",
        data_dir=place,
        labels=manifest.classes,
        scores=score_count(manifest.signature),
    )
    return Bundle(bundle.path, manifest), place


def judge_accuracy(
    manifest: Manifest, images: Case, labels: Array, *, accept: bool = False
) -> tuple[dict[str, Any], list[Row]]:
    """Return facts to record, and the failed or accepted check of a reference at or below chance (``data.classes``).

    At or below chance, the labels, the preprocessing or the weights are wrong. No check is made if the accuracy is above
    chance, or if the first output is not one score for each class of the network. ``images`` has the reference's outputs, and
    ``labels`` are the true classes.
    """
    scores = next(iter(images.expected.values()))
    stated: Any = manifest.verification.get("accuracy")
    before: Mapping[str, Any] = stated if isinstance(stated, dict) else {}
    facts = {"classes": before["classes"]} if isinstance(before.get("classes"), list) else {}
    known = len(manifest.labels) if manifest.labels is not None else score_count(manifest.signature)
    if scores.ndim != 2 or scores.shape[1] != known:
        return facts, []
    given = scores.argmax(axis=1)
    if (chance := at_chance(labels, given, scores.shape[1])) is None:
        return facts, []
    reason = f"{int((given == labels).sum())} of {images.batch.n} labels right, at or below chance ({chance:.3g})"
    if accepted := accept or before.get("accepted") is True:
        facts["accepted"] = True
        reason += ", which was accepted"
    else:
        reason += f": check {SUSPECTS}; --allow-low-accuracy accepts it"
    return facts, [Row("accuracy", "reference", "chance", accepted, reason, n=images.batch.n)]


def full_check(bundle: Bundle, path: str | Path) -> tuple[str, str]:
    """Return the options that a verification without the original network lacks, and the command of the full check.

    The command names the source and the data set that the manifest states. They come from the bundle: neither is run
    or read before the user repeats the command. Both texts are empty where no option gives the original network.
    """
    manifest = bundle.manifest
    if WEIGHTS not in manifest.files or not installed("torch"):
        return "", ""
    needs = ["--source", _code_of(manifest) or "FILE.py:FACTORY"]
    if manifest.preprocessing is not None and len(manifest.signature.inputs) == 1:
        needs += ["--dataset", manifest.dataset or "folder:PATH"]
    return " and ".join(needs[::2]), shlex.join(["bnexport", "verify", str(path), *needs])


def verify_command(manifest: Manifest, path: Path, report: VerificationReport, *, data_dir: Path | None) -> str:
    """Return the command that repeats the verification of an export, as a shell takes it, with the export's ``data_dir``."""
    words = ["bnexport", "verify", str(path)]
    if (source := _code_of(manifest)) is not None:
        words += ["--source", source]
    if manifest.dataset is not None and any(row.case == "images" for row in report.rows):
        words += ["--dataset", manifest.dataset, *(() if data_dir is None else ("--data-dir", str(data_dir)))]
    return shlex.join(words)


def _code_of(manifest: Manifest) -> str | None:
    """Return the source of a network that bnexport can't rebuild by itself; None for one that needs no ``--source``."""
    if not installed("torch"):
        return None
    from bnexport.loading.sources import unknown_reason

    if unknown_reason(manifest.network) is None:
        return None
    source = str(manifest.network.get("source"))
    return source if all(source.rpartition(":")[::2]) else "FILE.py:FACTORY"
