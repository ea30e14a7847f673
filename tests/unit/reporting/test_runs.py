import dataclasses
import shlex

import click
import pytest
from support.reports import full_report, run_rows

from bnexport.cli.main import cli
from bnexport.reporting.summary import (
    OPTIONS,
    RUN_STAGES,
    cell,
    columns,
    command_of,
    file_groups,
    flips_on_real_inputs,
    groups,
    runs,
)
from bnexport.runtimes.base import CONV_SEARCHES, KERNEL_PRECISIONS, OPTIMISATIONS, RunSettings
from bnexport.runtimes.catalogue import RUNNERS
from bnexport.verification.verdict import Flips, Row, VerificationReport


def test_one_line_per_runtime_and_settings() -> None:
    lines = runs(full_report())
    assert [(run.subject, run.settings, run.passed) for run in lines[:4]] == [
        ("torch-cpu", "", True),
        ("onnxruntime-cuda", "", True),
        ("onnxruntime-cuda", "tf32", True),
        ("torchscript-cpu", "", False),
    ]
    assert lines[2].name == "onnxruntime-cuda, tf32"
    assert [row.detected for row in lines[2].rows if row.detected] == ["tf32"]
    assert lines[2].first is not None
    assert lines[2].first.case == "images"


def test_no_row_is_lost_between_files_and_runs() -> None:
    report = full_report()
    kept = [row for run in runs(report) for row in run.rows]
    kept += [row for group in file_groups(report) for row in group.rows]
    assert len(kept) == len(report.rows)
    assert set(map(id, kept)) == set(map(id, report.rows))


def test_columns_are_those_that_a_run_has() -> None:
    lines = runs(VerificationReport(tuple(run_rows("torch-cpu"))))
    assert list(columns(lines)) == [name for name in RUN_STAGES if name not in ("shipping", "labels")]
    assert columns(()) == {}


def test_a_cell_shows_the_error_nearest_to_its_bound_and_the_predicted_noise() -> None:
    strict, served = runs(full_report())[1:3]
    assert cell(strict.stages["golden"]).value == "1.9e-07"
    assert cell(strict.stages["golden"]).note == ""
    assert (cell(served.stages["shipping"]).value, cell(served.stages["shipping"]).note) == (
        "0.00076",
        "1.3 x predicted",
    )
    assert cell(served.stages["precision"]).value == "tf32"
    failed = runs(full_report())[3].stages["strict"]
    assert not cell(failed).passed
    assert cell(failed).value == "", "a comparison without a number is worse than any number"


def test_flips_are_counted_on_real_inputs() -> None:
    flips = Flips(5, 2, 2, 1, None)
    noise = Row("strict", "a", "noise", True, n=10, error=1e-7, bound=1e-5, flips=flips)
    real = dataclasses.replace(noise, case="samples", n=10)
    assert flips_on_real_inputs(runs(VerificationReport((noise, real)))[0]) == "3 of 10"
    assert flips_on_real_inputs(runs(VerificationReport((noise,)))[0]) == "-"


def every_settings() -> list[RunSettings]:
    return [
        RunSettings(precision, optimisation, search, binding)
        for precision in KERNEL_PRECISIONS
        for optimisation in OPTIMISATIONS
        for search in CONV_SEARCHES
        for binding in (False, True)
    ]


def test_each_word_of_a_setting_has_its_option() -> None:
    words = {part for settings in every_settings() for part in settings.describe().split(", ") if part}
    assert words <= set(OPTIONS)


@pytest.mark.parametrize("spec", RUNNERS, ids=lambda spec: spec.name)
def test_the_command_of_a_run_repeats_that_run(spec: object) -> None:
    """Each setting gives a command that ``verify`` takes, and no two settings of one runtime give the same."""
    verify = cli.get_command(click.Context(cli), "verify")
    assert verify is not None
    seen = set()
    for settings in every_settings():
        if settings.precision not in spec.precisions:
            continue
        (run,) = runs(VerificationReport(tuple(run_rows(spec.name, settings.describe()))))
        words = shlex.split(command_of(run, "bnexport verify 'a b'"))
        assert words[:3] == ["bnexport", "verify", "a b"]
        with click.Context(verify, info_name="verify") as context:
            options, _, _ = verify.make_parser(context).parse_args(words[2:])
        assert options["runtimes"] == [spec.name]
        if len(spec.precisions) > 1:
            assert options["precisions"] == [settings.precision]
        assert options.get("optimisations", ["all"]) == [settings.optimisation]
        assert options.get("conv_searches", ["heuristic"]) == [settings.conv_search]
        assert bool(options.get("io_binding")) is settings.binding
        seen.add(tuple(words))
    assert len(seen) == sum(settings.precision in spec.precisions for settings in every_settings())


def test_rows_without_a_runtime_have_no_command() -> None:
    (run,) = runs(VerificationReport((Row("golden", "test_data_set_0", "open", False, "it can't be read"),)))
    assert command_of(run, "bnexport verify x") == ""
    (run,) = runs(VerificationReport(tuple(run_rows("torch-cpu"))))
    assert command_of(run, "") == ""
    assert command_of(run, "bnexport verify x", seed=7) == "bnexport verify x --runtime torch-cpu --seed 7"


def test_groups_hold_every_stage_of_the_runs() -> None:
    assert {group.stage for group in groups(full_report(passed=True))} >= set(RUN_STAGES) - {"labels"}  # of int8 alone
