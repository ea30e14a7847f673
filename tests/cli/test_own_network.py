"""The journey of a user's own network: a checkpoint, a folder of pictures and a file of labels, through every command."""

import json
import shlex
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.bundles import reseal
from support.journey import CLASSES, IMAGE, PREPROCESSING, TESTED, Home, make_home

import bnexport
from bnexport.bundle import MODEL_ONNX, REPORT, Bundle
from bnexport.cli.main import run
from bnexport.errors import UsageError
from bnexport.verification.scope import Scope

Run = Callable[..., tuple[int, str, str]]
ENGINE = ("--runtime", "onnxruntime-cpu")
SAMPLES = TESTED * len(CLASSES)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def exported(home: Home) -> Bundle:
    """The bundle as a user makes it, from Python with keyword arguments alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home.root / "cache"))
        result = bnexport.fold_and_export(
            home.source, home.out("good"), weights=home.weights, input=(3, 32, 32), mean=PREPROCESSING.mean,
            std=PREPROCESSING.std, labels=home.labels, dataset=home.dataset,
            request=bnexport.ExportRequest(formats=("onnx",)),
        )  # fmt: skip
    assert result.verification.accuracy["correct"] == SAMPLES
    assert result.bundle is not None
    return result.bundle


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([str(word) for word in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, " ".join(err.split())

    return call


def export(home: Home, name: str, *words: object) -> tuple[object, ...]:
    return "fold-and-export", home.source, "--weights", home.weights, "--out", home.out(name), *words


def copied(bundle: Bundle, folder: Path, **changes: object) -> Path:
    shutil.copytree(bundle.path, folder)
    reseal(folder, **changes)
    return folder


# The order of the labels


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (CLASSES[::-1], "are the same names in another order; first difference at class 0: 'triangle' and 'circle'"),
        ((*CLASSES[:4], "triangle", "star"), "another order; first difference at class 4: 'triangle' and 'star'"),
        ((*CLASSES[:5], "wedge"), "differ; first difference at class 5: 'wedge' and 'triangle'"),
        (CLASSES[:5], "differ in number, 5 and 6; first difference at class 5: nothing and 'triangle'"),
    ],
)
def test_labels_that_are_not_the_classes_are_refused_before_any_work(
    names: tuple[str, ...], message: str, home: Home, cli: Run
) -> None:
    code, _, err = cli(*export(home, "bad", *IMAGE, "--labels", home.named(*names), "--dataset", home.dataset))
    assert code == 2
    assert message in err
    assert not home.out("bad").exists()


def test_case_spaces_and_underscores_do_not_count(home: Home, exported: Bundle, tmp_path: Path) -> None:
    names = tuple(name.upper() for name in CLASSES)
    bundle = copied(exported, tmp_path / "1", labels=names)
    found = bnexport.evaluate(bundle, dataset=home.dataset)
    assert found.correct == SAMPLES
    assert [row.label for row in found.classes] == list(names)


@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_a_bundle_with_labels_in_another_order_is_refused(
    command: str, home: Home, exported: Bundle, tmp_path: Path, cli: Run
) -> None:
    bundle = copied(exported, tmp_path / "1", labels=(*CLASSES[1:], CLASSES[0]))
    more = ("--source", home.source) if command == "verify" else ()
    code, _, err = cli(command, bundle, "--dataset", home.dataset, *more)
    assert code == 2
    assert "the same names in another order; first difference at class 0: 'cross' and 'circle'" in err


def test_predict_refuses_labels_in_another_order_than_a_known_data_set(
    bundle: Bundle, tmp_path: Path, cli: Run
) -> None:
    labels = bundle.manifest.labels
    assert labels is not None
    assert bundle.manifest.dataset == "digits"
    spoiled = copied(bundle, tmp_path / "1", labels=(*labels[1:], labels[0]))
    np.save(tmp_path / "x.npy", np.zeros((1, 28, 28), np.uint8))
    assert cli("predict", bundle.path, tmp_path / "x.npy")[0] == 0
    code, _, err = cli("predict", spoiled, tmp_path / "x.npy")
    assert code == 2
    assert "the same names in another order" in err


@pytest.mark.slow
def test_other_names_for_the_classes_are_kept_apart_from_them(home: Home, cli: Run) -> None:
    names = home.named("eins", "zwei", "drei", "vier", "funf", "sechs")
    words = export(home, "german", *IMAGE, "--labels", names, "--dataset", home.dataset, "--format", "onnx")
    assert cli(*words)[0] == 2
    assert cli(*words, "--rename-classes")[0] == 0
    code, out, _ = cli("evaluate", home.out("german"), "--dataset", home.dataset)
    assert code == 0
    assert f"{SAMPLES} of {SAMPLES}" in out
    assert "eins" in out


# Accuracy at or below chance


@pytest.mark.slow
def test_an_export_at_chance_is_a_fail(home: Home, cli: Run) -> None:
    state = torch.load(home.weights, weights_only=True)
    for name in ("fc.weight", "fc.bias"):
        state["state_dict"][name] = state["state_dict"][name].roll(1, 0)
    torch.save(state, home.root / "rolled.pth")
    words = ("fold-and-export", home.source, "--weights", home.root / "rolled.pth", *IMAGE, "--labels", home.labels,
             "--dataset", home.dataset, "--format", "onnx")  # fmt: skip
    code, out, _ = cli(*words, "--out", home.out("rolled"))
    assert code == 1
    assert f"FAIL accuracy, reference, chance: 0 of {SAMPLES} labels right, at or below chance (0.167)" in out
    assert not home.out("rolled").exists()
    assert cli(*words, "--out", home.out("rolled"), "--allow-low-accuracy")[0] == 0
    code, out, _ = cli("verify", home.out("rolled"), "--source", home.source, "--dataset", home.dataset, *ENGINE)
    assert code == 0, "the bundle states that the accuracy was accepted"
    code, out, _ = cli("evaluate", home.out("rolled"), "--dataset", home.dataset)
    assert "WARNING: the accuracy is at or below chance" in out


def test_an_onnx_file_at_chance_is_a_fail(home: Home, exported: Bundle, tmp_path: Path, cli: Run) -> None:
    model = onnx.load(exported.path / MODEL_ONNX)
    onnx.save(model, tmp_path / "good.onnx")
    for tensor in model.graph.initializer:
        if len(CLASSES) in tensor.dims:  # the last layer
            rolled = np.roll(onnx.numpy_helper.to_array(tensor), 1, list(tensor.dims).index(len(CLASSES)))
            tensor.CopyFrom(onnx.numpy_helper.from_array(rolled, tensor.name))
    onnx.save(model, tmp_path / "rolled.onnx")
    more = (*IMAGE, "--labels", home.labels, "--dataset", home.dataset)
    out = home.out("onnx")
    code, shown, _ = cli("fold-and-export", tmp_path / "rolled.onnx", *more, "--out", out)
    assert code == 1
    assert f"FAIL accuracy, reference, chance: 0 of {SAMPLES} labels right, at or below chance (0.167)" in shown
    assert not out.exists()
    assert cli("fold-and-export", tmp_path / "rolled.onnx", *more, "--out", out, "--allow-low-accuracy")[0] == 0
    assert Bundle.open(out).manifest.verification["accuracy"]["accepted"] is True
    assert cli("verify", out, *ENGINE)[0] == 0
    assert cli("fold-and-export", tmp_path / "good.onnx", *more, "--out", home.out("onnx2"))[0] == 0
    code, _, err = cli("fold-and-export", tmp_path / "good.onnx", "--out", tmp_path / "x.onnx", "--allow-low-accuracy")
    assert (code, "--allow-low-accuracy" in err) == (2, True)


def test_a_verification_at_chance_is_a_fail(home: Home, exported: Bundle, tmp_path: Path) -> None:
    """Samples whose folders are named wrongly: the reference gets none right, and no runtime changes a label."""
    for place, name in enumerate(CLASSES):
        shutil.copytree(home.photos / "val" / name, tmp_path / "moved" / CLASSES[place - 1])
    options: dict[str, Any] = {"runtimes": ["onnxruntime-cpu"], "module": home.network(), "samples": tmp_path / "moved"}
    report = bnexport.verify(exported, scope=Scope(max_samples=60), **options)
    assert [row.stage for row in report.failures] == ["accuracy"]
    assert report.failures[0].reason.startswith("0 of 60 labels right, at or below chance (0.167)")
    accepted = bnexport.verify(exported, scope=Scope(max_samples=60, allow_low_accuracy=True), **options)
    assert accepted.passed
    assert accepted.accuracy["accepted"] is True


# A request is met, or refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*IMAGE, "--dataset", "folder:typo"), "typo does not exist"),
        (("--input", "3x32x32", "--dataset", "PHOTOS"), "the preprocessing of the network is unknown. Pass --mean and --std"),
        ((*IMAGE[:2], *IMAGE[2:4], "--dataset", "PHOTOS"), "--mean is given without --std"),
        ((*IMAGE, "--data-dir", "photos"), "--data-dir is given without a data set"),
        ((*IMAGE, "--dataset", "mnist"), "MNIST is missing"),
        ((*IMAGE, "--dataset", "digits", "--data-dir", "x"), "the images of digits are part of bnexport"),
        ((*IMAGE, "--rename-classes"), "--rename-classes is given without --labels"),
        ((*IMAGE[:2], "--mean", "127.5,127.5,127.5", "--std", "64,64,64"), "--mean 127.5 is not a mean of pixels from 0 to 1"),
    ],
)  # fmt: skip
def test_an_export_drops_no_request(
    words: tuple[str, ...], message: str, home: Home, monkeypatch: pytest.MonkeyPatch, cli: Run
) -> None:
    monkeypatch.delenv("BNEXPORT_DATA", raising=False)
    given = [home.dataset if word == "PHOTOS" else word for word in words]
    code, _, err = cli(*export(home, "dropped", *given))
    assert code == 2
    assert message in err
    assert not home.out("dropped").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data-dir", "PHOTOS"), "--data-dir needs the original network, whose code is not in the bundle"),
        (("--dataset", "folder:PHOTOS"), "--dataset needs the original network, whose code is not in the bundle"),
        (("--dataset", "folder:typo", "--source", "SOURCE"), "typo does not exist"),
        (("--data-dir", "PHOTOS/typo", "--source", "SOURCE"), "typo does not exist"),
        (("--dataset", "digits", "--source", "SOURCE"), "the classes of digits differ in number, 6 and 10"),
        (
            ("--samples", "PHOTOS/val", "--data-dir", "PHOTOS", "--source", "SOURCE"),
            "--samples and --data-dir are both",
        ),
        (("--runtime", "torchscript-cpu", "--io-binding"), "--io-binding"),
        (("--runtime", "onnxruntime-cpu", "--conv-search", "exhaustive"), "--conv-search"),
        (("--runtime", "torchscript-cpu", "--optimisation", "none"), "--optimisation"),
    ],
)
def test_a_verification_drops_no_request(
    words: tuple[str, ...], message: str, home: Home, exported: Bundle, cli: Run
) -> None:
    given = [word.replace("PHOTOS", str(home.photos)).replace("SOURCE", home.source) for word in words]
    code, _, err = cli("verify", exported.path, *given)
    assert code == 2
    assert message in err


# Scope of the verdict


def test_the_verdict_states_what_it_covers_and_prints_the_full_check(home: Home, exported: Bundle, cli: Run) -> None:
    code, out, _ = cli("verify", exported.path, *ENGINE)
    assert code == 0
    lines = out.splitlines()
    first, second = lines[0], next(line for line in lines if line.startswith("Full check: "))
    assert first.startswith("PASS, files and golden vectors only; give --source and --dataset for the full check: ")
    assert second == f"Full check: bnexport verify {exported.path} --source {home.source} --dataset {home.dataset}"
    code, out, _ = cli(*shlex.split(second)[3:], *ENGINE, "--json", "-")
    report = json.loads(out)
    assert code == 0
    expected = {"dataset": home.dataset, "n": SAMPLES, "correct": SAMPLES}
    assert {key: report["accuracy"][key] for key in expected} == expected
    assert report["summary"].startswith(f"PASS: {len(report['rows'])} comparisons on ")


def test_a_report_s_command_repeats_the_verification(home: Home, exported: Bundle) -> None:
    page = unescape((exported.path / REPORT).read_text())
    verify = f"bnexport verify {exported.path} --source {home.source} --dataset {home.dataset}"
    assert f"{verify}\n" in page
    assert f"bnexport inspect {exported.path}\n" in page
    assert f"{verify} --runtime onnxruntime-cpu" in page


@pytest.mark.slow
def test_the_commands_of_a_report_reproduce_it(exported: Bundle, cli: Run) -> None:
    page = unescape((exported.path / REPORT).read_text())
    listed = page.partition("<pre>bnexport verify")[2].partition("</pre>")[0].splitlines()
    commands = [f"bnexport verify{listed[0]}", *listed[1:]]
    assert [command.split()[1] for command in commands] == ["verify", "inspect"]
    at_export = exported.manifest.verification
    code, out, _ = cli(*shlex.split(commands[0])[1:], "--json", "-")
    assert code == 0
    again = json.loads(out)
    assert again["accuracy"] == at_export["accuracy"]
    assert {(row["stage"], row["subject"], row["case"]) for row in again["rows"]} >= {
        (row["stage"], row["subject"], row["case"]) for row in at_export["rows"]
    }
    assert cli(*shlex.split(commands[1])[1:])[0] == 0


# Plain weights


def test_plain_weights_are_evaluated_with_the_facts_that_others_take(home: Home, cli: Run) -> None:
    words = ("evaluate", home.weights, "--source", home.source, *IMAGE, "--dataset", home.dataset)
    code, out, _ = cli(*words, "--labels", home.labels)
    assert code == 0
    assert f"{SAMPLES} of {SAMPLES}" in out
    code, _, err = cli(*words, "--labels", home.named(*CLASSES[::-1]))
    assert code == 2
    assert "are the same names in another order" in err
    code, _, err = cli(*words[:-2])
    assert code == 2
    assert "--dataset" in err
    code, _, err = cli(*(word for word in words if word not in IMAGE))
    assert code == 2
    assert "Pass the shape of one image with --input" in err


def test_plain_weights_are_recalibrated_and_the_result_is_a_checkpoint(home: Home, tmp_path: Path, cli: Run) -> None:
    out = tmp_path / "exact.safetensors"
    code, shown, _ = cli("recalibrate", home.weights, "--source", home.source, *IMAGE, "--labels", home.labels,
                         "--dataset", home.dataset, "--out", out)  # fmt: skip
    assert code == 0, shown
    code, shown, _ = cli("evaluate", out, "--source", home.source, "--dataset", home.dataset)
    assert code == 0
    assert f"{SAMPLES} of {SAMPLES}" in shown


def test_inspect_compares_the_statistics_of_a_user_s_network(home: Home, exported: Bundle, cli: Run) -> None:
    code, out, _ = cli("inspect", exported.path, "--source", home.source, "--dataset", home.dataset)
    assert code == 0
    assert "block.bn2" in out.partition("mean off")[2]
    code, _, err = cli("inspect", exported.path, "--statistics")
    assert code == 2
    assert "--source" in err


@pytest.mark.parametrize("words", [("--source", "SOURCE"), ("--source", "SOURCE", *IMAGE, "--dataset", "DATASET")])
def test_inspect_reads_a_file_of_torch_with_its_code(words: tuple[str, ...], home: Home, cli: Run) -> None:
    places = {"SOURCE": home.source, "DATASET": home.dataset}
    code, out, _ = cli("inspect", home.weights, *(places.get(word, word) for word in words))
    assert code == 0
    assert "block.bn2" in out
    assert ("mean off" in out) is ("DATASET" in words)
    code, _, err = cli("inspect", home.weights)
    assert code == 2
    assert "--source" in err


def test_inspect_states_which_set_of_weights_it_read(home: Home, tmp_path: Path, cli: Run) -> None:
    weights = torch.load(home.weights)["state_dict"]
    torch.save({"model": weights, "model_ema": dict(weights)}, tmp_path / "two.pth")
    code, out, err = cli("inspect", tmp_path / "two.pth", "--source", home.source)
    assert code == 0
    assert "two.pth holds 2 sets of weights that fit" in " ".join((out + err).split())


def test_prints_of_the_network_stay_out_of_the_json(home: Home, tmp_path: Path, cli: Run) -> None:
    file, factory = str(home.source).rsplit(":", 1)
    code = f"print('building the network')\nfrom {Path(file).stem} import {factory}\n"
    (Path(file).parent / "loud.py").write_text(code)
    words = ("--source", Path(file).parent / f"loud.py:{factory}", *IMAGE, "--dataset", home.dataset, "--json")
    exit_code, out, err = cli("inspect", home.weights, *words)
    assert exit_code == 0
    assert json.loads(out)["layers"]
    assert "building the network" in err


@pytest.mark.parametrize("command", ["evaluate", "recalibrate", "inspect"])
def test_an_assumed_preprocessing_is_printed_and_recorded(command: str, home: Home, tmp_path: Path, cli: Run) -> None:
    words = (command, home.weights, "--source", home.source, "--input", "3x32x32", "--dataset", home.dataset)
    more = ("--out", tmp_path / "exact.safetensors", "--force") if command == "recalibrate" else ()
    as_json = ("--json", "-") if command == "evaluate" else ("--json",)
    for given, assumed in ((), True), (IMAGE[2:], False):
        code, out, err = cli(*words, *given, *more, *as_json)
        assert code == 0
        assert ("pixels / 255 is assumed" in err and "--mean and --std" in err) is assumed
        if command != "inspect":
            assert bool(json.loads(out)["assumed"]) is assumed
    if command == "evaluate":
        assert json.loads(out)["preprocessing"] == PREPROCESSING.to_json()


# Python


def test_python_callers_get_messages_in_python_s_terms(home: Home, exported: Bundle) -> None:
    with pytest.raises(UsageError) as caught:
        bnexport.ExportRequest(preprocessing={"mean": [0.5], "std": [0.5]})
    assert str(caught.value).startswith(
        "preprocessing has no 'channels', 'height', 'width', 'scale'. Give bnexport.Prep"
    )
    with pytest.raises(UsageError, match=r"bnexport takes example inputs as tensors, not as a numpy\.ndarray"):
        bnexport.fold(home.network(), np.zeros((2, 3, 32, 32), np.float32))  # type: ignore[arg-type]
    with pytest.raises(bnexport.BnexportError, match="is not the network of the bundle"):
        bnexport.verify(exported, module=bnexport.bn_lenet(), runtimes=["onnxruntime-cpu"])
    with pytest.raises(UsageError) as caught:
        bnexport.fold_and_export(
            home.source, home.out("python"), weights=home.weights, input="3x32x32", mean=(0.5,) * 3
        )
    assert str(caught.value).startswith("mean= is given without std=")
    assert "--" not in str(caught.value)


def test_a_request_and_keywords_are_one_request(home: Home, exported: Bundle) -> None:
    request = bnexport.ExportRequest(labels=home.labels, inputs="3x32x32", preprocessing=PREPROCESSING)  # type: ignore[arg-type]
    assert (request.labels, request.inputs) == (CLASSES, ("3x32x32",))
    assert request == bnexport.ExportRequest(labels=CLASSES, inputs=("3x32x32",), preprocessing=PREPROCESSING.to_json())
    assert exported.manifest.preprocessing == PREPROCESSING.to_json()
    assert exported.manifest.labels == CLASSES


# Slips


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "net.py:build"), "Did you mean fold-and-export?"),
        (("convert", "x"), "Did you mean fold-and-export?"),
        (("eval", "x"), "Did you mean evaluate?"),
        (("verfy", "x"), "Did you mean verify?"),
        (("xyzzy",), "bnexport --help"),
        (("evaluate", "x", "--dataset", "PHOTOS"), "Your own images are folder:PHOTOS"),
    ],
)
def test_a_slip_gets_a_suggestion(words: tuple[str, ...], message: str, home: Home, cli: Run) -> None:
    photos = str(home.photos)
    code, _, err = cli(*(word.replace("PHOTOS", photos) for word in words))
    assert code == 2
    assert message.replace("PHOTOS", photos) in err


def test_a_folder_in_the_wrong_place_gets_a_suggestion(home: Home, exported: Bundle, cli: Run) -> None:
    code, _, err = cli("serve", exported.path.parent)
    assert code == 2
    assert f"Did you mean {exported.path}?" in err
    code, _, err = cli("predict", exported.path, home.photos / "val" / "star")
    assert code == 2
    assert "--out FOLDER" in err
    assert f"{home.photos / 'val' / 'star'}/*" in err
    assert MODEL_ONNX in exported.manifest.files
