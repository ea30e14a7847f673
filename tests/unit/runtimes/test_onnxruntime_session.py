"""Settings of a session and the settings in effect; fakes stand for sessions on other machines."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from bnexport.bundle import MODEL_ONNX, Bundle
from bnexport.errors import RuntimeUnavailable
from bnexport.runtimes import cuda_libraries, onnxruntime_session
from bnexport.runtimes.base import RunSettings
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.node_placement import PlacedNode
from bnexport.runtimes.onnxruntime import OnnxRuntimeRunner
from bnexport.runtimes.onnxruntime_session import (
    CUDA,
    OVERRIDE,
    TENSORRT,
    check_placement,
    environment_problem,
    in_effect,
    placement_note,
    precision_of,
    provider_options,
)

ALL_PROVIDERS = [TENSORRT, CUDA, "CPUExecutionProvider"]


def session(**options: dict[str, str]) -> SimpleNamespace:
    """Return a fake of a session on a GPU."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.intra_op_num_threads = 3
    return SimpleNamespace(
        get_session_options=lambda: settings, get_provider_options=lambda: options, get_providers=lambda: list(options)
    )


@pytest.fixture
def override(monkeypatch: pytest.MonkeyPatch) -> object:
    """Sets the value that the libraries of this process have read."""
    return lambda value: monkeypatch.setattr(onnxruntime_session, "tf32_override", lambda: value)


@pytest.mark.parametrize(
    ("device", "options", "variable", "precision"),
    [
        ("cpu", {}, None, "float32"),
        ("cuda", {"use_tf32": "0"}, None, "float32"),
        ("cuda", {"use_tf32": "1"}, None, "tf32"),
        ("cuda", {}, None, "tf32"),  # a version that does not report the option has its default
        ("cuda", {"use_tf32": "1"}, "0", "float32"),
        ("tensorrt", {"use_tf32": "0"}, None, "tf32"),  # which is CUDA's option, not TensorRT's
        ("tensorrt", {}, "0", "float32"),
    ],
)
def test_the_precision_follows_from_the_session_and_the_environment(
    override: object, device: str, options: dict[str, str], variable: str | None, precision: str
) -> None:
    override(variable)
    assert precision_of(device, in_effect(onnxruntime, session(**{CUDA: options}), device)) == precision


def test_the_setting_in_effect_is_read_back(override: object) -> None:
    override("0")
    given = session(**{CUDA: {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT", "gpu_mem_limit": "7"}})
    found = in_effect(onnxruntime, given, "cuda")
    assert found == {
        "optimisation": "basic",
        "threads": 3,
        "deterministic": False,
        "options": {CUDA: {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"}},
        "environment": {OVERRIDE: "0"},
    }


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_tensorrt_is_given_no_half_precision_and_no_cache(precision: str) -> None:
    assert provider_options(TENSORRT, RunSettings(precision)) == {
        "device_id": "0", "trt_fp16_enable": "0", "trt_bf16_enable": "0", "trt_int8_enable": "0",
        "trt_engine_cache_enable": "0", "trt_timing_cache_enable": "0",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("device", "precision", "variable", "words"),
    [
        ("cuda", "float32", None, None),
        ("cuda", "float32", "0", None),
        ("cuda", "float32", "1", "forces TF32"),
        ("cuda", "tf32", "0", "forbids TF32"),
        ("cuda", "tf32", None, None),
        ("tensorrt", "float32", "0", None),
        ("tensorrt", "float32", None, "TensorRT rounds to TF32 unless NVIDIA_TF32_OVERRIDE=0"),
        ("tensorrt", "float32", "1", "forces TF32"),
        ("tensorrt", "tf32", None, None),
        ("tensorrt", "tf32", "0", "forbids TF32"),
        ("cuda", "float32", "changed", "was changed after this process had started"),
    ],
)
def test_an_environment_that_contradicts_is_refused(
    override: object, device: str, precision: str, variable: str | None, words: str | None
) -> None:
    override(variable)
    found = environment_problem(device, precision)
    assert found is None if words is None else words in (found or "")


@pytest.mark.parametrize("name", ["FP16", "BF16", "INT8", "ENGINE_CACHE"])
def test_a_variable_that_overrules_tensorrt_is_refused(
    override: object, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    override(None)
    monkeypatch.setenv(f"ORT_TENSORRT_{name}_ENABLE", "1")
    assert f"ORT_TENSORRT_{name}_ENABLE=1" in (environment_problem("tensorrt", "tf32") or "")
    assert environment_problem("cuda", "tf32") is None
    monkeypatch.setenv(f"ORT_TENSORRT_{name}_ENABLE", "0")
    assert environment_problem("tensorrt", "tf32") is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux records a process's first environment")
@pytest.mark.parametrize(
    ("start", "later", "expected"),
    [(None, None, "None"), ("0", None, "0"), (None, "0", "changed"), ("0", "1", "changed"), ("0", "0", "0")],
)
def test_a_variable_set_too_late_does_not_count(start: str | None, later: str | None, expected: str) -> None:
    """Libraries read the variable when they are loaded, at an unknown time."""
    code = "import os; from bnexport.runtimes.onnxruntime_session import tf32_override as t\n"
    code += f"os.environ['{OVERRIDE}'] = '{later}'\n" if later else ""
    environ = {key: value for key, value in os.environ.items() if key != OVERRIDE}
    environ |= {OVERRIDE: start} if start else {}
    command = [sys.executable, "-c", code + "print(t())"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


CPU = "CPUExecutionProvider"


def placed(**providers: int) -> list[PlacedNode]:
    """Return nodes by provider; those of the CPU are shape nodes of ``shape_model``."""
    return [
        PlacedNode("add" if provider == CPU else f"{provider}{number}", "Add", provider)
        for provider, count in providers.items()
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("providers", "device", "words"),
    [
        ({TENSORRT: 9, CUDA: 2}, "tensorrt", None),
        ({TENSORRT: 9}, "tensorrt", None),
        ({TENSORRT: 9, CPU: 1}, "tensorrt", None),
        ({CUDA: 9, CPU: 1}, "cuda", None),
        ({CUDA: 11}, "tensorrt", "no node runs on TensorRT, all run on CUDAExecutionProvider"),
        ({TENSORRT: 3}, "cuda", "nodes run on TensorrtExecutionProvider"),
        ({CPU: 3}, "cuda", "no node runs on CUDA, all run on CPUExecutionProvider"),
        ({}, "cuda", None),
        ({"OtherExecutionProvider": 3}, "cpu", "nodes run on OtherExecutionProvider"),
    ],
)
def test_nodes_elsewhere_are_a_fall_back(
    providers: dict[str, int], device: str, words: str | None, shape_model: bytes
) -> None:
    nodes = placed(**providers)
    given = session(**{name: {} for name in ALL_PROVIDERS[device == "cuda" :]})
    if words is None:
        assert check_placement(onnxruntime, given, nodes, "x", device, shape_model) == "cuda:0"
        number = providers.get(CPU, 0)
        assert placement_note(device, nodes) == ({"placement": "1 shape node on the CPU"} if number else {})
        return
    with pytest.raises(RuntimeUnavailable, match="x fell back") as caught:
        check_placement(onnxruntime, given, nodes, "x", device, shape_model)
    assert words in caught.value.message


def test_a_session_that_did_not_get_its_provider_names_the_missing_library(
    monkeypatch: pytest.MonkeyPatch, shape_model: bytes
) -> None:
    loader(monkeypatch, providers_cuda="libcurand.so.10: none")
    words = r"x can't run here: onnxruntime's CUDA provider .*libcurand"
    with pytest.raises(RuntimeUnavailable, match=words) as caught:
        check_placement(onnxruntime, session(**{CPU: {}}), placed(**{CPU: 1}), "x", "cuda", shape_model)
    assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.remedy


def loader(monkeypatch: pytest.MonkeyPatch, **missing: str) -> None:
    """Make every library load except those that are named."""

    def load(library: str, *, globally: bool = False) -> str | None:
        return next((reason for part, reason in missing.items() if part in library), None)

    monkeypatch.setattr(cuda_libraries, "preload", lambda _ort: "")
    monkeypatch.setattr(cuda_libraries, "_load", load)


def test_every_missing_library_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loader(monkeypatch)
    assert cuda_libraries.reason(onnxruntime) is None
    loader(monkeypatch, providers_cuda="libcurand.so.10: none")
    assert cuda_libraries.reason(onnxruntime) == "onnxruntime's CUDA provider can't be loaded (libcurand.so.10: none)"
    driver = "libcuda.so.1: none"
    loader(monkeypatch, libcuda=driver, providers_cuda=driver, tensorrt="libnvinfer.so.10: none")
    assert cuda_libraries.reason(onnxruntime) == "no NVIDIA driver (libcuda.so.1: none)"
    assert cuda_libraries.reason(onnxruntime, "tensorrt") == (
        "no NVIDIA driver (libcuda.so.1: none); onnxruntime's TensorRT provider can't be loaded (libnvinfer.so.10: none)"
    )


def test_tensorrt_from_a_python_package_is_loaded_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("libnvonnxparser.so.10", "libnvinfer.so.10", "libnvinfer_plugin.so.10", "libother.so"):
        (tmp_path / name).touch()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(cuda_libraries.util, "find_spec", lambda _name: found)
    loaded = []
    monkeypatch.setattr(cuda_libraries, "_load", lambda name, *, globally: loaded.append((Path(name).name, globally)))
    cuda_libraries.preload_tensorrt()
    wanted = ["libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"]
    assert loaded == [(name, True) for name in wanted]


def test_a_strict_tensorrt_session_in_the_wrong_process_is_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, override: object
) -> None:
    """All libraries exist, so only the environment can be refused."""
    loader(monkeypatch)
    override(None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ALL_PROVIDERS)
    with pytest.raises(RuntimeUnavailable, match="can't run here in float32: TensorRT rounds to TF32 unless") as caught:
        OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, device="tensorrt")
    assert "separate process" in caught.value.remedy


def test_tensorrt_without_its_libraries_names_them(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loader(monkeypatch, tensorrt="libnvinfer.so.10: cannot open shared object file")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ALL_PROVIDERS)
    with pytest.raises(RuntimeUnavailable, match=r"libnvinfer\.so\.10") as caught:
        OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, device="tensorrt")
    assert "tensorrt" in caught.value.remedy


def test_an_engine_that_does_not_obey_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeUnavailable, match="the precision tf32 was requested, but float32 is in effect"):
        OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, settings=RunSettings("tf32"))
    monkeypatch.setitem(onnxruntime_session.LEVELS, "none", "ORT_ENABLE_ALL")
    with pytest.raises(RuntimeUnavailable, match="the optimisation none was requested, but all is in effect"):
        OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, settings=RunSettings(optimisation="none"))


def test_bound_runs_go_through_the_binding_and_refuse_values_elsewhere(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RunSettings(binding=True)
    with OnnxRuntimeRunner(bundle.file(MODEL_ONNX), bundle.manifest.signature, settings=settings) as runner:
        assert runner.description["memory"] == "bound on cpu"
        monkeypatch.setattr(runner, "_direct_run", None)
        feed = np.ones((2, 1, 28, 28), np.float32)
        assert runner.run({"input": feed})["logits"].flags.owndata
        elsewhere = SimpleNamespace(device_name=lambda: "cpu")
        with pytest.raises(RuntimeUnavailable, match="bound its values to cuda, but they are on cpu"):
            runner._refuse_other_memory([elsewhere], "cuda")


def test_the_table_hands_the_settings_on(bundle: Bundle) -> None:
    settings = RunSettings(optimisation="basic", binding=True, threads=1)
    with runner_spec("onnxruntime-cpu").open(bundle, settings=settings) as runner:
        found = {name: runner.description[name] for name in ("optimisation", "memory", "threads", "precision")}
    assert found == {"optimisation": "basic", "memory": "bound on cpu", "threads": 1, "precision": "float32"}


@pytest.mark.parametrize(("carried", "calls"), [(True, ["cu13", "cudnn", None]), (False, [None])])
def test_without_torch_nvidia_s_packages_are_found_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carried: bool, calls: list[str | None]
) -> None:
    """onnxruntime searches only its own folder, but the packages can be next to torch in another folder."""
    called: list[str | None] = []

    def preload_dlls(directory: str | None = None) -> None:
        called.append(None if directory is None else Path(directory).parent.name)
        if directory is None and len(called) < 3:
            print("Failed to load libcurand.so.10")

    for package in ("cudnn", "cu13"):
        (tmp_path / "nvidia" / package / "lib").mkdir(parents=True)
    engine = SimpleNamespace(__file__=str(tmp_path / "site" / "onnxruntime" / "__init__.py"), preload_dlls=preload_dlls)
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "a.zip")])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(cuda_libraries, "installed", lambda _name: False)
    monkeypatch.setattr(cuda_libraries, "_torch_first", not carried)
    preload = cuda_libraries.preload.__wrapped__
    assert preload(engine) == ("" if carried else "Failed to load libcurand.so.10\n")
    assert called == calls
