"""Networks of torchvision and timm by name, without a download."""

import sys
from pathlib import Path

import pytest
import torch
from cases import randomise
from torch import nn

from bnexport.errors import MissingDependency, ModelError
from bnexport.loading.checkpoint import save_checkpoint
from bnexport.loading.inspection import inspect_path
from bnexport.loading.sources import checkpoint_of, load_source, unknown_reason
from bnexport.loading.zoo import ZOOS, build_from_zoo, zoo_facts, zoo_of

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("weights were to be downloaded")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def refusal(source: str, **options: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        build_from_zoo(source, options)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return caught.value


def test_a_source_names_its_zoo():
    assert zoo_of("torchvision:resnet18") is ZOOS["torchvision"]
    assert zoo_of("timm:repvgg_a0.rvgg_in1k") is ZOOS["timm"]
    for other in ("torchvision", "torchvision.models:resnet18", "net.py:make", "bn_lenet", ""):
        assert zoo_of(other) is None


@pytest.mark.parametrize(
    ("source", "options", "shape", "means"),
    [
        ("torchvision:resnet18", {"num_classes": 3}, (3, 224, 224), True),
        ("torchvision:squeezenet1_1", {}, (3, 224, 224), True),
        ("torchvision:lraspp_mobilenet_v3_large", {}, (3, 256, 256), True),
        ("torchvision:vit_b_32", {"image_size": 64}, (3, 64, 64), True),
        ("torchvision:googlenet", {}, (3, 224, 224), False),
        ("torchvision:googlenet", {"transform_input": True}, (3, 224, 224), True),
        ("torchvision:r3d_18", {}, (3, 16, 112, 112), False),
        ("timm:repvgg_a0", {}, (3, 224, 224), True),
        ("timm:test_resnet.r160_in1k", {}, (3, 160, 160), True),
        ("timm:resnet10t", {"in_chans": 1}, (1, 176, 176), False),
    ],
)
def test_the_package_states_its_preprocessing(source, options, shape, means):
    have, preprocessing = zoo_facts(source, options, build_from_zoo(source, options))
    assert have == shape
    assert (preprocessing is not None) == means
    if preprocessing is not None:
        assert (preprocessing["channels"], preprocessing["height"], preprocessing["width"]) == shape
        assert preprocessing["scale"] == 1 / 255
        if source.startswith("torchvision"):
            assert (preprocessing["mean"], preprocessing["std"]) == IMAGENET


def test_a_wrong_name_gets_close_ones():
    error = refusal("torchvision:resnet81")
    assert error.message == "torchvision has no model 'resnet81'"
    assert "resnet18" in error.remedy
    assert "repvgg_a0" in refusal("timm:repvgg_a").remedy
    assert "list_models" in refusal("torchvision:zzzzzz").remedy
    assert "has no model" in refusal("timm:resnet18.no_such_tag").message
    assert "has no model" in refusal("timm:hf-hub:someone/something").message


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("torchvision:resnet18", {"num_classes": 10, "zero_init_residual": True}),
        ("torchvision:mobilenet_v3_small", {"num_classes": 10, "width_mult": 0.5, "dropout": 0.5}),
        ("torchvision:fcn_resnet50", {"num_classes": 4, "aux_loss": True}),
        ("torchvision:vgg11_bn", {"dropout": 0.1}),
        ("torchvision:googlenet", {"aux_logits": False}),
        ("timm:repvgg_a0", {"num_classes": 10, "in_chans": 1}),
    ],
)
def test_options_reach_the_constructor(source, options):
    assert isinstance(build_from_zoo(source, options), nn.Module)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "source",
    [
        "torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:lraspp_mobilenet_v3_large",
        "torchvision:fcn_resnet50", "torchvision:efficientnet_b0", "torchvision:densenet121", "timm:repvgg_a0",
    ],
)  # fmt: skip
def test_an_option_that_is_not_taken_is_named(source):
    """This includes options that a builder of torchvision would ignore."""
    assert refusal(source, colour=3).message == f"{source} takes no option 'colour'"


@pytest.mark.parametrize("key", ["weights", "weights_backbone", "pretrained", "checkpoint_path", "pretrained_cfg"])
@pytest.mark.parametrize("source", ["torchvision:fcn_resnet50", "timm:repvgg_a0"])
def test_options_that_fetch_something_are_refused(source, key):
    assert "downloads no weights" in refusal(source, **{key: "DEFAULT"}).message


def test_wrong_values_are_one_sentence():
    assert "can't be built with num_classes=x: TypeError" in refusal("torchvision:resnet18", num_classes="x").message
    with pytest.raises(ModelError, match="not a table"):
        build_from_zoo("torchvision:resnet18", [1])


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "quantized_resnet18", "raft_small"])
def test_other_kinds_are_refused_with_a_reason(name):
    assert refusal(f"torchvision:{name}").message.startswith(f"torchvision:{name} ")


def test_weights_and_a_round_trip(tmp_path: Path):
    torch.manual_seed(0)
    trained = randomise(build_from_zoo("torchvision:resnet18", {"num_classes": 3}))
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "w.pt")
    loaded = load_source("torchvision:resnet18", weights=tmp_path / "w.pt", options={"num_classes": 3})
    assert (loaded.name, loaded.input_shape) == ("resnet18", (3, 224, 224))
    assert loaded.network == {"source": "torchvision:resnet18", "options": {"num_classes": 3}}
    assert torch.equal(loaded.module.bn1.running_var, trained.bn1.running_var)
    assert not loaded.module.training
    save_checkpoint(tmp_path / "c.safetensors", checkpoint_of(loaded))
    again = load_source(str(tmp_path / "c.safetensors"))
    assert (again.name, again.network, again.input_shape) == (loaded.name, loaded.network, loaded.input_shape)
    assert again.preprocessing == loaded.preprocessing
    stated = load_source("torchvision:resnet18", weights=tmp_path / "c.safetensors")  # the file states its options
    assert stated.network == loaded.network
    with pytest.raises(ModelError, match="takes no option 'colour'"):
        load_source("torchvision:resnet18", options={"colour": 1})


def test_without_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = {"source": "timm:test_resnet", "options": {}}
    assert unknown_reason(network) is None
    torch.manual_seed(0)
    trained = randomise(build_from_zoo("timm:test_resnet", {}))
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    loaded = load_source("timm:test_resnet", weights=tmp_path / "w.pt")
    save_checkpoint(tmp_path / "c.safetensors", checkpoint_of(loaded))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency) as caught:
        load_source("timm:test_resnet")
    assert "pip install 'bnexport[timm]'" in caught.value.remedy
    assert "pip install 'bnexport[timm]'" in str(unknown_reason(network))
    assert len(inspect_path(tmp_path / "c.safetensors").layers) > 3  # its statistics can be read all the same


def test_networks_that_can_not_be_rebuilt():
    assert "whose code is not in the bundle (net.py:make)" in str(unknown_reason({"source": "net.py:make"}))
    assert "has no model 'resnet19'" in str(unknown_reason({"source": "torchvision:resnet19"}))
    assert unknown_reason({"source": "bn_lenet"}) is None
