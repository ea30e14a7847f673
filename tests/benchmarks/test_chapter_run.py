"""The trainings behind docs/results/chapter.md: one training, the files of a run over all of them, and the saved results."""

import json
import statistics
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.chapter import PLAN, crafted

from benchmarks.chapter.plan import BATCHES, EXPERIMENTS, FULL, QUICK, RunSpec, settings_of, specs_of
from benchmarks.chapter.results import gather, load_results, run_chapter, save_results
from benchmarks.chapter.run import RunResult, measure
from benchmarks.records import from_json
from bnexport.errors import DataError, UsageError

SPEC = RunSpec("torch", 1.0, 16, 2, 128, 100, "digits", seed=1)


def test_a_training_is_the_same_with_and_without_its_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    complete = measure(SPEC)
    monkeypatch.setattr("benchmarks.chapter.run._with_exact_statistics", lambda *_: ())
    plain = measure(SPEC)
    assert [epoch.train_loss for epoch in complete.history] == [epoch.train_loss for epoch in plain.history]
    assert [epoch.test_loss for epoch in complete.history] == [epoch.test_loss for epoch in plain.history]
    assert (complete.affine, complete.moving_var) == (plain.affine, plain.moving_var)
    last = complete.history[-1]
    assert last.exact_accuracy is not None
    assert last.exact_accuracy >= last.test_accuracy
    assert last.shift is not None
    assert 0 < last.shift < 5
    assert {layer: len(found["gamma"]) for layer, found in complete.affine.items()} == {
        "bn1": 6, "bn2": 16, "bn3": 120, "bn4": 84,
    }  # fmt: skip


def test_layers_are_the_requested_ones() -> None:
    found = {
        norm: measure(replace(SPEC, norm=norm, batch_size=4, images=512, epochs=1))
        for norm in ("scratch", "scratch-unbiased")
    }
    biased, unbiased = found.values()
    assert biased.history[0].train_loss == unbiased.history[0].train_loss
    assert unbiased.moving_var["bn4"] / biased.moving_var["bn4"] == pytest.approx(4 / 3, rel=0.02)
    none = measure(replace(SPEC, norm="none", epochs=1))
    assert (none.affine, none.moving_var, none.history[0].exact_accuracy) == ({}, {}, None)


def test_a_divergence_is_a_result() -> None:
    result = measure(replace(SPEC, norm="none", lr=1e38, batch_size=32))
    assert (result.outcome, result.diverged) == ("diverged", 1)
    assert from_json(RunResult, json.loads(json.dumps(asdict(result), allow_nan=False))) == result


def test_a_data_set_that_is_too_small_is_refused() -> None:
    with pytest.raises(UsageError, match="digits has 6000 images, not 60000"):
        measure(replace(SPEC, images=60_000))


def test_the_plans_agree_with_the_description_on_the_page() -> None:
    assert (FULL.seeds, FULL.images, FULL.quick, QUICK.quick) == (5, 60_000, False, True)
    assert {spec.lr for spec in settings_of("a", FULL)} == {0.1, 0.5, 1.0, 2.0}
    assert {spec.norm for spec in settings_of("a", FULL)} == {"torch", "none"}
    assert {spec.batch_size for spec in settings_of("c", FULL)} == set(BATCHES) == {2, 8, 32, 128, 256, 1024}
    assert len({(spec.images, spec.epochs) for spec in settings_of("c", FULL)}) == 1, "the same number of images"
    every = specs_of(EXPERIMENTS, FULL)
    assert len({spec.key for spec in every}) == len(set(every)) == len(every)
    assert set(specs_of("de", FULL)) < set(specs_of("a", FULL)), "made once for all three"


@pytest.mark.slow
def test_a_run_keeps_its_results_and_resumes(tmp_path: Path) -> None:
    plan = replace(PLAN, seeds=2, epochs=1)
    reported: list[str] = []
    run = partial(run_chapter, tmp_path / "work", plan, ("e",), jobs=2, on_line=reported.append)
    results = run()
    assert results.experiments == ("e",)
    assert reported[0] == "2 trainings to make, 2 at a time"
    assert len(reported) == 3
    assert results.conditions()[0]["threads"] == max(1, len(results.runs) // 2)
    files = sorted((tmp_path / "work").iterdir())
    assert [file.stem for file in files] == [run.spec.key for run in results.runs]
    before = files[1].read_bytes()
    files[0].unlink()
    again = run()
    assert reported[3] == "1 trainings to make, 2 at a time"
    assert files[1].read_bytes() == before
    assert [r.history for r in again.runs] == [r.history for r in results.runs], "a seed gives the same numbers"
    assert gather(tmp_path / "work", replace(plan, seeds=3)).experiments == ()
    files[0].write_bytes(before)
    with pytest.raises(DataError, match="the result of another training"):
        run()
    files[0].write_text("{}")
    with pytest.raises(DataError, match="holds no result of a training"):
        run()


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no experiment 'f'"):
        run_chapter(tmp_path, PLAN, ("a", "f"), on_line=print)
    with pytest.raises(UsageError, match="0 trainings at a time"):
        run_chapter(tmp_path, PLAN, ("e",), jobs=0, on_line=print)
    with pytest.raises(UsageError, match="digits has 6000 images"):
        run_chapter(tmp_path, replace(FULL, dataset="digits"), ("e",), jobs=1, on_line=print)
    assert list(tmp_path.iterdir()) == []


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = crafted()
    save_results(results, tmp_path / "results.json")
    again = load_results(tmp_path / "results.json")
    save_results(again, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "results.json").read_bytes()
    assert [run.history for run in again.runs] == [run.history for run in results.runs]
    assert again.settings("e")[0].runs == results.settings("e")[0].runs, "gamma and beta, too"


def test_saved_means_are_those_of_the_seeds(tmp_path: Path) -> None:
    save_results(crafted(), tmp_path / "results.json")
    saved = json.loads((tmp_path / "results.json").read_text())
    assert (saved["conditions"][0]["cpu"], saved["plan"]["seeds"]) == ("a processor", 3)
    (setting,) = saved["experiments"]["e"]
    losses = [
        run["history"][-1]["train_loss"]
        for run in saved["runs"]
        if run["spec"]["norm"] == "torch" and run["spec"]["lr"] == 1.0 and run["spec"]["epochs"] == 3
    ]
    assert len(losses) == 3
    assert setting["train_loss"] == {
        "mean": pytest.approx(statistics.mean(losses)), "deviation": pytest.approx(statistics.stdev(losses)), "n": 3,
    }  # fmt: skip
    assert (setting["learned"], setting["chance"], setting["diverged"]) == (3, 0, 0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plan": {}}', '{"plan": {"seed": 1}, "conditions": []}'])
def test_damaged_results_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match="holds no results of the chapter"):
        load_results(tmp_path / "results.json")
    with pytest.raises(DataError):
        load_results(tmp_path / "missing.json")


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    measure(replace(SPEC, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)
