"""The page docs/affine_form.md, written from measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.folding.affine_form import BASE, BATCHES, BOUNDS, CONTEXTS, FORMS, SHAPES, FormRow, scores, winners
from benchmarks.pages import write_page
from bnexport.environment import describe

_HEAD = """# The form of a standalone affine

A BatchNorm that no layer can take in is left as y = s x + t, one scale and one shift per channel. ONNX can say that in
several ways, and an engine runs one of them faster than the others. This page says which; it is written by
`python scripts/benchmark_affine_form.py`, and `benchmarks.folding.affine_form.winners` gives the answer as data.
"""


def write_document(rows: Sequence[FormRow], path: Path, *, record: Mapping[str, Any], rounds: int, seed: int) -> None:
    """Write the page.

    Args:
        rows: From ``measure_forms``; at least one setting.
        path: The file.
        record: From ``bnexport.environment.environment``.
        rounds: As they were measured.
        seed: As they were measured.

    Raises:
        OutputError: The file can't be written.
    """
    parts = [_HEAD, *_answer(rows), *_conditions(rows, record, rounds, seed), *_errors(rows), *_bounds(rows)]
    write_page([*parts, *_tables(rows)], path)


def _answer(rows: Sequence[FormRow]) -> Iterator[str]:
    yield "## Answer\n"
    yield "| execution provider | form to write | " + " | ".join(FORMS) + " |"
    yield "|---|---|" + "---|" * len(FORMS)
    best = winners(rows)
    for provider, forms in scores(rows).items():
        yield f"| {provider} | **{best[provider]}** | " + " | ".join(f"{forms[form]:.2f}" for form in FORMS) + " |"
    yield f"\nThe numbers are times as a multiple of {BASE}'s: the geometric mean over all settings below of the median ratio."
    if "CUDAExecutionProvider" not in best:
        yield "No GPU was there when this page was written; on one, the same command adds a row for CUDA."
    yield ""


def _conditions(rows: Sequence[FormRow], record: Mapping[str, Any], rounds: int, seed: int) -> Iterator[str]:
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in SHAPES.items())
    yield "## Conditions\n"
    yield f"{describe(dict(record))}; seed {seed}."
    yield (
        f"Shapes (channels x height x width): {shapes}; batches of {' and '.join(map(str, BATCHES))}; ONNX Runtime with every"
        " optimisation (ORT_ENABLE_ALL), inputs and outputs bound; 1 thread and all cores."
    )
    yield (
        f"n = {rounds} rounds: in each the forms run in turn, in alternating order, the fastest of three bursts of a"
        " millisecond or longer. A ratio compares two times of one round, so that a busy machine slows both; shown is the"
        f" median, in brackets the smallest and largest of the rounds. {len({_setting(row) for row in rows})} settings.\n"
    )


def _errors(rows: Sequence[FormRow]) -> Iterator[str]:
    yield "## Error\n"
    yield "Largest |difference| to float64 arithmetic as a share of the largest |value|, worst setting.\n"
    yield "| context | " + " | ".join(FORMS) + " |"
    yield "|---|" + "---|" * len(FORMS)
    for name in dict.fromkeys(row.context for row in rows):
        worst = [max(row.error for row in rows if row.context == name and row.form == form) for form in FORMS]
        yield f"| {name} | " + " | ".join(f"{value:.1e}" for value in worst) + " |"
    yield ""


def _bounds(rows: Sequence[FormRow]) -> Iterator[str]:
    """Whether to move the scale across a Relu: it leaves bounds per channel instead of the affine."""
    measured = [row for row in rows if row.form in BOUNDS]
    if not measured:
        return
    yield "## Bounds instead of the affine\n"
    yield (
        "Before Relu and a convolution an affine can go away in another way: relu(s x + t) = s max(x, -t / s) + t where s is"
        " positive, and the same with min where it is negative. So s and t go into the convolution, and Relu becomes Max with"
        " one bound per channel, or Max and Min for scales of both signs. Times as a multiple of those of"
        f" {BASE} and what follows it: geometric mean, and smallest and largest median. Without a convolution the two compute"
        " different things, and only the time counts.\n"
    )
    yield "| provider | context | form | ratio | worst error |"
    yield "|---|---|---|---|---|"
    for provider, context, form in dict.fromkeys((row.provider, row.context, row.form) for row in measured):
        found = [row for row in measured if (row.provider, row.context, row.form) == (provider, context, form)]
        ratios = [row.ratio.middle for row in found]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        error = max(row.error for row in found)
        cells = [provider, context, form, f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", f"{error:.1e}"]
        yield "| " + " | ".join(cells) + " |"
    yield ""


def _tables(rows: Sequence[FormRow]) -> Iterator[str]:
    yield "## Every setting\n"
    contexts = {context.name: context for context in CONTEXTS}
    for name in dict.fromkeys(row.context for row in rows):
        forms = list(dict.fromkeys(row.form for row in rows if row.context == name))
        around = contexts[name]
        chain = ", ".join([*around.before, "affine", *around.after])
        yield f"### {name[0].upper()}{name[1:]} ({chain})\n"
        yield f"| provider, threads | shape | batch | {BASE}, us | " + " | ".join(forms[1:]) + " |"
        yield "|---|---|---|---|" + "---|" * (len(forms) - 1)
        settings = dict.fromkeys(_setting(row) for row in rows if row.context == name)
        for setting in settings:
            found = {row.form: row for row in rows if _setting(row) == setting}
            provider, threads, _, shape, batch = setting
            cells = [f"{provider.removesuffix('ExecutionProvider')}, {threads or 'all'}", shape, str(batch)]
            cells.append(f"{found[BASE].seconds.middle * 1e6:.0f}")
            cells += [_ratio(found[form]) for form in forms[1:]]
            yield "| " + " | ".join(cells) + " |"
        yield ""


def _ratio(row: FormRow) -> str:
    return f"{row.ratio.middle:.2f} ({row.ratio.low:.2f} to {row.ratio.high:.2f})"


def _setting(row: FormRow) -> tuple[str, int, str, str, int]:
    return row.provider, row.threads, row.context, row.shape, row.batch
