"""A process of test_fake_cuda: trains on CUDA tensors that hold no numbers, and prints what became of each case as JSON."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import randomise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnexport.nn.lenet import NORMS, bn_lenet
from bnexport.nn.moving_statistics import recalibrate, recalibrate_by_layer
from bnexport.training.config import AMP, TrainingConfig
from bnexport.training.data_parts import Resident
from bnexport.training.loop import Epochs, evaluated
from bnexport.training.optimisers import make_optimizer, set_learning_rate
from bnexport.training.processes import World
from bnexport.training.step import Step

CUDA, COUNT, BATCH = torch.device("cuda"), 12, 8
OPTIMISERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
}
DTYPES = {"off": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
aten = torch.ops.aten
#: Kernels without an implementation for fake tensors: they return nothing, and all their tensors are on one device.
FUSED = {aten._fused_sgd_, aten._fused_adamw_}


class Watch(TorchDispatchMode):
    """Lists the operators for which the host waits for the device, and answers those that read a number with 1."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.pinned: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        if name in FUSED:
            places = {value.device.type for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            if places != {"cuda"}:
                raise RuntimeError(f"{name} found tensors on {sorted(places)}")
            return None
        if name is aten._local_scalar_dense:
            self.waits.append(str(func))
            return 1
        if name is aten._to_copy and self._waits_for_copy(args[0], kwargs):
            self.waits.append(f"{func} to {kwargs['device']}")
        if name is aten.copy_ and args[0].device.type != args[1].device.type and args[1].dim():
            self.waits.append(str(func))
        return func(*args, **kwargs)

    def _waits_for_copy(self, source: Tensor, kwargs: dict[str, Any]) -> bool:
        target = kwargs.get("device")
        if target is None or torch.device(target).type == source.device.type:
            return False
        return not kwargs.get("non_blocking") or not any(source is one for one in self.pinned)

    def pin(self, value: Tensor) -> Tensor:
        """Stand for ``Tensor.pin_memory``, which fake tensors lack."""
        self.pinned.append(value)
        return value


@dataclass
class Training:
    """A training step on fake CUDA tensors, and what belongs to it."""

    config: TrainingConfig
    watch: Watch
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        with CUDA:
            self.model = randomise(bn_lenet(self.config.norm))
        self.optimizer = make_optimizer(self.model, self.config, CUDA)
        images, labels = torch.rand(COUNT, 1, 28, 28, device=CUDA), torch.zeros(COUNT, dtype=torch.int64, device=CUDA)
        self.samples = Resident(images, labels)
        self.step = Step(self.model, self.optimizer, amp=self.config.amp, label_smoothing=0.1)
        self.watch.waits.clear()

    def take(self) -> None:
        epochs = Epochs(self.step, self.samples, batch_size=BATCH)
        sums = epochs.take_steps(torch.arange(COUNT), before_step=lambda _: set_learning_rate(self.optimizer, 0.25))
        for value in (sums.loss, sums.hits, sums.losses, *self.model.state_dict().values()):
            assert value.device.type == "cuda"

    def evaluate(self) -> None:
        assert evaluated(self.model, self.samples, World()).loss.device.type == "cuda"


def whole(config: TrainingConfig, watch: Watch) -> None:
    training, kinds = Training(config, watch), set()
    training.model.register_forward_hook(lambda *words: kinds.add(words[2].dtype))
    training.take()
    assert kinds == {DTYPES[config.amp]}
    assert training.step.scaler.is_enabled() == (config.amp == "float16")
    training.evaluate()
    assert kinds == {DTYPES[config.amp], torch.float32}, "autocast is for the steps alone"


def statistics(config: TrainingConfig, watch: Watch) -> None:
    training = Training(config, watch)
    batches = [torch.rand(BATCH, 1, 28, 28), (torch.rand(BATCH, 1, 28, 28, device=CUDA), None)]
    assert recalibrate(training.model, batches) == (0 if config.norm == "none" else 4)
    recalibrate_by_layer(training.model, lambda: batches)
    assert all(value.device.type == "cuda" for value in training.model.state_dict().values())
    watch.waits.clear()  # the result is read


def constant_on_the_cpu(config: TrainingConfig, watch: Watch) -> None:
    training = Training(config, watch)
    training.model.register_forward_hook(lambda *words: words[2] + torch.ones(10))
    training.take()


def statistics_on_the_cpu(config: TrainingConfig, watch: Watch) -> None:
    training = Training(config, watch)
    layer: Any = training.model.get_submodule("bn1")
    layer.running_mean = torch.zeros(6)
    training.take()


def momentum_on_the_cpu(config: TrainingConfig, watch: Watch) -> None:
    training = Training(config, watch)
    for state in training.optimizer.state.values():
        state["momentum_buffer"] = torch.zeros(state["momentum_buffer"].shape)
    training.take()


def labels_on_the_cpu(config: TrainingConfig, watch: Watch) -> None:
    training = Training(config, watch)
    training.samples.labels = torch.zeros(COUNT, dtype=torch.int64)
    training.take()


def a_loss_that_is_read(config: TrainingConfig, watch: Watch) -> None:
    training = Training(config, watch)
    training.model.register_forward_hook(lambda *words: words[2] * words[2].sum().item())
    training.take()


def indices_that_block(config: TrainingConfig, watch: Watch) -> None:
    training = Training(config, watch)
    training.watch.pin = lambda value: value  # type: ignore[method-assign]
    training.take()


MOMENTUM = TrainingConfig(momentum=0.9)
CASES: dict[str, tuple[Callable[[TrainingConfig, Watch], None], TrainingConfig]] = {
    **{
        f"{norm} {amp} {name}": (whole, TrainingConfig(norm=norm, amp=amp, **options))
        for norm in NORMS
        for amp in AMP
        for name, options in OPTIMISERS.items()
        if name != "sgd" or amp == "off"
    },
    **{f"statistics {norm}": (statistics, TrainingConfig(norm=norm)) for norm in NORMS if norm != "none"},
    **{
        f"planted {fault.__name__}": (fault, MOMENTUM)
        for fault in (
            constant_on_the_cpu,
            statistics_on_the_cpu,
            momentum_on_the_cpu,
            labels_on_the_cpu,
            a_loss_that_is_read,
            indices_that_block,
        )
    },
}


def outcome(name: str) -> str:
    act, config = CASES[name]
    watch = Watch()
    torch.Tensor.pin_memory = lambda self: watch.pin(self)  # type: ignore[method-assign, assignment, misc]
    try:
        with FakeTensorMode(allow_non_fake_inputs=False), watch:
            act(config, watch)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"the host waits: {watch.waits[0]}" if watch.waits else "right"


def main() -> None:
    torch.cuda.is_available = lambda: False  # fake tensors would allocate on the device that the shim pretends
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    json.dump({name: outcome(name) for name in sys.argv[1:]}, sys.stdout)


if __name__ == "__main__":
    main()
