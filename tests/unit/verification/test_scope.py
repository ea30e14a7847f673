import pytest

from bnexport.errors import UsageError
from bnexport.runtimes.catalogue import RUNNERS, runner_spec
from bnexport.verification.scope import Scope


@pytest.mark.parametrize("spec", RUNNERS, ids=lambda spec: spec.name)
def test_every_runtime_is_run_strictly_and_as_it_is_served(spec: object) -> None:
    found = Scope().settings_of(spec)
    assert found[0].precision == "float32"
    assert [item.precision for item in found] == list(dict.fromkeys(("float32", spec.served)))
    assert all(item.optimisation == "all" and not item.binding for item in found)
    assert all(item.isolated is (spec.device != "cpu") for item in found)


def test_every_combination_is_a_run() -> None:
    scope = Scope(("float32", "tf32"), ("all", "basic", "none"), (False, True), ("heuristic", "exhaustive"))
    found = scope.settings_of(runner_spec("onnxruntime-cuda"))
    assert len(set(found)) == len(found) == 2 * 3 * 2 * 2
    assert len(scope.settings_of(runner_spec("onnxruntime-cpu"))) == 3 * 2  # no TF32, no cuDNN
    assert len(scope.settings_of(runner_spec("torch-cuda"))) == 2  # no session
    assert [item.describe() for item in scope.settings_of(runner_spec("torch-cpu"))] == [""]


def test_a_half_precision_file_has_its_own_precision_alone() -> None:
    found = Scope(("tf32",)).settings_of(runner_spec("onnxruntime-cuda"), precision="float16")
    assert [item.precision for item in found] == ["float32"]


def test_a_precision_that_a_runtime_lacks() -> None:
    assert Scope(("tf32",)).settings_of(runner_spec("torch-cpu")) == ()
    with pytest.raises(UsageError, match="torch-cpu has no tf32 kernels"):
        Scope(("tf32",)).require(runner_spec("torch-cpu"))
    Scope(("tf32",)).require(runner_spec("torch-cuda"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"precisions": ("float8",)},
        {"precisions": ()},
        {"optimisations": ("most",)},
        {"bindings": ()},
        {"conv_searches": ("lucky",)},
        {"max_samples": 0},
    ],
    ids=str,
)
def test_unknown_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Scope(**wrong)
