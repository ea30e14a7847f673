"""``bnexport deploy`` as a user types it: exit codes, one sentence, the files."""

import shutil
import sys
from pathlib import Path

import pytest

from bnexport.cli.main import run

REFERENCE = Path(__file__).parents[2] / "models" / "bn_lenet" / "1"
URI = ("--storage-uri", "s3://bucket/models")


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["triton"], "bn_lenet/config.pbtxt"),
        (["kserve", *URI, "--name", "bn-lenet"], "repository/bn-lenet/config.pbtxt"),
        (["docker"], "compose.yaml"),
    ],
)
def test_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], file: str) -> None:
    out = tmp_path / "out"
    assert run(["deploy", *words, str(REFERENCE), "--out", str(out), "--triton", "24.05"]) == 0
    printed = capsys.readouterr().out
    assert (out / file).is_file()
    assert f"written: {out / file}" in printed
    assert "next: " in printed
    assert run(["deploy", *words, str(REFERENCE), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run(["deploy", *words, str(REFERENCE), "--out", str(out), "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["triton", "--triton", "22.01"], "is not in bnexport's table"),
        (["triton", "--name", "a/b"], "Pass --name a_b"),
        (["kserve", *URI], "Pass --name bn-lenet"),
        (["kserve", "--name", "bn-lenet"], "--storage-uri"),
        (["kserve", "--name", "x", *URI, "--namespace", "A B"], "metadata/namespace"),
        (["kserve", "--name", "x", *URI, "--min-replicas", "9"], "not a valid range"),
        (["docker", "--wheel", "none.whl"], "not a wheel of bnexport"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert run(["deploy", *words, str(REFERENCE), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    out = ("--out", str(tmp_path / "out"))
    assert run(["deploy", "kserve", str(REFERENCE), *out, *URI, "--name", "bn-lenet"]) == 3
    assert "bnexport[deploy]" in capsys.readouterr().err
    for target in ("triton", "docker"):
        assert run(["deploy", target, str(REFERENCE), *out, "--force"]) == 0
        shutil.rmtree(tmp_path / "out")
