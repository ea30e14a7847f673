"""The claims on the page of the chapter: each flips when its numbers do."""

from dataclasses import replace

import pytest
from support.chapter import LAYERS, PLAN, Change, at_chance, crafted, diverged, with_epochs

from benchmarks.chapter.claims import CLAIMS, counted, plus_minus
from benchmarks.chapter.plan import EXPERIMENTS
from benchmarks.chapter.results import Mean
from benchmarks.chapter.run import RunResult


def answers(change: Change, experiment: str) -> list[bool]:
    return [claim.holds for claim in CLAIMS[experiment](crafted(change))]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_claim_holds_of_the_made_up_results(experiment: str) -> None:
    assert answers(lambda run: run, experiment) == [True, True]


def none_learns_at_two(run: RunResult) -> RunResult:
    return with_epochs(run, train_accuracy=0.6) if run.spec.norm == "none" else run


def one_seed_with_norm_diverges(run: RunResult) -> RunResult:
    hit = run.spec.norm == "torch" and run.spec.lr == 2.0 and run.spec.seed == 1
    return diverged(run, 2) if hit and run.spec.epochs == PLAN.epochs else run


def one_seed_is_slower(run: RunResult) -> RunResult:
    hit = run.spec.norm == "torch" and run.spec.lr == 0.5 and run.spec.seed == 2
    return with_epochs(run, train_loss=3.0) if hit else run


def torch_is_apart(run: RunResult) -> RunResult:
    hit = run.spec.norm == "torch" and run.spec.batch_size == 256
    return with_epochs(run, train_loss=lambda loss: loss + 0.002) if hit else run


def biased_trains_otherwise(run: RunResult) -> RunResult:
    return with_epochs(run, train_loss=lambda loss: loss + 1e-9) if run.spec.norm == "scratch" else run


def both_keep_the_biased(run: RunResult) -> RunResult:
    return replace(run, moving_var=dict.fromkeys(LAYERS, 2.0)) if run.moving_var else run


def only_batches_of(size: int, accuracy: float) -> Change:
    def change(run: RunResult) -> RunResult:
        hit = run.spec.images == PLAN.batch_images and run.spec.batch_size == size
        return with_epochs(run, test_accuracy=accuracy + 0.001 * run.spec.seed, train_accuracy=0.8) if hit else run

    return change


def moving_are_as_good(run: RunResult) -> RunResult:
    if run.spec.lr != 2.0 or run.spec.norm == "none":
        return run
    better = 0.03 if run.spec.seed else -0.03
    return replace(run, history=tuple(replace(e, exact_accuracy=e.test_accuracy + better) for e in run.history))


def nearer_at_two(run: RunResult) -> RunResult:
    return with_epochs(run, shift=0.01) if run.spec.lr == 2.0 and run.spec.norm == "torch" else run


def gamma_stays(run: RunResult) -> RunResult:
    stays = {"gamma": [1.0, 1.01, 0.99], "beta": [0.5, -0.5, 0.2]}
    return replace(run, affine={**run.affine, "bn3": stays}) if run.affine else run


def beta_stays(run: RunResult) -> RunResult:
    stays = {"gamma": [1.5, 1.6, 1.9], "beta": [0.0, -0.5, 0.001]}
    return replace(run, affine={**run.affine, "bn1": stays}) if run.affine else run


def seeds_differ(run: RunResult) -> RunResult:
    centre = 2.0 + 3.0 * run.spec.seed
    alike = {"gamma": [centre, centre + 0.01], "beta": [1.0, 1.0]}
    return replace(run, affine=dict.fromkeys(LAYERS, alike)) if run.affine else run


@pytest.mark.parametrize(
    ("change", "experiment", "expected"),
    [
        (none_learns_at_two, "a", [False, True]),
        (one_seed_with_norm_diverges, "a", [False, False]),
        (one_seed_is_slower, "a", [True, False]),
        (torch_is_apart, "b", [False, True]),
        (biased_trains_otherwise, "b", [True, False]),
        (both_keep_the_biased, "b", [True, False]),
        (only_batches_of(1024, 0.9), "c", [False, True]),
        (only_batches_of(2, 0.9), "c", [False, False]),
        (only_batches_of(2, 0.845), "c", [True, False]),
        (only_batches_of(2, 0.7), "c", [True, True]),
        (moving_are_as_good, "d", [False, True]),
        (nearer_at_two, "d", [True, False]),
        (gamma_stays, "e", [False, True]),
        (beta_stays, "e", [False, True]),
        (seeds_differ, "e", [True, False]),
    ],
)
def test_a_claim_flips_with_its_numbers(change: Change, experiment: str, expected: list[bool]) -> None:
    assert answers(change, experiment) == expected


def test_runs_that_did_not_learn_are_reported() -> None:
    first, second = CLAIMS["a"](crafted(one_seed_with_norm_diverges))
    assert "with BatchNorm 3 of 3 at 0.1, 3 of 3 at 0.5, 3 of 3 at 1, 2 of 3 (1 diverged) at 2" in first.found
    assert "without BatchNorm 3 of 3 at 0.1, 3 of 3 at 0.5, 3 of 3 at 1, 0 of 3 (3 at chance) at 2" in first.found
    assert "Of 12 pairs of one learning rate and seed, in 11 the training loss of epoch 3 is lower" in second.found
    assert "In 11 of them it has passed" in second.found


def test_numbers_of_the_sentences() -> None:
    same, convention = CLAIMS["b"](crafted(torch_is_apart))
    assert "2.0e-03 with batches of 256 (seeds deviate by 1.0e-02)" in same.found
    assert "0.0e+00 with batches of 8" in same.found
    assert "Training is the same to the last bit" in convention.found
    assert "are 1.1429 times the biased ones (n/(n-1) = 1.1429), and test accuracy changes by 0.0100 +/- 0.0000" in (
        convention.found
    )
    assert "up to 1.0e-09" in CLAIMS["b"](crafted(biased_trains_otherwise))[1].found
    best, tiny = CLAIMS["c"](crafted())
    assert "at 0.1 batches of 32 are best with 0.850 +/- 0.010" in best.found
    assert tiny.found == "Seeds that learned with them: at 0.1 0 of 3 (3 at chance); at 1 0 of 3 (3 at chance)."
    gap, _ = CLAIMS["d"](crafted())
    assert "0.003 +/- 0.000 at 0.1" in gap.found
    assert "0.060 +/- 0.000 at 2" in gap.found
    assert "bn2 gamma 1.49 to 1.91 (0 of 48 negative), beta -0.50 to -0.30" in CLAIMS["e"](crafted())[0].found


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_nothing_is_claimed_of_runs_that_all_diverged(experiment: str) -> None:
    claims = CLAIMS[experiment](crafted(diverged))
    assert not any(claim.holds for claim in claims)
    assert all(claim.found.endswith(".") for claim in claims)


def test_outcomes_are_counted_and_not_averaged() -> None:
    def mixed(run: RunResult) -> RunResult:
        return (run, at_chance(run), diverged(run, 3))[run.spec.seed]

    setting = crafted(mixed).settings("e")[0]
    assert [run.outcome for run in setting.runs] == ["learned", "chance", "diverged"]
    assert counted(setting) == "1 of 3 (1 at chance, 1 diverged)"
    assert setting.mean("train_loss") == Mean(setting.runs[0].history[-1].train_loss, None, 1)


@pytest.mark.parametrize("name", ["train_accuracy", "test_accuracy", "exact_accuracy"])
def test_a_run_has_learned_if_any_accuracy_shows_it(name: str) -> None:
    run = at_chance(crafted().settings("e")[0].runs[0])
    assert run.outcome == "chance"
    assert with_epochs(run, **{name: 0.2}).outcome == "chance"
    assert with_epochs(run, **{name: 0.21}).outcome == "learned"


def test_means_as_words() -> None:
    assert plus_minus(Mean.of([1.0, 2.0, 3.0])) == "2.000 +/- 1.000"
    assert plus_minus(Mean.of([0.5]), 1) == "0.5"
    assert plus_minus(Mean.of([])) == "-"


def test_every_experiment_has_claims() -> None:
    assert list(CLAIMS) == list(EXPERIMENTS)
