"""Weights files: which names and which sets of weights fit a network, and what is refused."""

import collections
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from cases import randomise
from support.bundles import flip_bit
from torch import nn
from torch.optim.swa_utils import AveragedModel
from weights_files import NETWORK, State, inside, loaded, network, refusal, same, state_of, with_prefix

import bnexport
from bnexport.bundle import WEIGHTS, Manifest, seal
from bnexport.errors import ModelError, UsageError
from bnexport.exporting.export_request import ExportRequest
from bnexport.loading.checkpoint import Checkpoint, save_checkpoint
from bnexport.loading.sources import load_source
from bnexport.tensors import Signature, TensorSpec

# names


PREFIXES = "module.", "model.", "net.", "_orig_mod.", "module._orig_mod.", "model._orig_mod.module.", "trainer.learner."


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_every_name_is_left_out(folder: Path, prefix: str) -> None:
    assert same(loaded(with_prefix(prefix)(state_of())).module, state_of())


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module", "module._orig_mod"])
def test_a_wrapper_around_a_part_of_the_network_is_left_out(folder: Path, wrapper: str) -> None:
    assert same(loaded(inside("backbone", wrapper)(state_of())).module, state_of())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_a_prefix_that_the_network_itself_has_stays(folder: Path, prefix: str) -> None:
    state = state_of("Wrapped")
    assert all(name.startswith("module.") for name in state)
    assert same(loaded(with_prefix(prefix)(state), "Wrapped").module, state)


@pytest.mark.parametrize("name", ["Wrapped", "in_model"])
def test_the_weights_of_the_network_inside_a_wrapper_of_the_users_fit(folder: Path, name: str) -> None:
    start = "module." if name == "Wrapped" else "model."
    assert same(loaded(state_of(), name).module, with_prefix(start)(state_of()))
    assert same(loaded(with_prefix("_orig_mod.")(state_of()), name).module, with_prefix(start)(state_of()))


def test_an_averaged_model_and_what_profilers_leave(folder: Path) -> None:
    averaged = AveragedModel(network())
    averaged.update_parameters(network())
    found = loaded(averaged.state_dict())
    assert same(found.module, state_of())
    assert found.notes == ("w.pth holds counters, which are not weights and were ignored: n_averaged",)
    names = ("total_ops", "total_params", "head.total_ops", "backbone.0.total_params")
    counters = {name: torch.zeros(1) for name in names}
    found = loaded({**state_of(), **counters})
    assert same(found.module, state_of())
    assert found.notes[0].endswith("backbone.0.total_params, head.total_ops, total_ops, total_params")
    assert same(loaded(with_prefix("module.")({**state_of(), **counters})).module, state_of())


def test_a_network_with_counters_gets_them(folder: Path) -> None:
    code = "\ndef averaged():\n    from torch.optim.swa_utils import AveragedModel\n    return AveragedModel(Net())\n"
    (folder / "net.py").write_text(NETWORK + code)
    model = AveragedModel(network())
    model.update_parameters(network())
    found = loaded(model.state_dict(), "averaged")
    assert same(found.module, model.state_dict())
    assert found.module.n_averaged == 1
    assert found.notes == ()


def test_files_without_counts_of_batches(folder: Path) -> None:
    old = {name: value for name, value in state_of().items() if not name.endswith("num_batches_tracked")}
    for stored in (old, with_prefix("module.")(old)):
        module = loaded(stored).module
        assert all(torch.equal(module.state_dict()[name], value) for name, value in old.items())
        assert int(module.state_dict()["backbone.1.num_batches_tracked"]) == 0


def test_old_names_of_torchvisions_densenets(folder: Path) -> None:
    pytest.importorskip("torchvision")
    state = state_of("dense")
    old = {
        re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name) if "layer" in name else name: value
        for name, value in state.items()
    }
    assert set(old) != set(state)
    assert same(loaded(old, "dense").module, state)
    assert same(loaded({"state_dict": with_prefix("module.")(old)}, "dense").module, state)


def test_tied_weights_may_be_stored_once(folder: Path) -> None:
    state = state_of("Tied")
    module = loaded({name: value for name, value in state.items() if name != "out.weight"}, "Tied").module
    assert same(module, state)
    assert module.out.weight is module.table.weight
    less = {name: value for name, value in state.items() if name not in ("out.weight", "norm.bias")}
    assert "1 missing (norm.bias)" in refusal(less, "Tied")


def test_a_network_that_translates_names_itself(folder: Path) -> None:
    code = """
class Translating(Net):
    def _load_from_state_dict(self, state, prefix, *rest):
        for name in [name for name in state if name.startswith("fc.")]:
            state["head." + name[3:]] = state.pop(name)
        super()._load_from_state_dict(state, prefix, *rest)
"""
    (folder / "net.py").write_text(NETWORK + code)
    old = {name.replace("head.", "fc."): value for name, value in state_of().items()}
    assert same(loaded(old, "Translating").module, state_of())
    assert "does not fit Net" in refusal(old, "Net")


def half(state: State) -> State:
    return {f"module.{name}" if name.startswith("backbone") else name: value for name, value in state.items()}


def half_inside(state: State) -> State:
    return {name.replace("backbone.0", "backbone.module.0"): value for name, value in state.items()}


def two(state: State) -> State:
    return {**with_prefix("encoder_q.")(state), **with_prefix("encoder_k.")(state_of(seed=9))}


MISFITS: dict[str, tuple[Callable[[State], Any], str]] = {
    "a missing layer": (lambda s: {n: v for n, v in s.items() if "head" not in n}, "2 missing (head.bias, head.weight)"),
    "a missing layer under a prefix": (
        lambda s: with_prefix("module.")({n: v for n, v in s.items() if "head" not in n}), "2 missing (head.bias, head.weight)",
    ),
    "a missing bias": (lambda s: {n: v for n, v in s.items() if n != "backbone.1.bias"}, "1 missing (backbone.1.bias)"),
    "a missing moving mean": (lambda s: {n: v for n, v in s.items() if "running_mean" not in n}, "backbone.1.running_mean"),
    "another layer": (lambda s: {**s, "head2.weight": s["head.weight"]}, "1 unexpected (head2.weight)"),
    "another layer without the prefix": (
        lambda s: {**with_prefix("module.")(s), "head2.weight": s["head.weight"]}, "module",
    ),
    "half a prefix": (half, "module.backbone.0.bias"),
    "half a prefix inside": (half_inside, "backbone.module.0.bias"),
    "two networks": (two, "The names below encoder_k, encoder_q fit without the others"),
    "two networks under a prefix": (
        lambda s: {"state_dict": with_prefix("module.")(two(s))}, "state_dict.module.encoder_k, state_dict.module.encoder_q",
    ),
    "a loss with weights": (
        lambda s: {**with_prefix("model.")(s), "loss.weight": torch.ones(3)},
        "--weights-key model takes only the names below it",
    ),
    "another shape": (lambda s: {**s, "head.weight": torch.ones(5, 4)}, "head.weight is 5x4 in the file and 3x4"),
    "integers": (lambda s: {**s, "head.weight": torch.ones(3, 4, dtype=torch.int8)}, "head.weight is torch.int8 in the file"),
    "complex numbers": (lambda s: {**s, "head.bias": torch.ones(3, dtype=torch.complex64)}, "head.bias is torch.complex64"),
    "two names that are one without wrappers": (
        lambda s: {**with_prefix("module.")(s), **with_prefix("module.module.")(s)}, "does not fit Net",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_refused(folder: Path, case: str) -> None:
    change, words = MISFITS[case]
    assert words in refusal(change(state_of()))


def test_a_norm_without_its_statistics_is_refused(folder: Path) -> None:
    code = "\ndef two():\n    return nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))\n"
    (folder / "net.py").write_text(NETWORK + code)
    state = dict(randomise(nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))).state_dict())
    without = {name: value for name, value in state.items() if name not in ("1.num_batches_tracked", "1.running_var")}
    assert "2 missing (1.num_batches_tracked, 1.running_var)" in refusal(without, "two")


def test_nan_is_refused(folder: Path) -> None:
    torch.save({**state_of(), "head.bias": torch.tensor([1.0, float("nan"), 2.0])}, "w.pth")
    with pytest.raises(bnexport.errors.RefusedModel, match=r"head\.bias holds NaN"):
        bnexport.fold_and_export("net.py:Net", "m/x/1", weights="w.pth", request=ExportRequest(inputs=("2x8x8",)))


def test_names_with_a_million_parts_take_no_time(folder: Path) -> None:
    long = ".".join("a" * 1_000_000)
    assert "does not fit Net" in refusal({long: torch.ones(1), long + ".b": torch.ones(1)})


# sets of weights


KEYS = (
    "state_dict", "model", "model_state_dict", "net", "network", "ema", "state_dict_ema", "module", "params", "model_ema",
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_the_keys_of_training_scripts(folder: Path, key: str) -> None:
    found = loaded({"epoch": 3, key: collections.OrderedDict(state_of()), "best": 0.5, "loss": torch.tensor(0.3)})
    assert same(found.module, state_of())
    assert found.notes == ()


def test_keys_in_keys_and_a_key_of_the_users(folder: Path) -> None:
    assert same(loaded({"ema": {"state_dict": with_prefix("module.")(state_of()), "decay": 0.9}}).module, state_of())
    found = loaded({"mine": state_of(), "epoch": 3})
    assert same(found.module, state_of())
    assert found.notes == ("the weights were taken from 'mine' in w.pth",)


def test_a_checkpoint_of_lightning_with_a_metric_of_callbacks(folder: Path) -> None:
    stored = {
        "epoch": 9, "pytorch-lightning_version": "2.4.0", "state_dict": with_prefix("model.")(state_of()), "loops": {},
        "callbacks": {"ModelCheckpoint{'monitor': 'acc'}": {"best_model_score": torch.tensor(0.9), "dirpath": Path("x")}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}], "hyper_parameters": {"lr": 0.1},
    }  # fmt: skip
    found = loaded(stored)
    assert same(found.module, state_of())
    assert found.notes == ()


def test_of_several_sets_one_is_taken_and_the_others_are_named(folder: Path) -> None:
    plain, averaged = state_of(seed=3), state_of(seed=4)
    stored = {"state_dict_ema": averaged, "state_dict": plain, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
    found = loaded(stored)
    assert same(found.module, plain)
    assert found.notes == (
        "w.pth holds 2 sets of weights that fit: state_dict was taken; --weights-key takes state_dict_ema instead",
    )
    assert same(loaded(stored, key="state_dict_ema").module, averaged)
    assert loaded(stored, key="state_dict").notes == ()
    message = refusal(stored, key="state")
    assert "no weights under 'state'. Found: state_dict_ema (tensors: 9), state_dict (tensors: 9)" in message
    bias = {"bias": plain["head.bias"]}
    message = refusal({**stored, "state_dict": bias, "state_dict_ema": bias.copy()})
    assert "does not fit Net under 'state_dict'" in message
    assert "Found: state_dict_ema (tensors: 1), state_dict (tensors: 1)" in message


def test_averaged_weights_are_taken_where_they_alone_fit(folder: Path) -> None:
    assert same(loaded({"model": {"teacher.weight": torch.ones(3)}, "ema": state_of()}).module, state_of())


def test_two_networks_in_one_file_need_a_key(folder: Path) -> None:
    stored = {"generator": state_of(), "discriminator": {"0.weight": torch.ones(3, 2), "0.bias": torch.ones(3)}}
    message = refusal(stored)
    assert "the choice is ambiguous. Found: generator (tensors: 9), discriminator (tensors: 2)" in message
    assert "--weights-key generator" in message
    assert same(loaded(stored, key="generator").module, state_of())
    assert "does not fit Net under 'discriminator'" in refusal(stored, key="discriminator")
    stored["discriminator"] = state_of(seed=9)
    assert "the choice is ambiguous" in refusal(stored)


def test_a_key_may_be_a_prefix(folder: Path) -> None:
    for stored in (two(state_of()), {"state_dict": two(state_of()), "epoch": 1}):
        assert same(loaded(stored, key="encoder_q").module, state_of())
        assert same(loaded(stored, key="encoder_k").module, state_of(seed=9))
    assert same(loaded({"state_dict": two(state_of())}, key="state_dict.encoder_k").module, state_of(seed=9))
    twice = {"a": two(state_of()), "b": two(state_of())}
    assert "several sets of weights with names below" in refusal(twice, key="encoder_q")
    assert "does not fit Net under" in refusal({"state_dict": half(state_of())}, key="state_dict.module")


def test_a_dictionary_that_is_there_a_million_times_takes_no_time(folder: Path) -> None:
    value: Any = {"weight": torch.ones(1)}
    for _ in range(30):
        value = {"a": value, "b": value}
    assert "does not fit Net under 'model'" in refusal({"model": {"bias": torch.ones(1)}, "more": value})


NO_WEIGHTS = {"epoch": 3}, {"state_dict": {"a": "b"}}, {"state_dict": np.ones(3)}, {1: torch.ones(3)}, [1], "text", None


@pytest.mark.parametrize("value", [*NO_WEIGHTS, [], torch.ones(3)])
def test_a_file_without_weights(folder: Path, value: Any) -> None:
    assert "is not a state dict" in refusal(value)


# files and folders


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.pth.tar", "w.ckpt", "w.bin", "w.safetensors", "w"])
def test_the_ending_of_a_name_does_not_matter(folder: Path, name: str) -> None:
    torch.save(state_of(), name)
    assert same(load_source("net.py:Net", weights=name).module, state_of())
    safetensors.torch.save_file(with_prefix("model.")(state_of()), name)
    assert same(load_source("net.py:Net", weights=Path(name)).module, state_of())


def sharded(save: Callable[[State, str], object], ending: str) -> dict[str, str]:
    state = with_prefix("model.")(state_of())
    first = {name: value for name, value in state.items() if "backbone" in name}
    places = {name: f"part-{1 if name in first else 2}.{ending}" for name in state}
    save(first, f"part-1.{ending}")
    save({name: value for name, value in state.items() if name not in first}, f"part-2.{ending}")
    Path("w.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return places


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_in_several_files(folder: Path, ending: str) -> None:
    places = sharded(safetensors.torch.save_file if ending == "safetensors" else torch.save, ending)
    assert same(load_source("net.py:Net", weights="w.index.json").module, state_of())
    for change, words in (
        ({"model.head.extra": f"part-2.{ending}"}, f"part-2.{ending} does not contain model.head.extra"),
        ({"model.head.bias": "part-3.bin"}, "part-3.bin is missing, but w.index.json lists it"),
        ({"model.head.bias": "../part-2.bin"}, "has the part '..'"),
        ({"model.head.bias": "/etc/passwd"}, "is absolute"),
        ({"model.head.bias": 3}, "does not contain the table weight_map"),
    ):
        Path("w.index.json").write_text(json.dumps({"weight_map": {**places, **change}}))
        with pytest.raises(ModelError, match=words.replace("(", r"\(")):
            load_source("net.py:Net", weights="w.index.json")
    Path("w.index.json").write_text(json.dumps({"weight_map": {n: p for n, p in places.items() if "bias" not in n}}))
    with pytest.raises(ModelError, match="3 missing"):
        load_source("net.py:Net", weights="w.index.json")


def test_a_bundle_and_a_run_directory(folder: Path) -> None:
    metadata = {"network": {"source": "net.py:Net", "options": {"classes": 3}}, "labels": ["a", "b", "c"]}
    spec = TensorSpec("x", "float32", ("batch",))
    save_checkpoint(folder / "bundle" / WEIGHTS, Checkpoint(state_of(), metadata))
    seal(folder / "bundle", Manifest("x", 1, Signature((spec,), (spec,)), metadata["network"]))
    save_checkpoint(folder / "run" / "model.safetensors", Checkpoint(state_of(), metadata))
    for name in ("bundle", "run"):
        found = load_source("net.py:Net", weights=name)
        assert same(found.module, state_of())
        assert found.labels == ("a", "b", "c")
    with pytest.raises(ModelError, match="bundle is a bundle") as caught:
        load_source("bundle")
    assert caught.value.remedy.endswith("file.py:factory --weights bundle")
    (folder / "nothing").mkdir()
    with pytest.raises(ModelError, match="nothing is a folder without weights"):
        load_source("net.py:Net", weights="nothing")
    flip_bit(folder / "bundle" / WEIGHTS)
    with pytest.raises(bnexport.errors.BundleError):
        load_source("net.py:Net", weights="bundle")


def test_messages_for_python_callers_name_python_arguments(folder: Path) -> None:
    for weights in (state_of(), 3):
        with pytest.raises(UsageError, match=r"weights is a (dict|int), not the path.*load_state_dict"):
            load_source("net.py:Net", weights=weights)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs a weights file"):
        load_source("net.py:Net", weights_key="ema")
    with pytest.raises(UsageError, match=r"weights=... does not apply.*load_state_dict"):
        bnexport.fold_and_export(network(), "m/x/1", weights="w.pth", request=ExportRequest(inputs=("2x8x8",)))
