import pytest

from bnexport.reporting.summary import certified, flipped, predicted_sentence, rate_bound
from bnexport.verification.verdict import Flips, NoisePrediction, Row, VerificationReport, groups, number, total_flips


def test_groups_gather_by_stage_and_subject(passing: VerificationReport) -> None:
    found = groups(passing)
    assert [(group.stage, group.subject, len(group.rows)) for group in found] == [
        ("integrity", "files", 2),
        ("golden", "onnxruntime-cpu", 1),
        ("file-proof", "model.onnx", 1),
        ("strict", "torch-cpu", 2),
        ("strict", "onnxruntime-cpu", 2),
    ]
    assert found[3].n == 1064
    assert found[3].worst is not None
    assert found[3].worst.case == "images"
    assert found[0].worst is None
    assert found[0].flips is None


def test_a_group_fails_with_one_row_and_shows_it(failing: VerificationReport) -> None:
    torch, ort = groups(failing)[-2:]
    assert not torch.passed
    assert torch.worst is not None
    assert torch.worst.error == 4e-3
    assert not ort.passed
    assert ort.worst is not None
    assert ort.worst.error is None, "a comparison without a finite value is worse than any number"


def test_worst_is_nearest_to_its_own_bound() -> None:
    rows = (
        Row("strict", "a", "loose", True, error=5e-4, bound=1e-2),
        Row("strict", "a", "tight", True, error=9e-7, bound=1e-6),
        Row("strict", "a", "exact", True, error=0.0, bound=0.0),
    )
    (group,) = groups(VerificationReport(rows))
    assert group.worst is not None
    assert group.worst.case == "tight"


def test_flips_add_up_without_a_bound() -> None:
    assert total_flips([Flips(5, 1, 0, 0, 0.5), Flips(3, 0, 2, 1, None)]) == Flips(8, 1, 2, 1, None)


def test_rate_bound_is_the_weakest_and_only_of_images(passing: VerificationReport, failing: VerificationReport) -> None:
    assert rate_bound(passing) == 0.003
    assert rate_bound(VerificationReport(passing.rows[:3])) is None
    fewer = Row("repeat", "x", "images", True, n=9, flips=Flips(9, 0, 0, 0, 0.33))
    assert rate_bound(VerificationReport((*passing.rows, fewer))) == 0.003
    flipped_once = Row("strict", "x", "images", True, n=9, flips=Flips(8, 0, 1, 0, None))
    assert rate_bound(VerificationReport((*passing.rows, flipped_once))) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.84e-7, "3.8e-07"),
        (1e-5, "1e-05"),
        (0.0, "0"),
        (12.13, "12"),
        (None, "-"),
        (float("nan"), "-"),
        (float("inf"), "-"),
        (1.7976931348623157e308, "infinite"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_certified_is_never_rounded_up_to_all() -> None:
    assert certified(Flips(99_999, 1, 0, 0, None)) == "99.9 %"
    assert certified(Flips(100_000, 0, 0, 0, None)) == "100 %"
    assert certified(Flips(0, 0, 0, 0, None)) == "-"
    assert certified(None) == "-"


def test_flipped_names_the_unexplained() -> None:
    assert flipped(Flips(1, 1, 2, 0, None)) == "2"
    assert flipped(Flips(1, 1, 2, 3, None)) == "5 (3 unexplained)"
    assert flipped(None) == "-"


def test_ratio_is_the_largest_and_absent_without_a_prediction() -> None:
    rows = (
        Row("shipping", "a", "images", True, error=3e-4, bound=1e-2, predicted=2e-4, settings="tf32"),
        Row("shipping", "a", "zeros", True, error=1e-4, bound=1e-2, predicted=2e-4, settings="tf32"),
        Row("shipping", "a", "noise", True, error=9e-4, bound=1e-2, settings="tf32"),
        Row("strict", "a", "noise", True, error=9e-4, bound=1e-2),
    )
    shipping, strict = groups(VerificationReport(rows))
    assert shipping.subject == "a, tf32"
    assert shipping.ratio == pytest.approx(1.5)
    assert strict.ratio is None


@pytest.mark.parametrize(
    ("prediction", "sentence"),
    [
        (
            NoisePrediction("tf32", 7.6e-4, 1e-4, 2000, 1, "images"),
            "TF32 is predicted to move outputs by 0.00076 of scale and to change 1 of 2000 labels (images)",
        ),
        (
            NoisePrediction("float32", 3e-7, 1e-8, 9, 0),
            "float32 is predicted to move outputs by 3e-07 of scale and to change none of 9 labels",
        ),
        (
            NoisePrediction("int4", 0.2, 0.1, 9, None, "noise"),
            "int4 is predicted to move outputs by 0.2 of scale (noise)",
        ),
    ],
)
def test_predicted_sentence(prediction: NoisePrediction, sentence: str) -> None:
    assert predicted_sentence(prediction) == sentence


def test_the_users_own_samples_are_real_inputs(passing: VerificationReport) -> None:
    flips = Flips(9, 0, 0, 0, 0.33)
    row = Row("strict", "x", "samples", True, n=9, error=1e-7, bound=1e-5, flips=flips)
    assert rate_bound(VerificationReport((*passing.rows, row))) == 0.33
