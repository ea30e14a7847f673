import dataclasses

import numpy as np
import pytest

from bnexport.evaluating.confusion import ClassScores
from bnexport.evaluating.evaluate import Evaluation
from bnexport.reporting.results import LISTED_CLASSES, print_evaluation

ENVIRONMENT = {"cpu": "a processor", "cores": 2, "python": "3.11", "packages": {}}


def evaluation(n: int) -> Evaluation:
    rows = tuple(ClassScores(f"class {k}", 1.0, k / n, k / n, 10) for k in range(n))
    found = Evaluation(
        "model.safetensors", "torch-cpu", "digits", 100, 90, (0.8, 0.95), 0.25, 0.99, rows, np.eye(n, dtype=np.int64),
        ENVIRONMENT,
    )  # fmt: skip
    return dataclasses.replace(found, top=None) if n <= 5 else found


def printed_text(found: Evaluation, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    print_evaluation(found, written=["confusion.png"])
    return capsys.readouterr().out


def test_every_number_has_its_conditions(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = printed_text(evaluation(7), capsys, monkeypatch)
    assert "model.safetensors: 100 test images of digits, torch-cpu" in text
    assert "accuracy 0.9000 (95 % Wilson interval 0.8000 to 0.9500; 90 of 100)" in text
    assert "loss 0.2500 nats" in text
    assert "top-5 accuracy 0.9900" in text
    assert "a processor (2 cores)" in text
    assert "written: confusion.png" in text
    assert text.count("class ") == 7 + 1


def test_few_classes_have_no_top_5(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "top-5" not in printed_text(evaluation(3), capsys, monkeypatch)


def test_of_many_classes_the_worst_are_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed_text(evaluation(100), capsys, monkeypatch)
    assert f"the {LISTED_CLASSES} of 100 classes with the lowest F1" in " ".join(text.split())
    assert "class 19 " in text
    assert "class 20 " not in text


def test_missing_numbers_and_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (ClassScores("a\x1b[31m", None, None, None, 0),)
    found = dataclasses.replace(evaluation(3), classes=rows, note="the network was trained on mnist")
    text = printed_text(found, capsys, monkeypatch)
    assert "a?[31m" in text
    assert "\x1b" not in text
    assert "WARNING: the network was trained on mnist" in text
