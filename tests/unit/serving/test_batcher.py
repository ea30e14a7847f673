"""Natural batching with a runner whose speed a test sets."""

import asyncio
import threading
import time
from collections.abc import Mapping

import numpy as np
import pytest

from bnexport.errors import BundleError, NotServing
from bnexport.runtimes.base import Runner
from bnexport.serving import served_model
from bnexport.serving.batcher import Batcher, BatchLimits, Cost
from bnexport.serving.served_model import add_workers, measured_cost, throughput
from bnexport.tensors import Array, Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", "n")),), (TensorSpec("y", "float32", ("batch", "n")),))
QUICK, SLOW = Cost(0.0, 0.0), Cost(1.0, 0.0)


class Doubler(Runner):
    """A runner that doubles its input, records each batch, waits for ``gate``, and fails on negative numbers."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.name, self.signature, self.effective_device, self.description = "doubler", SIGNATURE, "cpu", {}
        self.batches: list[tuple[int, ...]] = []
        self.threads: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.seconds = seconds

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        assert self.gate.wait(240)
        time.sleep(self.seconds)
        self.batches.append(feeds["x"].shape)
        self.threads.add(threading.get_ident())
        if (feeds["x"] < 0).any():
            raise RuntimeError("negative")
        return {"y": feeds["x"] * 2}


def rows(first: float, count: int = 1, width: int = 2) -> dict[str, Array]:
    return {"x": np.full((count, width), first, np.float32)}


async def ask(batcher: Batcher, first: float, count: int = 1, width: int = 2, timeout: float | None = None) -> None:
    got = await batcher.submit(rows(first, count, width), count, timeout)
    assert np.array_equal(got["y"], np.full((count, width), 2 * first))


async def test_requests_that_came_together_run_together() -> None:
    runner = Doubler()
    batcher = Batcher([runner], QUICK, BatchLimits(rows=64))
    await asyncio.gather(*(ask(batcher, value, 1 + value % 3) for value in range(10)))
    assert runner.batches == [(19, 2)]
    assert runner.threads == {threading.get_ident()}, "a quick model runs on the loop itself"
    await batcher.close()


async def test_one_request_alone_does_not_wait() -> None:
    runner = Doubler()
    batcher = Batcher([runner], QUICK, BatchLimits())
    assert np.array_equal((batcher.run_now(rows(3.0), 1) or {})["y"], [[6, 6]])
    with pytest.raises(BundleError, match="negative"):
        batcher.run_now(rows(-1.0), 1)
    slow = Batcher([runner], SLOW, BatchLimits())
    assert slow.run_now(rows(3.0), 1) is None
    waiting = batcher.submit(rows(1.0), 1)
    assert batcher.run_now(rows(3.0), 1) is None, "it must not overtake"
    await waiting
    await asyncio.gather(batcher.close(), slow.close())


async def test_requests_during_a_batch_form_the_next_one() -> None:
    runner = Doubler()
    runner.gate.clear()
    batcher = Batcher([runner], SLOW, BatchLimits(rows=8))
    first = asyncio.create_task(ask(batcher, 1.0))
    await asyncio.sleep(0.01)
    rest = [asyncio.create_task(ask(batcher, float(value))) for value in range(2, 14)]
    await asyncio.sleep(0.01)
    assert (batcher.waiting, batcher.pending) == (12, 13)
    runner.gate.set()
    await asyncio.gather(first, *rest)
    assert runner.batches == [(1, 2), (8, 2), (4, 2)]
    assert threading.get_ident() not in runner.threads
    assert batcher.statistics.executions == 3
    assert (batcher.statistics.rows, batcher.statistics.queue.count) == (13, 13)
    await batcher.close()


async def test_other_shapes_and_large_requests_run_apart_and_in_order() -> None:
    runner = Doubler()
    batcher = Batcher([runner], QUICK, BatchLimits(rows=4))
    sizes = [(1, 2), (2, 2), (9, 2), (1, 3), (1, 2)]
    await asyncio.gather(*(ask(batcher, 1.0, count, width) for count, width in sizes))
    assert runner.batches == [(3, 2), (9, 2), (1, 3), (1, 2)]
    fixed = Batcher([runner], QUICK, BatchLimits(rows=4), batches=False)
    await asyncio.gather(*(ask(fixed, 1.0) for _ in range(3)))
    assert runner.batches[4:] == [(1, 2)] * 3
    await asyncio.gather(batcher.close(), fixed.close())


class Joiner(Runner):
    """A runner that concatenates two inputs of any widths."""

    def __init__(self) -> None:
        specs = [TensorSpec(name, "float32", ("batch", width)) for name, width in (("a", "n"), ("b", "m"), ("y", "w"))]
        self.name, self.effective_device, self.description = "joiner", "cpu", {}
        self.signature = Signature(tuple(specs[:2]), tuple(specs[2:]))
        self.batches: list[tuple[tuple[int, ...], ...]] = []

    def _run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        self.batches.append((feeds["a"].shape, feeds["b"].shape))
        return {"y": np.concatenate([feeds["a"], feeds["b"]], 1)}


@pytest.mark.parametrize("cost", [QUICK, SLOW])
async def test_several_inputs_may_come_in_any_order(cost: Cost) -> None:
    runner = Joiner()
    batcher = Batcher([runner], cost, BatchLimits())
    three, four = np.full((1, 3), 3, np.float32), np.full((1, 4), 4, np.float32)
    requests = [{"a": three, "b": four}, {"b": three, "a": four}, {"a": three, "b": four}, {"b": four, "a": three}]
    answers = await asyncio.gather(*(batcher.submit(feeds, 1) for feeds in requests))
    for feeds, got in zip(requests, answers, strict=True):
        assert np.array_equal(got["y"], np.concatenate([feeds["a"], feeds["b"]], 1))
    assert runner.batches == [((1, 3), (1, 4)), ((1, 4), (1, 3)), ((2, 3), (2, 4))]
    await batcher.close()


@pytest.mark.parametrize("cost", [QUICK, SLOW])
async def test_a_batch_that_can_not_be_made_takes_no_session_with_it(
    cost: Cost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise MemoryError

    batcher = Batcher([Doubler()], cost, BatchLimits())
    with monkeypatch.context() as context:
        context.setattr("bnexport.serving.batcher.np.concatenate", too_large)
        requests = (batcher.submit(rows(1.0), 1) for _ in range(2))
        answers = await asyncio.gather(*requests, return_exceptions=True)
    assert [np.array_equal(answer["y"], [[2, 2]]) for answer in answers] == [True] * 2, "each alone needs less"  # type: ignore[index]
    await ask(batcher, 2.0)
    await batcher.close()


async def test_a_full_queue_refuses_and_recovers() -> None:
    runner = Doubler()
    runner.gate.clear()
    batcher = Batcher([runner], SLOW, BatchLimits(queue=2))
    tasks = [asyncio.create_task(ask(batcher, 1.0))]
    await asyncio.sleep(0.01)
    tasks += [asyncio.create_task(ask(batcher, 1.0)) for _ in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(NotServing, match="2 requests are waiting") as caught:
        batcher.submit(rows(1.0), 1)
    assert caught.value.status == 503
    runner.gate.set()
    await asyncio.gather(*tasks)
    await ask(batcher, 4.0)
    await batcher.close()


async def test_deadlines_hold_in_the_queue_and_while_a_batch_runs() -> None:
    runner = Doubler()
    runner.gate.clear()
    batcher = Batcher([runner], SLOW, BatchLimits(deadline=0.05))
    running = batcher.submit(rows(1.0), 1)
    await asyncio.sleep(0)
    queued = batcher.submit(rows(2.0), 1, timeout=0.01)
    while not (running.done() and queued.done()):
        await asyncio.sleep(0.01)
        batcher.expire()
    for future in (running, queued):
        with pytest.raises(NotServing, match="not ready before the deadline") as caught:
            await future
        assert caught.value.status == 504
    runner.gate.set()
    await batcher.close()
    assert runner.batches == [(1, 2)], "the second request had expired"


@pytest.mark.parametrize("cost", [QUICK, SLOW])
async def test_an_engine_that_refuses_one_request_answers_the_others(cost: Cost) -> None:
    runner = Doubler()
    batcher = Batcher([runner], cost, BatchLimits())
    requests = [ask(batcher, value) for value in (1.0, -1.0, 2.0, -2.0, 3.0)]
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), BundleError, type(None), BundleError, type(None)]
    assert runner.batches == [(5, 2), *[(1, 2)] * 5]
    await asyncio.gather(ask(batcher, 1.0), ask(batcher, 2.0))
    assert runner.batches[-1] == (2, 2), "later requests run together again"
    assert batcher.statistics.rows == 7
    await batcher.close()


async def test_closing_answers_what_runs_again_alone() -> None:
    batcher = Batcher([Doubler()], SLOW, BatchLimits())
    requests = [asyncio.ensure_future(ask(batcher, value)) for value in (1.0, -1.0, 2.0)]
    await asyncio.sleep(0)
    await batcher.close()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), BundleError, type(None)]


async def test_several_sessions_run_at_the_same_time() -> None:
    runners = [Doubler(), Doubler()]
    for runner in runners:
        runner.gate.clear()
    batcher = Batcher(runners, QUICK, BatchLimits(rows=1))
    tasks = [asyncio.create_task(ask(batcher, 1.0)) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert (batcher.waiting, batcher.pending) == (0, 2)
    for runner in runners:
        runner.gate.set()
    await asyncio.gather(*tasks)
    assert [runner.batches for runner in runners] == [[(1, 2)], [(1, 2)]]
    await batcher.close()


async def test_closing_answers_what_was_accepted() -> None:
    runner = Doubler(seconds=0.02)
    batcher = Batcher([runner], SLOW, BatchLimits(rows=1))
    futures = [batcher.submit(rows(1.0), 1) for _ in range(5)]
    await batcher.close()
    assert all(future.done() and future.exception() is None for future in futures)
    assert runner._closed


@pytest.mark.parametrize(
    ("rates", "sessions"),
    [((100.0, 190.0, 270.0, 290.0, 300.0), 3), ((100.0, 190.0, 270.0), 3), ((100.0, 105.0), 1), ((100.0, 50.0), 1)],
)
def test_slow_models_get_as_many_sessions_as_pay(
    rates: tuple[float, ...], sessions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners: list[Runner] = [Doubler()]
    opened: list[Runner] = list(runners)
    monkeypatch.setattr(served_model, "throughput", lambda running, _feeds: rates[len(running) - 1])

    def another() -> Runner:
        runners.append(Doubler())
        opened.append(runners[-1])
        return runners[-1]

    add_workers(runners, another, rows(1.0, 8), most=len(rates))
    assert len(runners) == sessions
    assert [runner._closed for runner in opened] == [runner not in runners for runner in opened]


def test_the_cost_and_the_throughput_are_measured() -> None:
    feeds = rows(1.0, 8)
    assert measured_cost(Doubler(seconds=0.01), feeds).seconds(8) >= 0.01
    assert throughput([Doubler(seconds=0.02)], feeds, 0.1) > 0
