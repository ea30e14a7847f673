import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from bnexport import environment as module
from bnexport.environment import available_cores, cpu_name, describe, environment, gpu_name, runtime_only, versions


def test_the_record_is_plain_json_with_every_entry():
    record = environment()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert list(record) == ["python", "system", "cpu", "cores", "gpu", "packages"]
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["packages"]["torch"] == metadata.version("torch")
    assert record["packages"]["bnexport"] == metadata.version("bnexport")
    assert record["cpu"]


def test_the_record_loads_nothing_heavy():
    code = (
        "import sys; from bnexport.environment import environment; r = environment();"
        "assert r['gpu'] is None; assert not {'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")


def install(monkeypatch, have):
    """Replace the installed distributions by these versions."""

    def version(name):
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(module.metadata, "version", version)


def test_missing_packages_are_left_out(monkeypatch):
    have = {"onnxruntime": "1.30", "numpy": "2.1"}
    install(monkeypatch, have)
    assert versions() == {"onnxruntime": "1.30", "numpy": "2.1"}
    have["onnxruntime-gpu"] = "1.31"
    assert versions() == {"onnxruntime-gpu": "1.31", "numpy": "2.1"}


def test_cores_are_those_that_the_process_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_OWN_GROUPS", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert available_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1


def quota(folder, value):
    """Files of the first version of control groups."""
    return {f"{folder}/cpu.cfs_quota_us": value, f"{folder}/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "800000 100000"}, 4),
        ("0::/of/the/host", {"cpu.max": "500000 100000"}, 5),
        ("4:memory:/\n1:cpu,cpuacct:/d", quota("cpu,cpuacct/d", "250000"), 3),
        ("1:cpu:/", quota("cpu", "-1"), 64),
        ("1:cpuset:/d", {"cpuset/d/cpu.max": "100000 100000"}, 64),
        ("0::/", {"cpu.max": "nonsense"}, 64),
        ("0::/", {"cpu.max": "0 0"}, 64),
    ],
)  # fmt: skip
def test_cores_are_no_more_than_the_time_of_the_container(monkeypatch, tmp_path, own, files, cores):
    (tmp_path / "own").write_text(own + "\n")
    for name, content in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    monkeypatch.setattr(module, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(module, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert available_cores() == cores


def test_a_system_without_cpuinfo_still_names_a_processor(monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(module.platform, "processor", lambda: "")
    monkeypatch.setattr(module.platform, "machine", lambda: "arm64")
    assert cpu_name() == "arm64"
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_options: "x : 1\nmodel name\t: Fast  CPU: 3\n")
    assert cpu_name() == "Fast  CPU: 3"


def test_the_gpu_is_not_queried_while_torch_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_DRIVER", tmp_path)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "information").write_text("Model: \t\t NVIDIA Example\n")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert gpu_name() is None


def test_without_torch_the_driver_names_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(module, "_DRIVER", tmp_path / "nowhere")
    assert gpu_name() is None
    for number, text in (
        ("0000:0", "IRQ: 3\n"),
        ("0000:1", "Model: \t\t NVIDIA H9\nIRQ: 5\n"),
        ("0000:2", "Model: other\n"),
    ):
        (tmp_path / number).mkdir()
        (tmp_path / number / "information").write_text(text)
    monkeypatch.setattr(module, "_DRIVER", tmp_path)
    assert gpu_name() == "NVIDIA H9"


def test_the_distribution_for_serving_machines_is_recognised(monkeypatch):
    have = {"bnexport-runtime": "2.0"}
    install(monkeypatch, have)
    assert versions() == {"bnexport-runtime": "2.0"}
    assert runtime_only()
    record = {"python": "3", "cpu": "c", "cores": 1, "packages": {**versions(), "numpy": "2"}}
    assert describe(record) == "c (1 cores), Python 3, numpy 2"
    have["bnexport"] = "2.0"
    assert not runtime_only()


@pytest.mark.parametrize(("gpu", "shown"), [(None, ""), ("Big GPU", ", Big GPU")])
def test_describe_is_one_line(gpu, shown):
    record = {"python": "3.11.7", "cpu": "Fast", "cores": 2, "gpu": gpu, "packages": {"bnexport": "1", "torch": "2.15"}}
    assert describe(record) == f"Fast (2 cores{shown}), Python 3.11.7, torch 2.15"


def test_the_memory_that_is_free_is_that_of_the_system_and_of_the_container(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr(module, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(module, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(module, "_GROUPS", tmp_path)
    assert module.available_memory() == 4000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert module.available_memory() == 4000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert module.available_memory() == 2_400_000
    monkeypatch.setattr(module, "_MEMORY", tmp_path / "none")
    monkeypatch.setattr(module, "_OWN_GROUPS", tmp_path / "none")
    assert module.available_memory() is None


def test_steal_is_busy_and_waiting_for_a_disk_is_not(monkeypatch, tmp_path):
    ticks = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(module, "_STAT", tmp_path / "stat")
    assert module.cpu_seconds() == (0.0, 0.0)
    (tmp_path / "stat").write_text(f"cpu  {ticks} 0 {ticks} {5 * ticks} {3 * ticks} 0 0 {2 * ticks} 7 7\ncpu0 1 1\n")
    assert module.cpu_seconds() == (4.0, 12.0)


def test_the_state_of_the_processor_lists_the_known_instruction_sets(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_GOVERNOR", tmp_path / "governor")
    monkeypatch.setattr(
        module, "_lines", lambda file: ["flags : fpu avx512f avx2 sse"] if "cpuinfo" in str(file) else []
    )
    assert module.cpu_state()["instructions"] == ["avx2", "avx512f"]
    assert module.cpu_state()["governor"] is None
    assert module.peak_memory() == 0
    monkeypatch.undo()
    assert module.peak_memory() > 10**7 or not Path("/proc/self/status").exists()
