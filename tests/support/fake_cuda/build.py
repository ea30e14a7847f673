"""Build the fake CUDA: stub libraries with which onnxruntime's real CUDA provider opens sessions without a GPU.

A child process that is started with the folder in LD_LIBRARY_PATH finds the stubs in place of NVIDIA's libraries. Sessions,
node placement, provider options and IO binding are onnxruntime's own; only computed values are without meaning.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

HERE = Path(__file__).parent
_PROVIDER = "capi/libonnxruntime_providers_cuda.so"
#: Where the header driver_types.h may be: the package nvidia-cuda-runtime, by its CUDA version, or the machine's CUDA.
_HEADERS = ("nvidia/cu13/include", "nvidia/cuda_runtime/include")
_MACHINE_HEADERS = Path("/usr/local/cuda/include")
#: Names of the libraries' functions, undefined in the provider or looked up by it at run time.
_LINKED = re.compile(r"^(__cuda\w+|cuda\w+|cublas\w+|cu[A-Z]\w+|curand\w+)$")
_LOOKED_UP = re.compile(rb"(?<=\0)((?:cudnn|cufft|curand|nvrtc|cu)[A-Z]\w{2,})(?=\0)")
#: Libraries that the provider opens at run time; those that it links are read from it.
_OPENED = ("libcudnn.so.9", "libcufft.so.12", "libnvrtc.so.13")


def missing() -> str | None:
    """Return what this machine lacks for the fake CUDA, one line; None when it can be built."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the fake CUDA is for Linux on x86_64"
    if absent := [tool for tool in ("gcc", "readelf") if shutil.which(tool) is None]:
        return f"{' and '.join(absent)} not installed"
    if _provider() is None:
        return "no onnxruntime-gpu in this environment"
    return (
        None
        if _headers()
        else "no driver_types.h, neither in the machine's CUDA nor in the package nvidia-cuda-runtime"
    )


def build(folder: Path) -> Path:
    """Build the stub libraries into an empty folder, and return the folder."""
    provider, headers = _provider(), _headers()
    assert provider is not None
    assert headers is not None
    stubs = folder / "stubs.c"
    stubs.write_text(
        "".join(f"__attribute__((weak)) int {name}(void) {{ return 0; }}\n" for name in _functions(provider))
    )
    made = folder / "libfake_cuda.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-fno-builtin", "-w", f"-I{headers}", f"-I{HERE}", "-o", str(made)]
    subprocess.run([*command, str(HERE / "fake_cuda.c"), str(stubs)], check=True, capture_output=True, text=True)
    for library in (*_needed(provider), *_OPENED):
        os.symlink(made.name, folder / library)
    return folder


def _site() -> Path | None:
    spec = util.find_spec("onnxruntime")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


def _provider() -> Path | None:
    site = _site()
    file = None if site is None else site / "onnxruntime" / _PROVIDER
    return file if file is not None and file.is_file() else None


def _headers() -> Path | None:
    site = _site()
    folders = [*((site / name) for name in _HEADERS if site is not None), _MACHINE_HEADERS]
    return next((folder for folder in folders if (folder / "driver_types.h").is_file()), None)


def _functions(provider: Path) -> list[str]:
    """Return the functions of the CUDA libraries that a provider uses."""
    symbols = (line.split() for line in _readelf("--dyn-syms", provider))
    linked = {words[7].partition("@")[0] for words in symbols if len(words) > 7 and words[6] == "UND"}
    found = {name for name in linked if _LINKED.match(name)}
    section = next(line.partition("]")[2].split() for line in _readelf("-S", provider) if " .rodata " in line)
    start, size = int(section[3], 16), int(section[4], 16)  # [number] name, kind, address, offset, size
    with provider.open("rb") as file:
        file.seek(start)
        return sorted(found | {name.decode() for name in _LOOKED_UP.findall(file.read(size))})


def _needed(provider: Path) -> list[str]:
    """Return the file names of the CUDA libraries that a provider links."""
    names = re.findall(r"\(NEEDED\).*\[(lib(?:cu)\S+)\]", "\n".join(_readelf("-d", provider)))
    assert names, f"{provider} links no CUDA library"
    return names


def _readelf(what: str, file: Path) -> list[str]:
    done = subprocess.run(["readelf", "-W", what, str(file)], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()
