"""Height and width that vary: names in the signature, and a sentence where they can't."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Graph, randomise
from torch import Tensor, nn

import bnexport
from bnexport.errors import BnexportError, ExportError, UntracedError, UsageError
from bnexport.exporting.dynamic_size import check_sizes_vary, larger_example, with_smallest_sizes
from bnexport.exporting.export_onnx import export_onnx
from bnexport.exporting.export_request import InputSpec, example_inputs, fitted_preprocessing
from bnexport.exporting.signature import ExportJob, signature_of
from bnexport.folding.torch_backend.trace import size_shapes
from bnexport.tensors import Signature, other_sizes, size_axes

IMAGE = (InputSpec("input", (3, 32, 32)),)


def model(forward: Callable[..., Any], **layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4)} | layers
    return randomise(Graph(lambda m, *x: forward(m, m.bn(m.conv(x[0])), *x[1:]), **layers)).eval()


def pooled(y: Tensor) -> Tensor:
    return nn.functional.max_pool2d(y, 4)


def exported(network: nn.Module, specs: tuple[InputSpec, ...] = IMAGE) -> tuple[nn.Module, Signature]:
    """Return the folded network with varying sizes, and its signature by torch.export."""
    inputs = example_inputs(larger_example(specs))
    folded = bnexport.fold(network, inputs, dynamic_shapes=size_shapes(network, inputs)).model
    names = tuple(spec.name for spec in specs)
    return folded, signature_of(folded, inputs, input_names=names, dynamic_size=True)


def shapes(network: nn.Module, specs: tuple[InputSpec, ...] = IMAGE) -> list[tuple[int | str, ...]]:
    check_sizes_vary(network, specs)
    signature = exported(network, specs)[1]
    return [spec.shape for spec in (*signature.inputs, *signature.outputs)]


def test_axes_by_rank() -> None:
    assert size_axes(4) == {2: "height", 3: "width"}
    assert (size_axes(3), size_axes(2)) == ({2: "length"}, {})
    assert list(size_axes(5).values()) == ["depth", "height", "width"]
    first = next(iter(other_sizes(["height", "width"])))
    assert first["height"] % 2 == first["width"] % 2 == 1
    assert first["height"] != first["width"]


def test_a_size_that_comes_out_as_it_went_in_keeps_its_name() -> None:
    network = model(
        lambda m, y: {"same": nn.functional.pad(y, (1, 1, 1, 1)), "pooled": pooled(y), "mean": y.mean((2, 3))}
    )
    assert shapes(network) == [
        ("batch", 3, "height", "width"),
        ("batch", 4, "height", "width"),
        ("batch", 4, "pooled_height", "pooled_width"),
        ("batch", 4),
    ]


def test_squares_have_one_name_for_both() -> None:
    assert shapes(model(lambda m, y: y + y.transpose(2, 3)))[0] == ("batch", 3, "height", "height")


def test_several_images() -> None:
    network = model(lambda m, y, z, t: y.mean((2, 3)) + m.conv(z).mean((2, 3)) + t)
    specs = (*IMAGE, InputSpec("small", (3, 16, 20)), InputSpec("t", (4,)))
    assert shapes(network, specs) == [
        ("batch", 3, "height", "width"),
        ("batch", 3, "small_height", "small_width"),
        ("batch", 4),
        ("batch", 4),
    ]
    assert shapes(model(lambda m, y, z: y * m.conv(z)), (IMAGE[0], InputSpec("other", (3, 32, 32))))[:2] == [
        ("batch", 3, "height", "width"),
        ("batch", 3, "height", "width"),
    ]


def test_multiples_are_found_and_the_first_is_the_smallest() -> None:
    unet = model(
        lambda m, y: torch.cat([y, m.up(nn.functional.max_pool2d(y, 8))], 1),
        conv=nn.Conv2d(3, 4, 3, padding=1), up=nn.ConvTranspose2d(4, 4, 8, 8),
    )  # fmt: skip
    assert shapes(unet)[1] == ("batch", 8, "height", "width")
    assert signature_in_sizes(unet).inputs[0].smallest == {"height": 8, "width": 8}


def refusal(network: nn.Module, specs: tuple[InputSpec, ...] = IMAGE, kind: type[BnexportError] = ExportError) -> str:
    with pytest.raises(kind) as caught:
        shapes(network, specs)
    assert "--dynamic-size" in caught.value.remedy or kind is UsageError
    assert "\n" not in str(caught.value)
    return caught.value.message


def test_the_pinned_size_is_named() -> None:
    both = refusal(model(lambda m, y: m.fc(y.flatten(1)), fc=nn.Linear(4 * 30 * 30, 5)))
    assert "the height of the input of Graph is pinned to 32" in both
    assert "at test_dynamic_size.py:" in both
    rows = refusal(model(lambda m, y: m.fc(y), fc=nn.Linear(30, 5)))
    assert "the width of the input of Graph is pinned to 32" in rows
    baked = refusal(model(lambda m, y: y * float(y.shape[2])), kind=UntracedError)
    assert "the height of the input of Graph" in baked
    assert "is pinned" in baked


@pytest.mark.parametrize(("pool", "words"), [
    (nn.AdaptiveAvgPool2d(2), "to 2x2"), (nn.AdaptiveMaxPool2d((1, 3)), "to 1x3"),
    (nn.AdaptiveAvgPool2d(1), None), (nn.AdaptiveAvgPool2d((None, 1)), None),
])  # fmt: skip
def test_adaptive_pooling_that_the_exporter_would_write_wrongly_is_refused(
    pool: nn.Module, words: str | None, tmp_path: Path
) -> None:
    network = model(lambda m, y: m.pool(y), pool=pool)
    folded, signature = exported(network, IMAGE)
    job = ExportJob(folded, example_inputs(larger_example(IMAGE)), signature)
    if words is None:
        export_onnx(job, tmp_path / "model.onnx")
    else:
        with pytest.raises(ExportError, match=f"no adaptive pooling {words} of a size that varies"):
            export_onnx(job, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists() == (words is None)


def test_a_network_without_images_has_no_size() -> None:
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    assert "no input here has a height" in refusal(network, (InputSpec("input", (4,)),), UsageError)


def test_a_network_down_to_one_pixel_is_traced_larger() -> None:
    """At 32 pixels the last map has one pixel, which torch.export would treat as a constant."""
    layers = [nn.Conv2d(4, 4, 3, 2, 1) for _ in range(5)]
    network = model(
        lambda m, y: m.rest(y).mean((2, 3)), conv=nn.Conv2d(3, 4, 3, padding=1), rest=nn.Sequential(*layers)
    )
    assert shapes(network)[0] == ("batch", 3, "height", "width")


def signature_in_sizes(network: nn.Module, specs: tuple[InputSpec, ...] = IMAGE) -> Signature:
    folded, signature = exported(network, specs)
    return with_smallest_sizes(signature, network, folded, specs)


def taken(network: nn.Module, height: int, width: int) -> bool:
    try:
        with torch.no_grad():
            return bool(network(torch.randn(2, 3, height, width)).numel())
    except (RuntimeError, ValueError):
        return False


SMALL: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "convolution": lambda _m, y: y,
    "stride and dilation": lambda m, y: m.wide(y),
    "two windows": lambda _m, y: nn.functional.avg_pool2d(nn.functional.max_pool2d(y, 3, 2), 3, 2),
    "rounded up": lambda _m, y: nn.functional.max_pool2d(
        nn.functional.max_pool2d(y, 3, 2, ceil_mode=True), 4, 3, ceil_mode=True
    ),
    "mirrored": lambda _m, y: nn.functional.pad(y, (5, 5, 3, 3), mode="reflect"),
    "resized": lambda _m, y: nn.functional.interpolate(y, scale_factor=0.2, mode="bilinear"),
    "cropped by a transposed convolution": lambda m, y: m.up(y),
    "oblong": lambda _m, y: nn.functional.max_pool2d(y, (2, 7)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("mean", [False, True], ids=["map", "mean"])
def test_the_smallest_sizes_are_those_that_the_network_takes(name: str, *, mean: bool) -> None:
    torch.manual_seed(0)
    layers = {"wide": nn.Conv2d(4, 4, 3, 2, 0, 2), "up": nn.ConvTranspose2d(4, 4, 3, 2, 6)}
    network = model(lambda m, y: SMALL[name](m, y).mean((2, 3)) if mean else SMALL[name](m, y), **layers)
    smallest = dict(signature_in_sizes(network).inputs[0].smallest)
    assert smallest == {
        "height": next(size for size in range(1, 33) if taken(network, size, 32)),
        "width": next(size for size in range(1, 33) if taken(network, 32, size)),
    }
    assert taken(network, **smallest)


def test_the_graph_holds_from_where_forward_goes_its_way() -> None:
    def forward(m: nn.Module, y: Tensor) -> Tensor:
        return y.mean((2, 3)) * 2 if y.shape[2] > 20 else y.amax((2, 3))

    network = model(forward)
    assert signature_in_sizes(network).inputs[0].smallest == {"height": 23, "width": 3}
    with pytest.raises(ExportError, match="takes another branch for a height of 22 than for 23 and more") as caught:
        signature_in_sizes(network, (InputSpec("input", (3, 22, 40)),))
    assert "--input" in caught.value.remedy


def test_maps_of_one_pixel_are_not_a_limit() -> None:
    """torch.export excludes them here, although the graph allows them: ConvNeXt's layer norm, channels last, a convolution."""
    network = model(
        lambda m, y: m.wide(m.norm(m.down(y).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).mean((2, 3)),
        down=nn.Conv2d(4, 4, 8, 8), norm=nn.LayerNorm(4), wide=nn.Conv2d(4, 4, 3, padding=1, groups=4),
    )  # fmt: skip
    assert exported(network)[1].inputs[0].smallest["height"] > 10
    assert signature_in_sizes(network).inputs[0].smallest == {"height": 10, "width": 10}


FORKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "odd": lambda x, y: y * 2 if x.shape[2] % 2 else y,
    "area": lambda x, y: y * 2 if x.shape[2] * x.shape[3] > 10000 else y,
    "oblong": lambda x, y: y * 2 if x.shape[2] < x.shape[3] else y,
    "multiples of 32": lambda x, y: nn.functional.pad(y, (0, 32 - x.shape[3] % 32)) if x.shape[3] % 32 else y,
    "multiples of 14": lambda x, y: y * 2 if x.shape[2] % 14 else y,
    "one size": lambda x, y: y * 2 if x.shape[3] != 40 else y,
    "one shape": lambda x, y: y if tuple(x.shape[2:]) == (640, 480) else y * 2,
}


@pytest.mark.parametrize("name", FORKS)
def test_a_forward_that_goes_by_the_size_is_refused_with_its_line(name: str) -> None:
    network = randomise(Graph(lambda m, x: FORKS[name](x, m.bn(x)), bn=nn.BatchNorm2d(3))).eval()
    line = FORKS[name].__code__.co_firstlineno
    assert f"takes another branch at test_dynamic_size.py:{line}" in refusal_of_trace(network)


def test_a_way_that_ends_at_a_size_is_refused() -> None:
    network = model(lambda _m, y: y * 2 if 100 > y.shape[2] > 40 else y, conv=nn.Conv2d(3, 4, 1))
    assert "can't grow above 99" in refusal_of_trace(network)


def refusal_of_trace(network: nn.Module) -> str:
    inputs = example_inputs((InputSpec("input", (3, 60, 70)),))
    with pytest.raises(UntracedError) as caught:
        bnexport.fold(network, inputs, dynamic_shapes=size_shapes(network, inputs))
    assert "--dynamic-size" in caught.value.remedy
    return caught.value.message


def test_conditions_with_one_possible_answer_are_ignored() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.bn(x)
        if x.shape[2] < 1 or x.shape[0] == 0 or x.shape[2] * x.shape[3] < 4 or 2 * x.shape[2] - x.shape[2] < 2:
            raise ValueError("no image")
        y = nn.functional.pad(y, (min(x.shape[2], x.shape[3] // 2), 0))
        return y[:, :, : x.shape[2] // 2].mean((2, 3)) if x.shape[2] > 5 else y.mean((2, 3))

    network = randomise(Graph(forward, bn=nn.BatchNorm2d(3))).eval()
    assert signature_in_sizes(network).inputs[0].smallest["height"] == 6


def test_several_images_share_the_smallest_size_of_a_shared_name() -> None:
    network = model(lambda m, y, z: m.conv(z).mean((2, 3)) + nn.functional.max_pool2d(y + m.conv(z), 2).mean((2, 3)))
    first, second = signature_in_sizes(network, (IMAGE[0], InputSpec("other", (3, 32, 32)))).inputs
    assert first.smallest == second.smallest == {"height": 4, "width": 4}
    apart = model(lambda m, y, z: y.mean((2, 3)) + nn.functional.max_pool2d(m.conv(z), 5).mean((2, 3)))
    first, second = signature_in_sizes(apart, (IMAGE[0], InputSpec("small", (3, 16, 20)))).inputs
    assert (first.smallest, second.smallest) == ({"height": 3, "width": 3}, {"small_height": 7, "small_width": 7})


def test_sizes_that_go_together_only_are_found_together() -> None:
    """Each size alone may be small, but not both together."""
    network = model(lambda m, y: nn.functional.max_pool1d(y.flatten(2), 24).mean(2))
    smallest = dict(signature_in_sizes(network).inputs[0].smallest)
    assert taken(network, **smallest)
    assert not taken(network, smallest["height"] - 1, smallest["width"] - 1)
    assert taken(network, 3, 32)
    assert taken(network, 32, 3)


def test_preprocessing_follows_the_input() -> None:
    stated = {"channels": 3, "height": 224, "width": 224, "scale": 1.0, "mean": [0.0] * 3, "std": [1.0] * 3}
    assert fitted_preprocessing(stated, (InputSpec("input", (3, 64, 96)),)) == {**stated, "height": 64, "width": 96}
    assert fitted_preprocessing(stated, (InputSpec("input", (1, 64, 96)),)) is None
    assert fitted_preprocessing(stated, (InputSpec("a", (3, 8, 8)), InputSpec("b", (3, 8, 8)))) is None
    assert fitted_preprocessing(None, IMAGE) is None
