"""The training step recorded as a CUDA graph, if the recording computes the same as the step.

A recording contains the kernels of one step. Decisions of Python during the recording are frozen: random numbers of Python,
numpy or torch's CPU generator, counters, schedules inside forward. So bn_lenet and the networks of the zoos are recorded by
default, and other networks on request. Before a recording some steps are observed: if the host's state changes in one of them,
or the host waits for the device, the network is not recorded.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnexport.loading.zoo import zoo_of
from bnexport.optional import one_line
from bnexport.training.config import LENET, TrainingConfig
from bnexport.training.data_parts import DataPart, Resident
from bnexport.training.processes import World
from bnexport.training.step import Step, Sums

#: Runs the recorded step for one batch (X, y); the next call overwrites the returned loss.
Replay = Callable[[Tensor, Tensor], Tensor]
#: Records a step with the arguments of ``Step.__call__``, without running it.
Record = Callable[[Step, Tensor, Tensor, int, Sums], Replay]

#: Steps before the recording. The first one creates lazy state (moments, cuBLAS workspaces, a network's caches); the others
#: are observed.
WARM_UP = 3
_NOT_RECORDED = "the step is not recorded as a CUDA graph"
#: Part of torch's warning that the host waits for the device ("warn" of ``torch.cuda.set_sync_debug_mode``).
_WAITS = "synchronizing CUDA operation"
#: Part of torch's warning that this mode is a prototype.
_PROTOTYPE = "Synchronization debug mode"


def recorded_by_default(model: str) -> bool:
    """Return True if the step of a model is recorded by default: Python decides nothing in its forward."""
    return model == LENET or zoo_of(model) is not None


def obstacle(config: TrainingConfig, samples: DataPart, world: World) -> str | None:
    """Return a note with the reason why this training can't record its step; None if it can."""
    if samples.device.type != "cuda":
        return f"{_NOT_RECORDED}: the training runs on {samples.device.type}"
    if world.size > 1:
        return f"{_NOT_RECORDED}: {world.size} processes train together"
    if not isinstance(samples, Resident):
        return f"{_NOT_RECORDED}: the training images are not in the device's memory"
    if config.amp == "float16":
        return f"{_NOT_RECORDED}: the scaling of float16 losses can't be recorded"
    return None


class CapturedStep:
    """A step of one batch size as a CUDA graph, with one launch per step."""

    def __init__(self, step: Step, X: Tensor, y: Tensor, images: int, sums: Sums) -> None:
        self._X, self._y = X.clone(), y.clone()
        self._graph = torch.cuda.CUDAGraph()
        step.optimizer.zero_grad(set_to_none=True)
        outside, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(self._graph, pool=pool):
                self._loss = step(self._X, self._y, images, sums)
        except BaseException:
            _leave_capture(outside, pool, X.device)
            raise

    def __call__(self, X: Tensor, y: Tensor) -> Tensor:
        """Run the step; the next call overwrites the result."""
        self._X.copy_(X)
        self._y.copy_(y)
        self._graph.replay()
        return self._loss


def _leave_capture(outside: torch.cuda.Stream, pool: Any, device: torch.device) -> None:
    """Restore the state that torch leaves changed if the end of a capture raises.

    ``torch.cuda.graph`` leaves its own stream current. Releases before 2.12 also keep the allocator in the capture's
    pool (pytorch pull request 180395), and CUDA's generator in a state that refuses draws outside of a capture (171265).
    """
    torch.cuda.set_stream(outside)
    index = device.index if device.index is not None else torch.cuda.current_device()
    with contextlib.suppress(Exception):  # raises if the pool is closed already
        torch._C._cuda_endAllocateToPool(index, pool)
    generator, fresh = torch.cuda.default_generators[index], torch.Generator(torch.device("cuda", index))
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


class Recording:
    """Runs the steps of a training: the first ones without a recording, then by the recording if there is one."""

    def __init__(
        self,
        step: Step,
        *,
        batch_size: int,
        record: Record = CapturedStep,
        on_note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare the recording, by ``record``, of steps of ``batch_size`` images; other batches run without it.

        ``on_note`` receives the reason if no step is recorded.
        """
        self.step, self.batch_size = step, batch_size
        self._record, self._on_note = record, on_note
        self._replay: Replay | None = None
        self._warm_ups, self._given_up = 0, False
        self._stream: torch.cuda.Stream | None = None

    @property
    def made(self) -> bool:
        """True once steps are replayed."""
        return self._replay is not None

    def forget(self) -> None:
        """Drop the recording, because its sums are replaced; the next whole batch is recorded again."""
        self._replay = None

    def take(self, X: Tensor, y: Tensor, images: int, sums: Sums) -> Tensor:
        """Run a step, as ``Step.__call__``; the next call overwrites the returned loss."""
        if self._given_up:
            return self.step(X, y, images, sums)
        if len(y) != self.batch_size:
            return self._on_side_stream(X, y, images, sums)
        if self._replay is not None:
            return self._replay(X, y)
        return self._observed(X, y, images, sums) if self._warm_ups < WARM_UP else self._recorded(X, y, images, sums)

    def _observed(self, X: Tensor, y: Tensor, images: int, sums: Sums) -> Tensor:
        """Run a step without a recording, and give up recording if Python takes part in the step."""
        self._warm_ups += 1
        if self._warm_ups == 1:
            return self._on_side_stream(X, y, images, sums)
        before = _host_state(self.step.model)
        with _waits(X.device) as waits:
            loss = self._on_side_stream(X, y, images, sums)
        reason = _changed(before, _host_state(self.step.model))
        if reason is None and waits:
            reason = "the host waits for the device in it"
        if reason is not None:
            self._give_up(reason)
        return loss

    def _recorded(self, X: Tensor, y: Tensor, images: int, sums: Sums) -> Tensor:
        """Record the step and run it; if that fails, restore all state and run the step without a recording."""
        kept, before = _Kept(self.step, sums), _host_state(self.step.model)
        try:
            replay = self._record(self.step, X, y, images, sums)
            reason = _changed(before, _host_state(self.step.model))
        except Exception as error:  # the network may be a user's code, and CUDA refuses in many ways
            reason = one_line(error, 200)
        if reason is None:
            self._replay = replay
            return replay(X, y)
        kept.put_back()
        self._give_up(reason)
        return self.step(X, y, images, sums)

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self._on_note(f"{_NOT_RECORDED}: {reason}")

    def _on_side_stream(self, X: Tensor, y: Tensor, images: int, sums: Sums) -> Tensor:
        """Run a step on another stream, as torch requires before a recording.

        All steps use one stream, because torch's allocator keeps a pool of memory for each stream.
        """
        if X.device.type != "cuda":
            return self.step(X, y, images, sums)
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self.step(X, y, images, sums)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss


@contextlib.contextmanager
def _waits(device: torch.device) -> Iterator[list[str]]:
    """Collect torch's warnings of waits for a CUDA device inside the block; other warnings are passed on."""
    found: list[str] = []
    if device.type != "cuda":
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        text = str(warning.message)
        if _WAITS in text:
            found.append(text)
        elif _PROTOTYPE not in text:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _host_state(model: nn.Module) -> dict[str, Any]:
    """Return the state on the host that a forward may change, by name: random numbers and attributes of modules.

    Tensors are compared by identity, because a recording reads the tensors of its time. Containers are compared by length.
    """
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "the state of Python's random numbers": random.getstate(),
        "the state of numpy's random numbers": (kind, np.asarray(keys).tobytes(), *rest),
        "the state of torch's random numbers on the CPU": torch.get_rng_state().numpy().tobytes(),
    }
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._buffers, **module._parameters}.items():
            if value is None or isinstance(value, bool | int | float | str | Tensor):
                state[f"{name} of {path or type(module).__name__}"] = value
            elif isinstance(value, Sized):
                state[f"the length of {name} of {path or type(module).__name__}"] = len(value)
    return state


def _changed(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Return a sentence that names the first value that differs; None if all are equal."""
    for name in before | after:
        old, new = before.get(name), after.get(name)
        same = old is new or (not isinstance(old, Tensor) and not isinstance(new, Tensor) and old == new)
        if not same or (name in before) != (name in after):
            return f"{name} changes in it, and a recording would repeat the first one"
    return None


class _Kept:
    """A copy, in the host's memory, of all state that a step changes."""

    def __init__(self, step: Step, sums: Sums) -> None:
        self._step = step
        self._held = [
            (held, dict(held))
            for module in step.model.modules()
            for held in (vars(module), module._buffers, module._parameters)
        ]
        state = step.optimizer.state
        self._state = {parameter: dict(values) for parameter, values in state.items()}
        tensors: list[Any] = [*step.model.parameters(), *step.model.buffers(), sums.loss, sums.hits, sums.losses]
        tensors += [value for values in state.values() for value in values.values()]
        tensors += [group["lr"] for group in step.optimizer.param_groups]
        self._values = [(value, value.detach().to("cpu", copy=True)) for value in tensors if isinstance(value, Tensor)]
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._device = sums.loss.device
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None

    def put_back(self) -> None:
        """Restore the state; gradients are dropped, since they may be in a recording's memory."""
        for held, before in self._held:
            held.clear()
            held.update(before)
        self._step.optimizer.state.clear()
        self._step.optimizer.state.update(self._state)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)
        self._step.optimizer.zero_grad(set_to_none=True)
        python, numpys, cpu = self._random
        random.setstate(python)
        np.random.set_state(numpys)
        torch.set_rng_state(cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
