"""Distributed training: ranks, shares of a batch, and the detection of lost processes.

torchrun starts the processes and sets the environment variables that are read here (torch documentation, "torchrun").

NCCL does not detect a lost process: its kernels wait until the time-out, and then its watchdog aborts this process (SIGABRT).
Gloo's connections close at once when a process ends. So in addition to NCCL the processes form a ring of gloo connections: each
process listens to the next one in a thread, and sends a number to the previous one when it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from bnexport import interrupts
from bnexport.errors import BnexportError, RuntimeUnavailable, UsageError
from bnexport.optional import one_line

_DONE, _FAILED = 0, 1
#: Seconds in which a process ends by itself after the next one ended with an error, if it has the same error.
_GRACE = 10.0
_FOREVER = datetime.timedelta(days=365)
#: Exit code of a training that lost a process, the one of ``Unavailable``.
_UNAVAILABLE = 3


def lost(reason: str) -> RuntimeUnavailable:
    """Return the error of a training that has lost a process."""
    return RuntimeUnavailable(
        f"another process of this training ended: {reason}",
        remedy="The last whole epoch is kept: start again with --resume, with any number of processes",
    )


@contextlib.contextmanager
def watched(rank: int, size: int) -> Iterator[None]:
    """End this process with exit code 3 if another one is lost inside the block; all ``size`` processes enter it together.

    The main thread may be in a kernel that never ends, so another thread ends the process. Files are whole or absent then.
    """
    group: Any = dist.new_group(backend="gloo", timeout=_FOREVER)
    over = threading.Event()
    listener = threading.Thread(target=_listen, args=((rank + 1) % size, group, over), daemon=True)
    listener.start()
    word = _FAILED
    try:
        yield
        word = _DONE
    finally:
        over.set()
        with contextlib.suppress(RuntimeError):  # the previous process has ended
            dist.send(torch.tensor([word]), dst=(rank - 1) % size, group=group)
        listener.join(None if word == _DONE else 1.0)


def _listen(peer: int, group: Any, over: threading.Event) -> None:
    word = torch.tensor([_FAILED])
    try:
        dist.recv(word, src=peer, group=group)
        if word.item() == _DONE or over.wait(_GRACE):
            return
        reason = f"process {peer} ended with an error"
    except RuntimeError as error:
        if over.is_set():
            return
        reason = one_line(error)
    found = lost(reason)
    print(f"Error: {found.message}.\n{found.remedy}.", file=sys.stderr)
    interrupts.exit_at_once(_UNAVAILABLE)


T = TypeVar("T")

#: Time for which a process waits for the others: they may be decoding a folder of images for the first time. A lost process
#: is detected at once, by its closed connection (gloo's, or the ring next to NCCL). A lost machine closes no connection: then
#: gloo raises after this time, and NCCL's watchdog aborts the process.
_PATIENCE = datetime.timedelta(minutes=30)
#: Parts of the backends' error messages for a lost process.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "distbackend", "peer")


@dataclass(frozen=True)
class World:
    """The processes of one training."""

    rank: int = 0  # Number of this process; 0 writes and prints
    size: int = 1  # Number of processes
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # Device of this process

    @property
    def leads(self) -> bool:
        """True in the process that writes and prints."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch; the disjoint parts of all processes differ by one image at most."""
        return batch.tensor_split(self.size)[self.rank]

    def smallest_share(self, count: int) -> int:
        """Return the length of the shortest part of a batch of ``count``."""
        return count // self.size

    def add_up(self, *values: Tensor) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.size > 1:
            for value in values:
                dist.all_reduce(value)

    def leave_together(self) -> None:
        """Wait for all processes before the end, so that no process closes a connection that another one still reads."""
        with contextlib.suppress(RuntimeError):  # a process has ended, so all work is done
            self.add_up(torch.zeros(1, device=self.device))

    def from_leader(self, find: Callable[[], T]) -> T:
        """Return the leading process's picklable result in all processes; all raise its BnexportError."""
        if self.size == 1:
            return find()
        sent: list[Any] = [None]
        if self.leads:
            try:
                sent = [find()]
            except BnexportError as error:
                sent = [error]
        dist.broadcast_object_list(sent, src=0)
        if isinstance(sent[0], BnexportError):
            self.leave_together()
            raise sent[0]
        result: T = sent[0]
        return result

    def same_buffers(self, model: nn.Module) -> None:
        """Copy the leading process's buffers to all: without synchronised BatchNorm the moving statistics differ."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def all_do(self, act: Callable[[], T]) -> T:
        """Return each process's result; all raise a BnexportError of any process, so that the first one reports it."""
        if self.size == 1:
            return act()
        found: list[T] = []
        error: BnexportError | None = None
        try:
            found.append(act())
        except BnexportError as caught:
            error = caught
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, error)
        for rank, one in enumerate(errors):
            if one is not None:
                self.leave_together()
                where = "" if rank == 0 else f"process {rank}: "
                raise type(one)(f"{where}{one.message}", remedy=one.remedy) from error
        return found[0]

    def leader_first(self, act: Callable[[], T]) -> T:
        """Return each process's result; the leading one runs first, because it may write files that the others read."""
        found: list[T] = []
        self.from_leader(lambda: found.append(act()))
        return found[0] if self.leads else act()

    def parallel(self, model: nn.Module, *, unused: bool = False) -> nn.Module:
        """Return the network for training, with gradients averaged over all processes.

        ``unused``: a step may leave parameters without a gradient, and the search for these takes time.
        """
        if self.size == 1:
            return model
        ids = [self.device.index or 0] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, find_unused_parameters=unused)


def asked_rank() -> int:
    """Return the rank that torchrun set for this process; 0 without torchrun."""
    return _number("RANK", 0)


@contextlib.contextmanager
def open_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun the world has one process.

    A program that trains several times joins them once, by ``torch.distributed.init_process_group``, because the rendezvous
    of a closed group can't be used again. ``device`` is one of ``config.DEVICES``.
    """
    rank, size, local = asked_rank(), _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    kind = choose_device(device)
    if rank >= size:
        raise UsageError(f"RANK is {rank}, but WORLD_SIZE is {size}", remedy="Start the processes with torchrun")
    if size == 1:
        yield World(device=kind)
        return
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(variable):
            raise UsageError(
                f"WORLD_SIZE is {size}, but {variable} is not set", remedy="Start the processes with torchrun"
            )
    if kind.type == "cuda":
        if local >= torch.cuda.device_count():
            raise RuntimeUnavailable(
                f"process {local} has no GPU: torch finds {torch.cuda.device_count()}",
                remedy="Start as many processes as GPUs, or pass --device cpu",
            )
        kind = torch.device("cuda", local)
        torch.cuda.set_device(kind)
    with _lost_process_named():
        backend = "nccl" if kind.type == "cuda" else "gloo"
        joined = dist.is_initialized()
        if not joined:
            dist.init_process_group(backend, timeout=_PATIENCE, device_id=kind if kind.type == "cuda" else None)
        try:
            world = World(rank, size, kind)
            with watched(rank, size) if kind.type == "cuda" else contextlib.nullcontext():
                yield world
                world.leave_together()
        finally:
            if not joined:
                with contextlib.suppress(Exception), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End one of several processes with an exit code, without Python's finalisation, which gloo's threads can abort.

    These threads live as long as the process group is referenced, and the frames of a training keep it beyond
    ``destroy_process_group``. A thread may need the GIL to free the tensors of the last exchange. CPython before 3.14 ends a
    thread that requests the GIL during finalisation. Inside C++ code this is an abort, so a process that has done all its work
    ends with SIGABRT (pytorch/pytorch, pull request 179291).
    """
    atexit._run_exitfuncs()
    interrupts.exit_at_once(code)


def choose_device(name: str) -> torch.device:
    """Return the device for one of ``config.DEVICES``; RuntimeUnavailable if CUDA was requested and torch finds no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RuntimeUnavailable(
            "torch finds no CUDA device", remedy="Use --device cpu, or install a CUDA build of torch and a driver"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UsageError(f"{variable} is {text!r}, not a number", remedy="Start the processes with torchrun")
    return int(text)


@contextlib.contextmanager
def _lost_process_named() -> Iterator[None]:
    """Replace the backends' many errors for a lost process by the one of ``lost``."""
    try:
        yield
    except RuntimeError as error:
        text = f"{type(error).__name__} {error}".lower()
        if not any(word in text for word in _LOST):
            raise
        raise lost(one_line(error)) from error
