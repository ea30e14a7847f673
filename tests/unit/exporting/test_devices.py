"""Files of networks that create tensors in forward follow the device of their input, wherever they were exported."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import randomise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.nn import functional

import bnexport
from bnexport.exporting.formats import export_program, export_torchscript
from bnexport.exporting.signature import ExportJob, signature_of
from bnexport.runtimes.torch_float64 import TorchFloat64Evaluator
from bnexport.runtimes.torch_runners import _on_device
from bnexport.runtimes.torch_runners import load_exported_program as load_program
from bnexport.runtimes.torch_runners import load_torchscript as load_script

#: A warning of torch 2.11 about its own buffers.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")
CUDA = torch.device("cuda", 0)


class Net(nn.Module):
    """A linear layer with its batch norm, and then a function that creates tensors."""

    def __init__(self, rest: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.bn, self.rest = nn.Linear(3, 3), nn.BatchNorm1d(3), rest

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.bn(self.fc(x)))


class Embedded(nn.Module):
    """Whole numbers are the only input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.bn = nn.Embedding(7, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        y = self.table(x + places % 2).sum(1) + torch.zeros(x.shape[0], 3, device=x.device)
        return self.bn(self.fc(y))


class Branches(nn.Module):
    """A branch that the values choose creates a tensor of the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        def more(y: Tensor) -> Tensor:
            return y + torch.ones(y.shape[0], 3, device=y.device)

        def less(y: Tensor) -> Tensor:
            return y - torch.ones(y.shape[0], 3, device=y.device)

        y: Tensor = self.bn(self.fc(x))
        return torch.cond(y.sum() > 0, more, less, (y,))  # type: ignore[no-any-return]


def written(y: Tensor) -> Tensor:
    mask = torch.zeros(y.shape[0], 3, device=y.device)
    mask[:, 1] = y[:, 0]
    return y + mask


#: Expressions of users' forwards. Each names the device of tracing in torch.export's graph.
CREATED: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": lambda y: y + torch.ones(y.shape[0], 3, device=y.device),
    "zeros": lambda y: torch.cat([y, torch.zeros(y.shape[0], 2, device=y.device)], 1),
    "full": lambda y: y * torch.full((y.shape[0], 1), 2.5, device=y.device),
    "arange": lambda y: y + torch.arange(y.shape[0], device=y.device)[:, None],
    "arange-of-fixed-size": lambda y: y * torch.arange(3, device=y.device).to(y.dtype),
    "eye": lambda y: torch.eye(y.shape[0], device=y.device) @ y,
    "linspace": lambda y: y + torch.linspace(0, 1, 3, device=y.device),
    "triangle": lambda y: torch.tril(torch.ones(y.shape[0], y.shape[0], device=y.device)) @ y,
    "tensor-of-numbers": lambda y: y * torch.tensor([1.0, -2.0, 3.0]).to(y.device),
    "one-number": lambda y: torch.where(y > 0, y, torch.tensor(0.5)),
    "indices": lambda y: y[:, torch.tensor([2, 0])],
    "like": lambda y: y + torch.zeros_like(y, device=y.device) + y.new_ones(1) + torch.full_like(y, 3),
    "casts": lambda y: y.to(y.device).to(y.device, torch.float32) + y.cpu(),
    "random": lambda y: y + 0 * torch.rand(y.shape[0], 3, device=y.device),
    "one-hot": lambda y: functional.one_hot((y > 0).long().sum(1), 4).float(),
    "written": written,
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda rest=rest: Net(rest) for name, rest in CREATED.items()},  # type: ignore[misc]
    "embedding": Embedded,
    "none": lambda: Net(torch.sigmoid),
}


def inputs_of(network: nn.Module, batch: int = 2) -> Tensor:
    if isinstance(network, Embedded):
        return torch.randint(0, 6, (batch, 5), generator=torch.Generator().manual_seed(batch))
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(batch))


@functools.cache
def folded(name: str) -> tuple[GraphModule, nn.Module]:
    torch.manual_seed(0)
    network = randomise(NETWORKS[name]()).eval()
    return bnexport.fold(network, inputs_of(network)).model, network


@pytest.fixture
def meta_equal() -> Iterator[None]:
    """TorchScript compares the constants of a file when it loads them, which torch can't do on "meta"."""
    with torch.library._scoped_library("aten", "IMPL", "Meta") as library:
        library.impl("equal", lambda _one, _other: False)
        yield


@pytest.mark.usefixtures("meta_equal")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_torchscript_file_names_no_device_and_runs_where_it_is_loaded(name: str, tmp_path: Path) -> None:
    module, network = folded(name)
    export_torchscript(module, file := tmp_path / "model.pt")
    script, x = load_script(file), inputs_of(network, 5)
    code = script.code
    assert "torch.device(" not in code
    assert '"cpu"' not in code
    with torch.no_grad():
        assert torch.equal(script(x), module(x))
        torch.testing.assert_close(script(x), network(x), rtol=1e-5, atol=1e-5)
    assert load_script(file, "meta")(x.to("meta")).device.type == "meta"


def test_branches_follow_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = randomise(Branches()).eval()
    module = bnexport.fold(network, inputs_of(network)).model
    assert_on_cuda(module, inputs_of(network, 5))
    export_program(ExportJob(module, (x := inputs_of(network),), signature(module, x)), file := tmp_path / "model.pt2")
    assert_program_on_cuda(file, inputs_of(network, 5))


@pytest.mark.sampled(3, 1)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_and_its_exported_program_can_be_moved_to_a_gpu(name: str, tmp_path: Path) -> None:
    module, network = folded(name)
    export_program(ExportJob(module, (x := inputs_of(network),), signature(module, x)), file := tmp_path / "model.pt2")
    assert_program_on_cuda(file, inputs_of(network, 5))
    assert_on_cuda(module, inputs_of(network, 5))


@pytest.mark.parametrize("name", ["full", "arange", "tensor-of-numbers", "written"])
def test_the_files_are_still_evaluated_in_float64(name: str, tmp_path: Path) -> None:
    module, network = folded(name)
    x = inputs_of(network)
    named = signature(module, x)
    export_torchscript(module, tmp_path / "model.pt")
    export_program(ExportJob(module, (x,), named), tmp_path / "model.pt2")
    with torch.no_grad():
        wanted = copy.deepcopy(network).double()(x.double())
    for file in ("model.pt", "model.pt2"):
        found = TorchFloat64Evaluator(tmp_path / file, named).evaluate({"x": x.numpy()})["logits"]
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-6, atol=1e-6)


def signature(module: GraphModule, x: Tensor) -> bnexport.tensors.Signature:
    return signature_of(module, (x,), input_names=("x",))


def assert_program_on_cuda(file: Path, x: Tensor) -> None:
    """Tensors without memory, as on a GPU: an operator that mixes devices raises."""
    program = load_program(file)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert _on_device(program, CUDA).module()(x.to(CUDA)).device == CUDA


def assert_on_cuda(module: GraphModule, x: Tensor) -> None:
    moved = copy.deepcopy(module)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert moved.to(CUDA)(x.to(CUDA)).device == CUDA
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
