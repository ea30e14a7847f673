"""Blocks of several threads: those of one precision share it, another one waits, and the process is as before at the end.

The order is made by events and barriers. ``until`` polls for a state that must come; no test concludes from time passed.
"""

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from bnexport import reproducibility
from bnexport.reproducibility import effective_precision, float32_precision, strict_float32

#: Seconds after which a test gives up on a thread; a deadline, not a measurement.
DEADLINE = 240.0
WORDS = {"float32": "strict float32", "tf32": "TF32"}


def state() -> tuple[object, ...]:
    b = torch.backends
    holders = (
        b,
        b.cuda.matmul,
        b.cudnn,
        b.cudnn.conv,
        b.cudnn.rnn,
        b.mkldnn,
        b.mkldnn.matmul,
        b.mkldnn.conv,
        b.mkldnn.rnn,
    )
    return (*(holder.fp32_precision for holder in holders), b.cudnn.deterministic, b.cudnn.benchmark)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = state(), torch.get_num_threads()
    yield
    assert (state(), torch.get_num_threads()) == before
    turns = reproducibility._TURNS
    assert (turns._inside, turns._waiting, turns._outside, turns._threads) == ({}, {}, {}, {})


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def done(*futures: Future[Any]) -> list[Any]:
    return [future.result(DEADLINE) for future in futures]


def until(true: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(DEADLINE * 1000)):
        if true():
            return
        pause.wait(0.001)
    raise AssertionError("it never came")


def waiting() -> int:
    return len(reproducibility._TURNS._waiting)


class Guest:
    """A thread that enters a block, and stays in it until it is let go."""

    def __init__(self, pool: ThreadPoolExecutor, log: list[str], name: str, precision: str) -> None:
        self.inside, self.let_go = threading.Event(), threading.Event()
        self._log, self._name, self._precision = log, name, precision
        self.future = pool.submit(self._stay)

    def _stay(self) -> None:
        with float32_precision(self._precision):
            self._log.append(self._name)
            self.inside.set()
            assert self.let_go.wait(DEADLINE)
            assert effective_precision("cuda") == WORDS[self._precision]


def test_the_first_one_sets_and_the_last_one_restores(pool: ThreadPoolExecutor) -> None:
    """Each saved and restored for itself before: the first to leave took strict float32 away from the other."""
    before, both = state(), threading.Barrier(2)
    left, seen = threading.Event(), []

    def leaves_first() -> None:
        with strict_float32():
            both.wait(DEADLINE)
        left.set()

    def leaves_last() -> None:
        with strict_float32():
            both.wait(DEADLINE)
            assert left.wait(DEADLINE)
            seen.append(effective_precision("cuda"))

    done(pool.submit(leaves_first), pool.submit(leaves_last))
    assert seen == ["strict float32"]
    assert state() == before


def test_many_threads_of_both_precisions_each_have_their_own(pool: ThreadPoolExecutor) -> None:
    before = state()

    def work(seed: int) -> set[tuple[str, str]]:
        rng, seen = random.Random(seed), set()
        for _ in range(60):
            precision = rng.choice(("float32", "tf32"))
            with float32_precision(precision, exhaustive=rng.random() < 0.5):
                seen.add((precision, effective_precision("cuda")))
                if rng.random() < 0.3:
                    inner = rng.choice(("float32", "tf32"))
                    with float32_precision(inner):
                        seen.add((inner, effective_precision("cuda")))
                seen.add((precision, effective_precision("cuda")))
        return seen

    for seen in done(*(pool.submit(work, seed) for seed in range(6))):
        assert seen == set(WORDS.items())
    assert state() == before


def test_another_precision_waits_until_the_others_are_out(pool: ThreadPoolExecutor) -> None:
    log: list[str] = []
    strict = [Guest(pool, log, f"strict {n}", "float32") for n in range(2)]
    assert all(guest.inside.wait(DEADLINE) for guest in strict)
    tf32 = Guest(pool, log, "tf32", "tf32")
    until(lambda: waiting() == 1)
    strict[0].let_go.set()
    done(strict[0].future)
    assert waiting() == 1  # one is still in
    assert effective_precision("cuda") == "strict float32"
    tf32.let_go.set()
    strict[1].let_go.set()
    done(strict[1].future, tf32.future)
    assert log[-1] == "tf32"


def test_another_choice_of_algorithms_waits_too(pool: ThreadPoolExecutor) -> None:
    seen = []

    def exhaustive() -> None:
        with float32_precision("float32", exhaustive=True):
            seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))

    with strict_float32():
        future = pool.submit(exhaustive)
        until(lambda: waiting() == 1)
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
    done(future)
    assert seen == [(False, True)]


def test_a_waiting_thread_is_overtaken_only_while_an_earlier_one_is_still_inside(pool: ThreadPoolExecutor) -> None:
    """A pool inside a block must be able to work (or its owner never leaves); a stream of guests must not starve the other."""
    log: list[str] = []
    owner = Guest(pool, log, "owner", "float32")
    assert owner.inside.wait(DEADLINE)
    other = Guest(pool, log, "other", "tf32")
    until(lambda: waiting() == 1)
    worker = Guest(pool, log, "worker", "float32")
    assert worker.inside.wait(DEADLINE)  # the owner may be waiting for it
    owner.let_go.set()
    done(owner.future)
    late = Guest(pool, log, "late", "float32")
    until(lambda: waiting() == 2)
    worker.let_go.set()
    assert other.inside.wait(DEADLINE)
    assert not late.inside.is_set()
    for guest in (other, late):
        guest.let_go.set()
    done(worker.future, other.future, late.future)
    assert log == ["owner", "worker", "other", "late"]


def test_threads_that_nest_the_precisions_crosswise_do_not_lock_each_other_out(pool: ThreadPoolExecutor) -> None:
    """Both hold strict float32 when both ask for TF32; neither could have it while the other waited inside the outer block."""
    both, before = threading.Barrier(2), state()

    def work() -> list[str]:
        with strict_float32():
            both.wait(DEADLINE)
            with float32_precision("tf32"):
                inner = effective_precision("cuda")
            return [inner, effective_precision("cuda")]

    assert done(pool.submit(work), pool.submit(work)) == [["TF32", "strict float32"]] * 2
    assert state() == before


def test_a_thread_that_leaves_an_inner_block_waits_for_its_outer_one(pool: ThreadPoolExecutor) -> None:
    joined, leave = threading.Event(), threading.Event()

    def nests() -> str:
        with strict_float32():
            with float32_precision("tf32"):
                assert joined.wait(DEADLINE)
            return effective_precision("cuda")

    def joins() -> str:
        with float32_precision("tf32"):
            joined.set()
            assert leave.wait(DEADLINE)
            return effective_precision("cuda")

    nesting, joining = pool.submit(nests), pool.submit(joins)
    until(lambda: joined.is_set() and waiting() == 1)
    leave.set()
    assert done(nesting, joining) == ["strict float32", "TF32"]


def test_a_change_inside_a_block_is_undone_when_the_next_thread_enters(pool: ThreadPoolExecutor) -> None:
    with strict_float32():
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        with strict_float32():
            assert effective_precision("cuda") == "strict float32"
        assert effective_precision("cuda") != "strict float32"  # one thread alone: as it was before the inner block

        def joins() -> str:
            with strict_float32():
                return effective_precision("cuda")

        assert done(pool.submit(joins)) == ["strict float32"]


@contextlib.contextmanager
def opened(precision: str) -> Iterator[None]:
    with float32_precision(precision):
        yield


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_blocks_that_end_out_of_order_leave_the_process_as_it_was(order: tuple[int, ...]) -> None:
    """Generators that hold a block end whenever they are closed."""
    before = state()
    blocks = [opened(precision) for precision in ("float32", "tf32", "float32")]
    for block in blocks:
        block.__enter__()
    for at in order:
        blocks[at].__exit__(None, None, None)
    assert state() == before


def test_a_block_may_be_closed_by_another_thread(pool: ThreadPoolExecutor) -> None:
    def hold() -> Iterator[None]:
        with strict_float32():
            yield

    before, generator = state(), hold()
    next(generator)
    done(pool.submit(generator.close))
    assert state() == before


def test_an_interrupted_wait_leaves_nothing_behind(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    guest = Guest(pool, log, "strict", "float32")
    assert guest.inside.wait(DEADLINE)

    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(reproducibility._TURNS._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), float32_precision("tf32"):
            pass
    assert waiting() == 0
    guest.let_go.set()
    done(guest.future)
    with float32_precision("tf32"):
        assert effective_precision("cuda") == "TF32"


def test_the_number_of_cpu_threads_is_given_back_by_all(pool: ThreadPoolExecutor) -> None:
    """torch gives a new thread the number that was set last, so a thread that starts inside a block must not keep it."""
    before, both = torch.get_num_threads(), threading.Barrier(2)

    def work() -> list[int]:
        with float32_precision("float32", threads=before + 3):
            both.wait(DEADLINE)
            inside = torch.get_num_threads()
            both.wait(DEADLINE)
        return [inside, torch.get_num_threads()]

    assert done(pool.submit(work), pool.submit(work)) == [[before + 3, before]] * 2
    with ThreadPoolExecutor(1) as fresh:
        assert done(fresh.submit(torch.get_num_threads)) == [before]
