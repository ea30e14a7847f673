"""CUDA packages that do not fit together, with the records of torch, onnxruntime and the installed packages replaced."""

import json
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from bnexport.cli.main import run
from bnexport.runtimes import cuda_libraries, doctor
from bnexport.runtimes.cuda_libraries import conflicts


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> object:
    """Sets the CUDA versions of torch and onnxruntime, and the installed cuDNN packages."""

    def install(torch: str | None, onnxruntime: str | None, **packages: str) -> None:
        engines = {
            "torch": SimpleNamespace(version=SimpleNamespace(cuda=torch)),
            "onnxruntime": SimpleNamespace(cuda_version=onnxruntime),
        }
        monkeypatch.setattr(cuda_libraries, "_imported", engines.get)
        known = {name.replace("_", "-"): version for name, version in packages.items()}

        def version(name: str) -> str:
            if name not in known:
                raise metadata.PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr(metadata, "version", version)

    return install


def test_this_environment_fits_together() -> None:
    assert conflicts() == ()


@pytest.mark.parametrize(
    ("torch", "onnxruntime"), [("13.0", "13.0"), ("13.0", "13.1"), (None, "13.0"), ("12.8", ""), (None, None)]
)
def test_one_major_version_or_one_engine_is_not_a_conflict(
    machine: object, torch: str | None, onnxruntime: str | None
) -> None:
    machine(torch, onnxruntime, nvidia_cudnn_cu13="9.24.0")
    assert conflicts() == ()


@pytest.mark.parametrize(("torch", "onnxruntime"), [("13.0", "12.8"), ("12.8", "13.0")])
def test_different_cuda_versions_are_named_with_the_remedy(machine: object, torch: str, onnxruntime: str) -> None:
    machine(torch, onnxruntime)
    (found,) = conflicts()
    assert f"torch for CUDA {torch} and onnxruntime for CUDA {onnxruntime}" in found.reason
    assert "CUDA 13 since 1.28" in found.remedy


@pytest.mark.parametrize(
    ("torch", "onnxruntime", "fitting"),
    [("13.0", "13.0", "cu13"), ("12.8", None, "cu12"), (None, "12.8", "cu12"), (None, None, "cu13")],
)
def test_two_cudnn_packages_are_named_with_the_one_to_keep(
    machine: object, torch: str | None, onnxruntime: str | None, fitting: str
) -> None:
    machine(torch, onnxruntime, nvidia_cudnn_cu12="9.10.2", nvidia_cudnn_cu13="9.24.0")
    (found,) = conflicts()
    assert "nvidia-cudnn-cu12 9.10.2 and nvidia-cudnn-cu13 9.24.0 are installed together" in found.reason
    remedy = f"pip uninstall -y nvidia-cudnn-cu12 nvidia-cudnn-cu13, then pip install nvidia-cudnn-{fitting}"
    assert found.remedy == remedy


def test_a_package_that_is_missing_or_broken_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cuda_libraries._imported("torch") is None
    assert conflicts() == ()


def test_the_doctor_prints_conflicts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "RUNNERS", ())
    monkeypatch.setattr(doctor, "conflicts", lambda: (cuda_libraries.Conflict("a and b", "Install c"),))
    diagnosis = doctor.diagnose()
    health = doctor.Health("torch-cpu", works=False, reason="r", remedy="s")
    sick = doctor.Diagnosis((health,), diagnosis.environment, diagnosis.conflicts)
    monkeypatch.setattr(doctor, "diagnose", lambda: sick)
    run(["doctor"])
    printed = capsys.readouterr().out
    assert "CUDA packages that do not fit together: a and b" in printed
    assert "Install c" in printed
    run(["doctor", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["conflicts"] == [{"reason": "a and b", "remedy": "Install c"}]
