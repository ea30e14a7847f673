"""The record of hardware and versions that is stored with every measurement."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from bnexport.optional import installed

#: Distributions whose versions affect numerical results; of each group the first installed one is recorded.
PACKAGES: tuple[tuple[str, ...], ...] = (
    ("bnexport", "bnexport-runtime"),
    ("torch",),
    ("torchvision",),
    ("onnx",),
    ("onnxscript",),
    ("onnxruntime-gpu", "onnxruntime"),
    ("openvino",),
    ("numpy",),
)
_CPU = Path("/proc/cpuinfo")
_DRIVER = Path("/proc/driver/nvidia/gpus")
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_STAT, _MEMORY, _OWN_STATUS = Path("/proc/stat"), Path("/proc/meminfo"), Path("/proc/self/status")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
#: Instruction sets on which the speed of float32 and int8 kernels depends, as /proc/cpuinfo spells them.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_tile", "asimddp", "i8mm", "sve")


def environment() -> dict[str, Any]:
    """Return hardware and versions as plain JSON values, without heavy imports or errors.

    ``gpu`` is None unless torch is imported already, because its import takes seconds.
    """
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": available_cores(),
        "gpu": gpu_name(),
        "packages": versions(),
    }


def versions() -> dict[str, str]:
    """Return the installed versions of PACKAGES."""
    found: dict[str, str] = {}
    for group in PACKAGES:
        found |= dict(list(versions_of(*group).items())[:1])
    return found


def versions_of(*names: str) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def runtime_only() -> bool:
    """Return True if bnexport-runtime, which needs no torch, is installed instead of bnexport."""
    return "bnexport-runtime" in versions()


def available_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and its control groups.

    Control groups limit the CPU time (``docker run --cpus``, Kubernetes' limits). With more threads than that, all of them are
    stopped for a part of each tenth of a second.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min([bound, *_cpu_limits()]))


def _cpu_limits() -> Iterator[float]:
    """Yield the limit of each control group of this process, in cores (Linux: cgroup-v2.rst, "cpu.max"; sched-bwc.rst)."""
    for folder in _control_groups("cpu", "cpu,cpuacct", "cpuacct,cpu"):
        words = " ".join(_lines(folder / "cpu.max")).split()
        words = words or [*_lines(folder / "cpu.cfs_quota_us"), *_lines(folder / "cpu.cfs_period_us")]
        # Without a limit the first word is "max" or -1.
        if len(words) == 2 and all(word.isdigit() and int(word) > 0 for word in words):
            yield int(words[0]) / int(words[1])


def _memory_limits() -> Iterator[int]:
    """Yield the unused bytes of each control group's memory limit (Linux: cgroup-v2.rst, "memory.max"; memory.rst).

    Pages of files that the system can drop are unused.
    """
    for folder in _control_groups("memory"):
        files = [line.split()[1] for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")]
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            words = [*_lines(folder / limit), *_lines(folder / used)]
            if len(words) == 2 and all(word.isdigit() for word in words):
                yield max(0, int(words[0]) - int(words[1]) + sum(map(int, files)))


def _control_groups(*names: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups, of version 2 and of these controllers of version 1."""
    for line in _lines(_OWN_GROUPS):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in ("", *names):
            continue
        root = _GROUPS / controllers
        group = root / path.strip("/")
        # In a container the group can be mounted at the root, independent of its path.
        for folder in [group, *group.parents] if group.is_dir() else [root]:
            if not folder.is_relative_to(root):
                break
            yield folder


def available_memory() -> int | None:
    """Return the bytes that new processes may use, by the system and the control groups; None if it is unknown."""
    free = _entry(_MEMORY, "MemAvailable:")
    return min([*([] if free is None else [_kilobytes(free)]), *_memory_limits()], default=None)


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes; 0 if the system does not report it."""
    return _kilobytes(_entry(_OWN_STATUS, "VmHWM:") or "0")


def cpu_seconds() -> tuple[float, float]:
    """Return the machine's busy and total CPU time since its start, in seconds; two zeros if it does not report them.

    Time that a hypervisor gave to other machines (steal) is busy (Linux: proc_stat(5)).
    """
    for line in _lines(_STAT)[:1]:
        # user, nice, system, idle, iowait, irq, softirq, steal; guest time is part of user
        ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in line.split()[1:9]]
        return sum(ticks) - sum(ticks[3:5]), sum(ticks)
    return 0.0, 0.0


def cpu_state() -> dict[str, Any]:
    """Return facts on which a measurement depends: instruction sets, frequency governor, and load average of one minute.

    A fact that the system does not report is an empty list or None.
    """
    flags = (_entry(_CPU, "flags", "Features") or "").split()
    return {
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "governor": next(iter(_lines(_GOVERNOR)), None),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def int8_instructions() -> str:
    """Return the int8 instructions of this machine as a phrase, as far as the system lists them."""
    known = set(cpu_state()["instructions"])
    for names, text in (
        (("amx_int8",), "AMX, which adds in 32 bits"),
        (("avx512_vnni", "avx_vnni"), "VNNI, which adds in 32 bits"),
        (("asimddp", "i8mm"), "ARM's dot product, which adds in 32 bits"),
        (("avx512f",), "AVX-512 without VNNI, which saturates at 16 bits"),
        (("avx2",), "AVX2 without VNNI, which saturates at 16 bits"),
    ):
        if known & set(names):
            return text
    return "no int8 instruction that is known"


def _lines(file: Path) -> list[str]:
    """Return a file's lines; none if it is missing or can't be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _entry(file: Path, *starts: str) -> str | None:
    """Return the value of the first line "NAME: VALUE" that begins with one of the texts; None without one."""
    return next((line.partition(":")[2].strip() for line in _lines(file) if line.startswith(starts)), None)


def _kilobytes(value: str) -> int:
    """Return a size such as "3936 kB" in bytes."""
    return int(value.split()[0]) * 1024


def cpu_name() -> str:
    """Return the processor's marketing name if the system provides it, else its architecture."""
    return _entry(_CPU, "model name") or platform.processor() or platform.machine()


def gpu_name() -> str | None:
    """Return the name of torch's first CUDA device; None without a device or before torch is imported.

    If torch is not installed, as on serving machines, it is the first GPU that the driver lists.
    """
    if not installed("torch"):  # the driver's files contain "Model: <tab> NVIDIA H100 80GB HBM3"
        return next(filter(None, (_entry(file, "Model:") for file in sorted(_DRIVER.glob("*/information")))), None)
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name(0))


def describe(record: dict[str, Any]) -> str:
    """Return one line for a terminal or a caption: processor, cores, GPU, versions."""
    own = PACKAGES[0]
    packages = ", ".join(f"{name} {version}" for name, version in record["packages"].items() if name not in own)
    gpu = f", {record['gpu']}" if record.get("gpu") else ""
    return f"{record['cpu']} ({record['cores']} cores{gpu}), Python {record['python']}, {packages}"
