import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bundles import SIGNATURE, manifest, network
from torch import nn

from bnexport.bundle import seal
from bnexport.data.datasets import load_dataset
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import ModelError
from bnexport.tensors import Signature, TensorSpec
from bnexport.verification.golden import golden_inputs, real_images, write_golden_vectors

SHAPES = {"input": (1, 28, 28)}
TWO = Signature(
    (TensorSpec("x", "float32", ("batch", 3)), TensorSpec("index", "int64", ("batch", 2))),
    (TensorSpec("y", "float32", ("batch", 3)), TensorSpec("z", "float32", ("batch", 2))),
)
TWO_SHAPES = {"x": (3,), "index": (2,)}


class Two(nn.Module):
    """Two inputs, two outputs; float32 arithmetic would give other digits."""

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x / 3, torch.gather(x, 1, index) * 0.1


def test_real_images_come_first_then_noise_zeros_and_ones() -> None:
    images = real_images(manifest())
    want = Preprocessing().apply(load_dataset("digits").test_images[:8])
    assert np.array_equal(images, want)
    array = golden_inputs(SIGNATURE, shapes=SHAPES, images=images)["input"]
    assert (array.shape, array.dtype) == ((16, 1, 28, 28), np.float32)
    assert np.array_equal(array[:8], want)
    assert 0.9 < array[8:14].std() < 1.1
    assert (array[14].max(), array[14].min(), array[15].max(), array[15].min()) == (0, 0, 1, 1)


def test_without_images_there_is_noise() -> None:
    array = golden_inputs(SIGNATURE, shapes=SHAPES)["input"]
    assert len(array) == 8
    assert array[:6].std(axis=(1, 2, 3)).min() > 0.9


def test_the_seed_decides_the_noise() -> None:
    draw = [golden_inputs(SIGNATURE, shapes=SHAPES, seed=seed)["input"] for seed in (1, 1, 2)]
    assert np.array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2])


def test_all_inputs_have_as_many_samples_and_their_own_types() -> None:
    signature = Signature(
        tuple(TensorSpec(dtype, dtype, ("batch",)) for dtype in ("float16", "float64", "uint8", "int64", "bool")), ()
    )
    feeds = golden_inputs(signature, shapes=dict.fromkeys([spec.name for spec in signature.inputs], ()))
    assert {name: (array.dtype.name, array.shape) for name, array in feeds.items()} == {
        spec.name: (spec.dtype, (8,)) for spec in signature.inputs
    }
    for name in ("int64", "bool"):
        assert set(feeds[name].tolist()) == {0, 1}
    assert int(feeds["uint8"].max()) > 100  # pixels, not indices


@pytest.mark.parametrize(("side", "samples"), [(128, 8), (200, 3), (1000, 2)])
def test_large_inputs_have_fewer_samples(side: int, samples: int) -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", side, side)),), ())
    array = golden_inputs(signature, shapes={"x": (side, side)})["x"]
    assert len(array) == samples
    assert array[0].std() > 0.9


def test_a_large_image_leaves_room_for_noise() -> None:
    signature = Signature((TensorSpec("x", "float32", ("batch", 1, 400, 400)),), ())
    images = np.full((8, 1, 400, 400), 0.5, np.float32)
    array = golden_inputs(signature, shapes={"x": (1, 400, 400)}, images=images)["x"]
    assert len(array) == 2
    assert (array[0] == 0.5).all()
    assert array[1].std() > 0.9


@pytest.mark.parametrize(
    "changes",
    [
        {"preprocessing": None},
        {"dataset": None},
        {"dataset": "unknown"},
        {"preprocessing": Preprocessing(3, 28, 28, mean=(0.0,) * 3, std=(1.0,) * 3).to_json()},
        {"signature": Signature((TensorSpec("input", "float32", ("batch", 1, 32, 32)),), SIGNATURE.outputs)},
    ],
)
def test_images_that_are_not_there_or_do_not_fit_are_left_out(changes, tmp_path: Path) -> None:
    assert real_images(replace(manifest(), **changes)) is None


def test_a_data_set_that_is_not_on_this_machine_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNEXPORT_DATA", raising=False)
    monkeypatch.setattr("bnexport.data.locate.cache_folder", lambda: tmp_path)
    assert real_images(replace(manifest(), dataset="kmnist"), data_dir=tmp_path) is None


def test_the_outputs_are_the_network_s_in_float64_rounded_once(tmp_path: Path) -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    write_golden_vectors(tmp_path, manifest(), module, shapes=SHAPES)
    inputs, outputs = seal(tmp_path, manifest()).golden()
    assert len(inputs["input"]) == 16
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(torch.tensor(inputs["input"].copy()).double())
    assert np.array_equal(outputs["logits"], exact.float().numpy())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    described = replace(manifest(), signature=TWO, dataset=None)
    write_golden_vectors(tmp_path, described, Two(), shapes=TWO_SHAPES)
    inputs, outputs = seal(tmp_path, described).golden()
    x, index = inputs["x"].astype(np.float64), inputs["index"]
    assert np.array_equal(outputs["y"], (x / 3).astype(np.float32))
    assert np.array_equal(outputs["z"], (np.take_along_axis(x, index, 1) * 0.1).astype(np.float32))
    assert sorted(path.name for path in (tmp_path / "test_data_set_0").iterdir()) == [
        "input_0.pb", "input_1.pb", "output_0.pb", "output_1.pb"
    ]  # fmt: skip


def test_a_network_that_can_not_run_in_float64_is_refused(tmp_path: Path) -> None:
    class Narrow(Two):
        def forward(self, x, index):
            return x.half(), x.half()

    with pytest.raises(ModelError, match="can't be evaluated in float64: it returns float16"):
        write_golden_vectors(tmp_path, replace(manifest(), signature=TWO, dataset=None), Narrow(), shapes=TWO_SHAPES)
