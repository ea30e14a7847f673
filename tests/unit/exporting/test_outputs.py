"""Names of outputs: keys, fields, positions."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from cases import Graph, randomise
from torch import Tensor, nn

import bnexport
from bnexport.errors import ExportError
from bnexport.exporting.signature import flat, signature_of
from bnexport.runtimes.torch_outputs import flatten


@dataclass
class Scores:
    logits: Tensor
    features: list[Tensor]
    loss: Tensor | None = None


class Pair(NamedTuple):
    mean: Tensor
    deviation: Tensor


@dataclass
class Nested:
    scores: Scores
    pair: Pair


def model(result: Callable[[Tensor], Any]) -> nn.Module:
    torch.manual_seed(0)
    made = Graph(lambda m, x: result(m.bn(m.conv(x))), conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4))
    return randomise(made).eval()


INPUT = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
RESULTS: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "tensor": (lambda y: y, ["logits"]),
    "tuple of one": (lambda y: (y,), ["logits"]),
    "tuple": (lambda y: (y + 1, [y * 2, y * 3]), ["output_0", "output_1", "output_2"]),
    "None in a tuple": (lambda y: (None, y, None, y * 2), ["output_0", "output_1"]),
    "dict": (lambda y: {"out": y, "aux": None, "b": y + 1, "a": y + 2}, ["out", "b", "a"]),
    "dict of one": (lambda y: OrderedDict(out=y), ["out"]),
    "nested": (lambda y: {"f": [y, y + 1], "g": {"h": y + 2}}, ["f.0", "f.1", "g.h"]),
    "tuple with a dict": (lambda y: (y, {"aux": y + 1}), ["output_0", "output_1.aux"]),
    "named tuple": (lambda y: Pair(y, y.exp()), ["mean", "deviation"]),
    "dataclass": (lambda y: Scores(y, [y + 1, y + 2]), ["logits", "features.0", "features.1"]),
    "dataclass of dataclasses": (
        lambda y: Nested(Scores(y, [y + 1], y + 2), Pair(y + 3, y + 4)),
        ["scores.logits", "scores.features.0", "scores.loss", "pair.mean", "pair.deviation"],
    ),
    "odd keys": (lambda y: {"a b": y, 3: y + 1}, ["a_b", "output_3"]),
    "keys that become one": (lambda y: {"a b": y, "a/b": y + 1}, ["output_0", "output_1"]),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_names_and_order(kind: str) -> None:
    result, names = RESULTS[kind]
    original = model(result)
    folded = bnexport.fold(original, (INPUT,)).model
    signature = signature_of(folded, (INPUT,), input_names=("input",))
    assert [spec.name for spec in signature.outputs] == names
    with torch.no_grad():
        live, plain = flatten(original(INPUT)), flat(folded)(INPUT)
    plain = [plain] if isinstance(plain, Tensor) else list(plain)
    assert len(live) == len(plain) == len(names)
    for one, two in zip(live, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("result", "words"),
    [(lambda y: {"input": y}, "'input' names an input and an output"), (lambda y: {"out": None}, "returns no tensor")],
)
def test_results_that_cannot_be_named_are_refused(result: Callable[[Tensor], Any], words: str) -> None:
    folded = bnexport.fold(model(result), (INPUT,)).model
    with pytest.raises(ExportError, match=words):
        signature_of(folded, (INPUT,), input_names=("input",))
