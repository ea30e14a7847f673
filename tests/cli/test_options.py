from pathlib import Path
from typing import Any

import click
import pytest

from bnexport.bundle import INPUT_TYPES, INT8_TARGETS, MODEL_ONNX, STORED_PRECISIONS
from bnexport.cli import fold_and_export
from bnexport.cli.main import run
from bnexport.cli.options import export_request, preprocessing, read_labels
from bnexport.data.dataset_table import DATASETS
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import DataError, UsageError
from bnexport.exporting.export_request import ExportRequest, OnnxTarget
from bnexport.exporting.formats import FORMATS


def options(*arguments: str) -> dict[str, Any]:
    """Return the values that click passes to the command."""
    with fold_and_export.command.make_context(
        "fold-and-export", ["net.py:make", "--out", "m/1", *arguments]
    ) as context:
        return {
            name: value for name, value in context.params.items() if name not in ("source", "out", "weights", "as_json")
        }


def request(*arguments: str) -> ExportRequest:
    return export_request(**options(*arguments))


def refusal(*arguments: str, kind: type[Exception] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        request(*arguments)
    assert caught.value.remedy
    return caught.value.message


def test_without_options_the_request_is_the_default():
    assert request() == ExportRequest()
    assert request().formats == tuple(row.name for row in FORMATS)


def test_every_option_reaches_the_request(tmp_path: Path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    given = request(
        "--input", "image=3x8x9", "--labels", str(tmp_path / "labels.txt"), "--mean", "0.1,0.2,0.3", "--std", "1,2,3",
        "--dataset", "digits", "--data-dir", str(tmp_path), "--opset", "17", "--ir-version", "9", "--format", "onnx",
        "--allow-untrained", "--force", "--allow-nonfinite", "mask", "--allow-nonfinite", "a.table",
    )  # fmt: skip
    assert given == ExportRequest(
        inputs=("image=3x8x9",),
        labels=("cat", "dog"),
        dataset="digits",
        preprocessing=Preprocessing(3, 8, 9, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)).to_json(),
        onnx=OnnxTarget(17, 9),
        formats=("onnx",),
        allow_untrained=True,
        allow_nonfinite=("mask", "a.table"),
        force=True,
        data_dir=tmp_path,
    )


def test_the_choices_are_the_tables():
    choices = {
        parameter.name: list(parameter.type.choices)
        for parameter in fold_and_export.command.params
        if isinstance(parameter.type, click.Choice)
    }
    assert choices == {
        "formats": [row.name for row in FORMATS],
        "dataset": list(DATASETS),
        "precision": list(STORED_PRECISIONS),
        "input_type": list(INPUT_TYPES),
        "target": list(INT8_TARGETS),
    }


@pytest.mark.parametrize("arguments", [["--format", "coreml"], ["--dataset", "cifar"], ["--opset", "x"]])
def test_unknown_choices_are_refused_by_name(arguments, capsys):
    assert run(["fold-and-export", "net.py:make", "--out", "m/1", *arguments]) == 2
    printed = capsys.readouterr().err
    assert arguments[0] in printed
    assert arguments[1] in printed


def test_onnx_can_not_be_left_out():
    assert MODEL_ONNX in refusal("--format", "torchscript")
    assert request("--format", "torchscript", "--format", "onnx").formats == ("torchscript", "onnx")


# --labels


def test_labels_are_lines(tmp_path: Path):
    file = tmp_path / "labels.txt"
    file.write_bytes("\r\n cat \r\nçà va\r\n\r\ndog".encode())
    assert read_labels(file) == ("cat", "çà va", "dog")


def test_a_byte_order_mark_is_not_part_of_the_first_label(tmp_path: Path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
    assert read_labels(tmp_path / "labels.txt") == ("cat", "dog")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "contains no label"), (b" \n\n\t\n", "contains no label"), (b"caf\xe9\n", "can't be read")],
)
def test_a_file_without_labels(tmp_path: Path, content: bytes, message: str):
    file = tmp_path / "labels.txt"
    file.write_bytes(content)
    assert message in refusal("--labels", str(file))
    assert str(file) in refusal("--labels", str(file))


def test_labels_that_are_not_there(tmp_path: Path):
    assert "can't be read" in refusal("--labels", str(tmp_path / "nowhere"))
    assert "can't be read" in refusal("--labels", str(tmp_path))


# --mean and --std


@pytest.mark.parametrize(
    ("mean", "std", "want"),
    [
        (None, None, None),
        ("0.5", "1", Preprocessing(1, 4, 5, mean=(0.5,), std=(1.0,))),
        ("0", "0.25", Preprocessing(1, 4, 5, mean=(0.0,), std=(0.25,))),
        (" -1e-3 ", "2", Preprocessing(1, 4, 5, mean=(-0.001,), std=(2.0,))),
    ],
)
def test_mean_and_std_are_a_preprocessing(mean, std, want):
    assert preprocessing(("1x4x5",), mean, std) == (None if want is None else want.to_json())


@pytest.mark.parametrize(("given", "missing"), [("--mean", "--std"), ("--std", "--mean")])
def test_one_of_mean_and_std_is_not_enough(given, missing):
    assert refusal("--input", "1x4x5", given, "0.5") == f"{given} is given without {missing}"


@pytest.mark.parametrize(("mean", "std"), [("127.5", "64"), ("0.5", "64"), ("127.5", "0.25"), ("0", "255")])
def test_mean_and_std_of_pixels_up_to_255_are_refused(mean, std):
    assert "of pixels from 0 to 1" in refusal("--input", "1x4x5", "--mean", mean, "--std", std)


@pytest.mark.parametrize("inputs", [[], ["10"], ["3x8"], ["3x8x8", "a=3x8x8"], ["2x3x8x8"], ["x=scalar"]])
def test_mean_and_std_are_for_one_image(inputs):
    arguments = [word for text in inputs for word in ("--input", text)]
    assert "for one image input" in refusal(*arguments, "--mean", "0")


@pytest.mark.parametrize("text", ["", "a", "0.1,,0.3", "0.1;0.2", "0.1 0.2 0.3"])
@pytest.mark.parametrize("option", ["--mean", "--std"])
def test_text_that_is_not_a_list_of_numbers(option, text):
    assert refusal("--input", "3x4x5", option, text) == f"{option} {text!r} is not a list of numbers"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mean", "0.1,0.2", "--std", "1,1,1"), "2 means and 3 standard deviations for 3 channel"),
        (("--mean", "0,0,0", "--std", "1"), "3 means and 1 standard deviations for 3 channel"),
        (("--mean", "0,0,0", "--std", "1,0,1"), "not positive"),
        (("--mean", "0,0,0", "--std", "1,-1,1"), "not positive"),
        (("--mean", "nan,0,0", "--std", "1,1,1"), "not finite"),
        (("--mean", "0,0,0", "--std", "1,inf,1"), "not finite"),
    ],
)
def test_numbers_that_are_not_a_preprocessing(arguments, message):
    assert message in refusal("--input", "3x4x5", *arguments, kind=DataError)


def test_a_bad_input_is_named_first():
    assert "'3xx4'" in refusal("--input", "3xx4", "--mean", "0")


@pytest.mark.parametrize("text", ["a\nb\x1b[31m\n", "a\x00\nb\n"])
def test_labels_that_would_steer_a_terminal_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UsageError, match="control characters"):
        read_labels(tmp_path / "labels.txt")


# --dataset


def test_a_folder_of_images_is_a_data_set():
    assert request("--dataset", "folder:some/where").dataset == "folder:some/where"


def test_an_export_reads_the_folder_that_its_data_set_is(tmp_path: Path) -> None:
    own = request("--dataset", f"folder:{tmp_path}")
    assert own.images_at(own.dataset) == tmp_path
    moved = request("--dataset", f"folder:{tmp_path}", "--data-dir", "elsewhere")
    assert moved.images_at(moved.dataset) == Path("elsewhere")
    for dataset in ("digits", f"folder:{tmp_path}/gone", None):
        assert request().images_at(dataset) is None


@pytest.mark.parametrize("name", ["folder:", "foldr:x"])
def test_unknown_data_sets_are_refused_with_all_names(name, capsys):
    assert run(["fold-and-export", "net.py:make", "--out", "m/1", "--dataset", name]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "folder:PATH" in printed
    assert "fashion-mnist" in printed


def test_stages_are_a_line_each_in_a_log_and_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnexport.cli import output
    from bnexport.cli.output import stages
    from bnexport.progress import part_of

    monkeypatch.setattr(output, "_SHOWN_FROM", 0.0)

    def job() -> None:
        with stages() as progress:
            progress("folding", 0, 1)
            part = part_of(progress, 0.5, 1.0)
            part("writing", 0, 4)
            part("writing", 2, 4)

    job()
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [line.partition(":")[0] for line in lines] == ["folding", "writing"]
    assert all(line.endswith(" s") for line in lines)
    monkeypatch.setattr(output, "_SHOWN_FROM", 1e9)
    job()
    assert capsys.readouterr().err == "", "a stage that took no time has no line"
    monkeypatch.setattr(output, "_SHOWN_FROM", 0.0)
    with pytest.raises(ValueError, match="x"), stages() as progress:
        progress("folding", 0, 1)
        raise ValueError("x")
    with stages(quiet=True) as progress:
        progress("folding", 0, 1)
    assert capsys.readouterr().err == "", "a stage that failed is not reported as finished, and --quiet shows nothing"
    monkeypatch.setenv("FORCE_COLOR", "1")
    job()
    assert "75%" in (shown := capsys.readouterr().err)
    assert "writing" in shown
