"""The lanes of the tests: what is fast, in which order files run, and what is made once for all workers."""

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.lanes import MOST_WORKERS, shuffled, thinned, workers
from support.runtimes import READS_EXPORTED, pairs
from support.shared import made_once

from bnexport.runtimes.catalogue import RUNNERS


def is_slow(parameter: object) -> bool:
    return any(mark.name == "slow" for mark in parameter.marks)  # type: ignore[attr-defined]


def test_pairs_are_the_whole_product_and_every_fault_is_fast_somewhere() -> None:
    faults = ("a", "b", "c", "d")
    every = [(parameter.values, is_slow(parameter)) for parameter in pairs(faults)]  # type: ignore[attr-defined]
    assert [values for values, _ in every] == [(fault, spec.name) for fault in faults for spec in RUNNERS]
    fast = {values for values, slow in every if not slow}
    assert fast == {(fault, "onnxruntime-cpu") for fault in faults} | {
        (fault, spec.name) for fault in ("a", "b") for spec in RUNNERS
    }
    assert len(pairs(faults, READS_EXPORTED)) == 4 * len(READS_EXPORTED) < len(every)


@dataclass(frozen=True)
class Item:
    path: Path
    name: str


def test_files_are_shuffled_and_the_tests_of_a_file_are_not() -> None:
    items = [Item(Path(f"{file}.py"), f"{file}{number}") for file in "abcdefgh" for number in range(3)]
    orders = [shuffled(items, seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order, key=lambda item: item.name) == items
        for start in range(0, len(order), 3):
            assert order[start : start + 3] == [item for item in items if item.path == order[start].path]


def test_every_nth_parameter_of_a_sampled_test_is_fast() -> None:
    functions = [("a", (3,)), ("b", ()), ("a", (3,)), ("a", (3,)), ("c", (3, 1)), ("a", (3,)), ("b", ()), ("c", (3, 1))]
    assert list(thinned(functions)) == [False, False, True, True, True, False, False, False]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", range(3))
def test_the_mark_makes_the_others_slow(request: pytest.FixtureRequest, number: int) -> None:
    assert (request.node.get_closest_marker("slow") is not None) == (number == 1)


def test_there_is_one_worker_per_core_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 2), (64, MOST_WORKERS)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, cores=cores: range(cores), raising=False)
        assert workers() == expected


def test_a_folder_is_made_once_and_again_after_an_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    name, calls = f"made_once_{os.getpid()}", []

    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("full")

    def make(folder: Path) -> None:
        calls.append(folder)
        folder.mkdir()
        (folder / "whole").touch()

    with pytest.raises(OSError, match="full"):
        made_once(tmp_path_factory, name, fail)
    threads = [threading.Thread(target=made_once, args=(tmp_path_factory, name, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = made_once(tmp_path_factory, name, make)
    assert calls == [folder]
    assert [path.name for path in folder.iterdir()] == ["whole"]
