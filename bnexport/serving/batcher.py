"""Natural batching: a batch contains the requests that queued while the previous batch ran. No request is delayed to fill one.

The batcher runs on the event loop's thread; slow engines run in separate threads. A request of a small model costs less than
a switch to a thread and back, so with one session, a batch that is expected to take less than INLINE_SECONDS runs on the loop
itself. Requests that arrive together still form one batch: they queue in the turn of the loop in which they are read, and the
batch is made in the next turn.

When an engine refuses a batch, each of its requests runs again alone: the values of one must not fail the others.

An answer is delivered by a call of a Waiter, without waking a task: an asyncio future is a Waiter, and so is a request in the
fast lane of HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bnexport.errors import BnexportError, BundleError, NotServing, RequestError
from bnexport.optional import one_line
from bnexport.runtimes.base import Runner
from bnexport.serving.counters import ModelStatistics
from bnexport.tensors import Array

#: Longest expected time of a batch on the event loop; health checks and other models wait meanwhile.
INLINE_SECONDS = 0.002
#: Prefix of the names of the engines' threads.
THREADS = "bnexport-session"


@dataclass(frozen=True)
class Cost:
    """Cost of a batch: ``fixed`` seconds, and ``per_byte`` seconds for each byte of its inputs."""

    fixed: float
    per_byte: float

    def seconds(self, size: int) -> float:
        """Return the seconds for a batch with ``size`` bytes of inputs."""
        return self.fixed + self.per_byte * size


@dataclass(frozen=True)
class BatchLimits:
    """Limits on waiting requests and on a batch."""

    rows: int = 64  # Samples of one batch; a request with more runs alone
    queue: int = 1024  # Requests that may wait
    deadline: float = 30.0  # Seconds from a request's arrival to its answer


#: Output name -> (rows, ...), or the error.
BatchOutcome = dict[str, Array] | BnexportError


class Waiter(Protocol):
    """Receiver of an answer: the part of ``asyncio.Future`` that the batcher uses. Its methods must not raise."""

    def done(self) -> bool:
        """Return True if the request was answered or abandoned."""

    def set_result(self, result: dict[str, Array], /) -> None:
        """Receive output name -> (rows, ...)."""

    def set_exception(self, exception: BnexportError, /) -> None:
        """Receive the error instead of an answer."""


class _Waiting:
    """A request in the queue or in a running batch."""

    __slots__ = ("deadline", "inputs", "key", "queued_ns", "rows", "size", "waiter")

    def __init__(self, inputs: dict[str, Array], rows: int, waiter: Waiter, deadline: float):
        self.inputs, self.rows, self.waiter, self.deadline = inputs, rows, waiter, deadline
        self.key: object = (  # clients name several inputs in any order
            {name: array.shape[1:] for name, array in inputs.items()}
            if len(inputs) > 1
            else next(iter(inputs.values())).shape[1:]
        )
        self.size = sum(array.nbytes for array in inputs.values())
        self.queued_ns = time.perf_counter_ns()


class Batcher:
    """The queue in front of the sessions of one model; ``batches`` runs samples of several requests together."""

    def __init__(self, runners: Sequence[Runner], cost: Cost, limits: BatchLimits, *, batches: bool = True) -> None:
        self.statistics = ModelStatistics()
        self.limits = limits
        self._runners, self._idle = tuple(runners), list(runners)
        self._cost = cost
        self._rows = limits.rows if batches else 0
        self._queue: deque[_Waiting] = deque()
        self._running: list[list[_Waiting]] = []
        self._threads = ThreadPoolExecutor(len(self._runners), thread_name_prefix=THREADS)
        self._woken = False

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue)

    @property
    def pending(self) -> int:
        """Number of requests in the queue and in running batches."""
        return len(self._queue) + sum(map(len, self._running))

    @property
    def workers(self) -> int:
        """Number of sessions."""
        return len(self._runners)

    def submit(
        self, inputs: dict[str, Array], rows: int, timeout: float | None = None
    ) -> asyncio.Future[dict[str, Array]]:
        """Queue a request; return a future for output name -> (rows, ...)."""
        future: asyncio.Future[dict[str, Array]] = asyncio.get_running_loop().create_future()
        self.enqueue(inputs, rows, future, timeout)
        return future

    def enqueue(self, inputs: dict[str, Array], rows: int, waiter: Waiter, timeout: float | None = None) -> None:
        """Queue a request that fits the model."""
        if len(self._queue) >= self.limits.queue:
            raise NotServing(
                f"{len(self._queue)} requests are waiting, which is the limit", remedy="Try again in a second"
            )
        loop = asyncio.get_running_loop()
        patience = self.limits.deadline if timeout is None else min(timeout, self.limits.deadline)
        self._queue.append(_Waiting(inputs, rows, waiter, loop.time() + patience))
        self._wake(loop)

    def run_now(self, inputs: dict[str, Array], rows: int) -> dict[str, Array] | None:
        """Run a request at once if no other one waits or runs and the model is fast; return None if it has to queue."""
        if self._queue or len(self._runners) > 1 or not self._idle:
            return None
        if self._cost.seconds(sum(array.nbytes for array in inputs.values())) >= INLINE_SECONDS:
            return None
        outcome, ns = _run(self._idle[0], inputs)
        self.statistics.executed(requests=1, rows=rows, queue_ns=0, infer_ns=ns)
        if isinstance(outcome, BnexportError):
            raise outcome
        return outcome

    def expire(self) -> None:
        """Fail every request whose deadline has passed. The server calls it regularly."""
        now = asyncio.get_running_loop().time()
        for item in (*self._queue, *(item for batch in self._running for item in batch)):
            if item.deadline <= now:
                _fail(item, _late())

    async def close(self) -> None:
        """Wait until every queued request is answered, then free the sessions."""
        while self.pending:
            await asyncio.sleep(0.01)
        self._threads.shutdown()
        for runner in self._runners:
            runner.close()

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._woken and self._idle and self._queue:
            self._woken = True
            loop.call_soon(self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give batches to the idle sessions."""
        self._woken = False
        while self._idle and (batch := self._take(loop.time())):
            runner = self._idle.pop()
            self._running.append(batch)
            size = sum(item.size for item in batch)
            if len(self._runners) == 1 and self._cost.seconds(size) < INLINE_SECONDS:
                outcome, ns = _run_batch(runner, batch)
                self._finish(runner, batch, outcome, ns)
                break  # the loop first reads the requests that arrived meanwhile: they are the next batch
            future = loop.run_in_executor(self._threads, _run_batch, runner, batch)
            future.add_done_callback(functools.partial(self._returned, loop, runner, batch))
        self._wake(loop)

    def _returned(
        self, loop: asyncio.AbstractEventLoop, runner: Runner, batch: list[_Waiting], done: asyncio.Future[Any]
    ) -> None:
        self._finish(runner, batch, *done.result())
        self._wake(loop)

    def _take(self, now: float) -> list[_Waiting]:
        """Take requests of the same shapes from the front of the queue, up to the largest batch."""
        batch: list[_Waiting] = []
        rows = 0
        while self._queue:
            item = self._queue[0]
            if item.waiter.done() or item.deadline <= now:
                _fail(item, _late())
            elif not batch:
                batch.append(item)
                rows = item.rows
            elif item.key == batch[0].key and rows + item.rows <= self._rows:
                batch.append(item)
                rows += item.rows
            else:
                break
            self._queue.popleft()
        return batch

    def _finish(self, runner: Runner, batch: list[_Waiting], outcome: BatchOutcome, infer_ns: int) -> None:
        self._idle.append(runner)
        self._running.remove(batch)
        if isinstance(outcome, BnexportError) and len(batch) > 1:
            for item in batch:
                item.key = item  # differs from every other key
            self._queue.extendleft(reversed(batch))
            return
        now = time.perf_counter_ns()
        rows = sum(item.rows for item in batch)
        waited = sum(now - infer_ns - item.queued_ns for item in batch)
        self.statistics.executed(requests=len(batch), rows=rows, queue_ns=max(waited, 0), infer_ns=infer_ns)
        if isinstance(outcome, BnexportError):
            _fail(batch[0], outcome)
            return
        start = 0
        for item in batch:
            if not item.waiter.done():
                whole = len(batch) == 1
                part = dict(outcome) if whole else {k: v[start : start + item.rows] for k, v in outcome.items()}
                item.waiter.set_result(part)
            start += item.rows


def _run_batch(runner: Runner, batch: list[_Waiting]) -> tuple[BatchOutcome, int]:
    feeds = batch[0].inputs
    try:
        if len(batch) > 1:
            feeds = {name: np.concatenate([item.inputs[name] for item in batch]) for name in feeds}
    except Exception as error:  # otherwise the session would never be idle again
        return _fault(error), 0
    return _run(runner, feeds)


def _run(runner: Runner, feeds: dict[str, Array]) -> tuple[BatchOutcome, int]:
    """Run a batch; return the outputs or the error, and the nanoseconds of the engine."""
    start = time.perf_counter_ns()
    try:
        outcome: BatchOutcome = runner.run_fitting(feeds)
    except Exception as error:  # otherwise the client would wait for ever
        outcome = _fault(error)
    return outcome, time.perf_counter_ns() - start


def _blamed(error: BnexportError) -> BnexportError:
    """Return a RequestError if the request's values caused the error.

    The file has answered its golden vectors, so an invalid argument in ONNX Runtime's words comes from the request, such as an
    index past the end of a table.
    """
    cause = error.__cause__
    if cause is None or not isinstance(error, BundleError) or type(cause).__name__ != "InvalidArgument":
        return error
    reason = one_line(cause).rpartition("Status Message: ")[2]
    return RequestError(f"the model can't take these values: {reason}", remedy="Send values in the model's range")


def _fault(error: Exception) -> BnexportError:
    if isinstance(error, BnexportError):
        return _blamed(error)
    if isinstance(error, MemoryError):
        return NotServing("out of memory for the batch", remedy="Send fewer samples")
    return NotServing(f"the batch failed: {one_line(error)}", remedy="Read the server's log", status=500)


def _fail(item: _Waiting, error: BnexportError) -> None:
    if not item.waiter.done():
        item.waiter.set_exception(error)


def _late() -> NotServing:
    return NotServing(
        "the answer was not ready before the deadline", remedy="Allow more time, or send less", status=504
    )
