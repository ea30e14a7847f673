"""Files of torch.save: the values that may lie next to the weights, code that is refused, and tensors bit by bit."""

from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import decimal
import enum
import functools
import logging
import operator
import os
import pathlib
import pickle
import random
import sys
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from weights_files import State, loaded, network, refusal, same, state_of

from bnexport.errors import ModelError
from bnexport.loading.sources import load_source
from bnexport.loading.weights import _opened
from bnexport.optional import no_warnings

# next to the weights


def optimiser_state() -> dict[str, Any]:
    model = network()
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 2, 8, 8)).sum().backward()
    optimiser.step()
    return {"optimizer": optimiser.state_dict(), "lr": torch.optim.lr_scheduler.StepLR(optimiser, 3).state_dict()}


HARMLESS: dict[str, Callable[[], Any]] = {
    "numpy numbers": lambda: [np.float64(71.5), np.int32(3), np.bool_(True), np.float32(0.1), np.complex128(1j)],
    "numpy arrays": lambda: {"m": np.eye(3), "t": np.array(["a", "bc"]), "r": np.zeros(2, dtype=[("x", "f4"), ("y", "i8")])},
    "numpy dates": lambda: np.array(["2024-01-02"], dtype="datetime64[D]"),
    "numpy types": lambda: [np.dtype("float32"), np.float32, np.ndarray],
    "arguments": lambda: argparse.Namespace(lr=0.1, arch="tiny", sizes=[1, 2], gpu=None, inner=argparse.Namespace(x=1)),
    "dates": lambda: [datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), datetime.date(2024, 1, 2), datetime.timedelta(3)],
    "paths": lambda: [pathlib.PurePosixPath("a/b"), Path("c"), pathlib.PureWindowsPath("d")],
    "sizes, types and devices": lambda: [torch.Size([1, 2]), torch.float16, torch.device("cuda:0"), torch.strided],
    "collections": lambda: {
        "d": collections.defaultdict(list, {"a": [1]}), "q": collections.deque([1, 2], maxlen=3),
        "c": collections.Counter("abc"),
        "o": collections.OrderedDict(a=1), "s": {1, 2}, "f": frozenset({1}), "t": (1, (2, 3)),
    },
    "numbers": lambda: [decimal.Decimal("1.5"), 1j, 2**70, -(2**40), uuid.UUID(int=3), True, None, 1e300],
    "bytes": lambda: [b"\x00\xff", bytearray(b"ab"), b""],
    "an optimiser": optimiser_state,
    "generators": lambda: [torch.get_rng_state(), np.random.RandomState(0).get_state(), random.getstate()],
    "a parameter": lambda: nn.Parameter(torch.ones(3)),
}  # fmt: skip


class Settings:
    """A plain object of the user's: in a circle, with references to a class and a function."""

    def __init__(self, **more: Any) -> None:
        self.rate, self.kind, self.start = 0.1, Calls, loaded
        self.inside = {"again": [self], "date": datetime.date(2024, 1, 2), **more}


class Slots:
    __slots__ = ("rate",)

    def __init__(self) -> None:
        self.rate = 0.1


class Attributes(dict[str, Any]):
    """A dictionary with attributes, as many libraries of settings have one."""


class Numbers(list[int]):
    pass


class Point:
    """An object that is made with arguments."""

    def __new__(cls, *parts: Any) -> Point:
        made = super().__new__(cls)
        made.parts = parts  # type: ignore[attr-defined]
        return made

    def __getnewargs__(self) -> Any:
        return self.parts  # type: ignore[attr-defined]


class Reconstructed:
    """An object as protocols 0 and 1 describe it."""

    def __reduce__(self) -> Any:
        return copyreg._reconstructor, (type(self), object, None), {"rate": 0.1}  # type: ignore[attr-defined]


def omegaconf() -> Any:
    """Build settings as omegaconf's pickles describe them, with its classes as in omegaconf 2.3."""
    sys.modules.setdefault("omegaconf", types.ModuleType("omegaconf"))
    kinds: dict[str, Any] = {}
    names = "base.ContainerMetadata base.Metadata dictconfig.DictConfig listconfig.ListConfig nodes.AnyNode"
    for place in names.split():
        module, name = place.split(".")
        home = sys.modules.setdefault(f"omegaconf.{module}", types.ModuleType(f"omegaconf.{module}"))
        kinds[name] = type(name, (), {"__module__": home.__name__})
        setattr(home, name, kinds[name])

    def made(kind: str, parent: Any, content: Any) -> Any:
        value, metadata = kinds[kind](), kinds["ContainerMetadata" if kind.endswith("Config") else "Metadata"]()
        metadata.__dict__ = {
            "ref_type": Any, "object_type": dict, "optional": True, "key": None, "flags": {"readonly": True},
            "resolver_cache": collections.defaultdict(dict), "key_type": int, "element_type": list[int].__origin__,
        }  # fmt: skip
        value.__dict__ = {"_metadata": metadata, "_parent": parent, "_flags_cache": None, "_content": content}
        return value

    root = made("DictConfig", None, {})
    items = made("ListConfig", root, [])
    items._content += [made("AnyNode", items, number) for number in (0.9, None, "???")]
    root._content.update(betas=items, lr=made("AnyNode", root, 0.1))
    return root


OBJECTS: dict[str, Callable[[], Any]] = {
    "omegaconf": omegaconf,
    "an object": Settings,
    "an object with slots": Slots,
    "a kind of dictionary": lambda: Attributes(rate=0.1, inner=Attributes(x=[Settings()])),
    "a kind of list": lambda: Numbers([1, 2]),
    "an object with arguments": lambda: Point(1, "a", Settings()),
    "an object of protocol 1": Reconstructed,
    "an object with a tensor": lambda: Settings(tensor=torch.ones(3)),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_of_unknown_classes_are_not_made(
    folder: Path, kind: str, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        value = OBJECTS[kind]()
        stored = {"epoch": 3, "hyper_parameters": value, "state_dict": state_of(), "again": [value]}
        torch.save(stored, "w.pth", pickle_protocol=protocol, **options)
        with monkeypatch.context() as patch:  # an import of a class would fail
            for made in (Settings, Slots, Attributes, Numbers, Point, Reconstructed):
                patch.delattr(f"{__name__}.{made.__name__}")
            for name in [name for name in sys.modules if name.startswith("omegaconf")]:
                del sys.modules[name]
            found = load_source("net.py:Net", weights="w.pth")
        assert same(found.module, state_of())
        assert found.notes == ()


def test_weights_inside_an_object_are_not_looked_for(folder: Path) -> None:
    assert "is not a state dict" in refusal(Settings(state_dict=state_of()))
    assert "is not a state dict" in refusal({"state_dict": Attributes(state_of())})


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", HARMLESS)
def test_plain_values_next_to_the_weights_do_no_harm(folder: Path, kind: str, protocol: int) -> None:
    stored = {"epoch": 3, "state_dict": state_of(), "more": HARMLESS[kind]()}
    found = loaded(stored, pickle_protocol=protocol)
    assert same(found.module, state_of())
    old = loaded(stored, _use_new_zipfile_serialization=False)
    assert same(old.module, state_of())


class Calls:
    """A value whose pickle calls something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Namespace(argparse.Namespace):
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


class Level(enum.Enum):
    LOW = 1


def made_by_build() -> Any:
    value = argparse.Namespace()
    value.__dict__["x"] = Calls(eval, "open('hacked', 'w')")
    return value


HOSTILE: dict[str, Callable[[], Any]] = {
    "os.system": lambda: Calls(os.system, "touch hacked"),
    "eval": lambda: Calls(eval, "open('hacked', 'w')"),
    "exec": lambda: Calls(exec, "open('hacked', 'w')"),
    "open": lambda: Calls(open, "hacked", "w"),
    "getattr": lambda: Calls(getattr, Calls(__import__, "os"), "system"),
    "functools.partial": lambda: functools.partial(print, "hacked"),
    "a method": lambda: [].append,
    "a Namespace with another call": Namespace,
    "a call in the attributes of a Namespace": made_by_build,
    "an array of objects": lambda: np.array([Calls(os.mkdir, "hacked")], dtype=object),
    "an array of plain objects": lambda: np.array([1, "a"], dtype=object),
    "a record with objects": lambda: np.zeros(1, dtype=[("x", object)]),
    "a call as a key": lambda: {Calls(os.mkdir, "hacked"): 1},
    "a call in a defaultdict": lambda: collections.defaultdict(functools.partial(os.mkdir, "hacked")),
    "a factory of a defaultdict": lambda: collections.defaultdict(os.getcwd),
    "a call in a tensor's place": lambda: {"state_dict": {"head.weight": Calls(os.mkdir, "hacked")}},
    "torch.load in a tensor": lambda: Calls(torch.storage._load_from_bytes, b"x"),
    "a module": lambda: nn.Linear(2, 2),
    "a function": lambda: loaded,
    "a class of the user's": lambda: Calls,
    "a size that is called": lambda: Calls(torch.FloatStorage, 2**40),
    "a call in the state of an object": lambda: Settings(x=Calls(os.mkdir, "hacked")),
    "a call in the arguments of an object": lambda: Point(Calls(os.mkdir, "hacked")),
    "a call in a kind of dictionary": lambda: Attributes(x=Calls(os.mkdir, "hacked")),
    "a call of the class of an object": lambda: [Settings(), Calls(Settings)],
    "the class of an object": lambda: [Settings(), Settings],
    "a module in the state of an object": lambda: Settings(x=nn.Linear(2, 2)),
    "a class of torch in the state of an object": lambda: Settings(x=nn.Linear),
    "a class of Python in the state of an object": lambda: Settings(x=logging.FileHandler),
    "an object of Python": lambda: logging.Formatter(),
    "a member of an enumeration": lambda: Level.LOW,
    "a getter of attributes": lambda: operator.attrgetter("x"),
    "an object made from another": lambda: Calls(copyreg._reconstructor, Attributes, dict, {"a": 1}),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_could_run_code_is_refused(folder: Path, kind: str, protocol: int) -> None:
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"state_dict": state_of(), "more": HOSTILE[kind]()}, "w.pth", pickle_protocol=protocol, **options)
        with pytest.raises(ModelError) as caught:
            load_source("net.py:Net", weights="w.pth")
        assert "w.pth is" in caught.value.message
        assert not Path("hacked").exists()


def test_a_name_in_pieces_does_not_pass(folder: Path) -> None:
    """Names with dots in them, and modules by their names in Python 2."""
    for dotted in ("datetime sys.modules", "__builtin__ eval", "collections abc.sys.modules", "pathlib os.system"):
        module, name = dotted.split()
        names = f"{module}\n{name}\n.".encode()
        Path("w.pth").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"\x80\x02c" + names)
        with pytest.raises(ModelError, match=f"names '{module}.{name}', code which bnexport does not run"):
            load_source("net.py:Net", weights="w.pth")


def test_no_unpickler_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": state_of(), "args": argparse.Namespace(lr=1)}, "w.pth")

    def trap(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("the file was unpickled")

    readers = "torch.load", "pickle.loads", "pickle.load", "pickle.Unpickler", "torch._weights_only_unpickler.Unpickler"
    for place in readers:
        monkeypatch.setattr(place, trap)
    assert same(load_source("net.py:Net", weights="w.pth").module, state_of())


# tensors


def tensors() -> State:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "plain": base, "view": base[1:3, 2:], "turned": base.t(), "shared": base, "strided": base[::2, ::3],
        "repeated": torch.ones(1, 3).expand(2, 3), "scalar": torch.tensor(3.5), "empty": torch.empty(0, 3),
        "double": base.double() / 7, "half": base.half(), "bfloat16": base.bfloat16() / 3,
        "float8": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn), "complex": torch.tensor([1 + 2j]),
        "int64": torch.arange(-3, 3), "int8": torch.tensor([-128, 127], dtype=torch.int8),
        "uint8": torch.tensor([0, 255], dtype=torch.uint8), "uint16": torch.tensor([0, 65535], dtype=torch.uint16),
        "bool": torch.tensor([True, False]), "parameter": nn.Parameter(torch.ones(2)),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
def test_tensors_are_those_of_torchs_own_reader(tmp_path: Path, options: dict[str, Any]) -> None:
    saved = tensors()
    if "_use_new_zipfile_serialization" in options:  # torch can't read its own old format of these types
        del saved["uint16"], saved["float8"]
    torch.save(saved, tmp_path / "w.pth", **options)
    want = torch.load(tmp_path / "w.pth", weights_only=False)  # its safe reader does not know protocol 4
    with _opened(tmp_path / "w.pth") as sets:
        got = {name: make() for name, make in sets[""].items()}
    assert set(got) == set(want)
    for name, value in want.items():
        mine = got[name]
        assert (mine.dtype, mine.shape, mine.stride()) == (value.dtype, value.shape, value.stride()), name
        bits, want_bits = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (mine, value))
        assert bits.equal(want_bits), name


class Part:
    """A part of a storage, or all of it: its place in the storage, and its number of elements."""

    def __init__(self, key: str, size: int, *view: int) -> None:
        self.key, self.size, self.view = key, size, view

    def persistent(self) -> Any:
        view = None if not self.view else (f"{self.key}.{self.view}", *self.view)
        return "storage", torch.FloatStorage, self.key, "cpu", self.size, view


def write_old(path: Path, state: dict[str, Any], storages: dict[str, Tensor]) -> None:
    """Write a file as PyTorch before 0.4 did."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.persistent() if isinstance(value, Part) else None

    with path.open("wb") as file:
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4, "long": 4, "short": 2}}
        for value in (0x1950A86A20F9469CFC6C, 1001, system, state, sorted(storages)):
            Pickler(file, 2).dump(value)
        for key in sorted(storages):
            file.write(len(storages[key]).to_bytes(8, "little") + storages[key].numpy().tobytes())


def of_part(part: Part, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> Calls:
    return Calls(torch._utils._rebuild_tensor, part, offset, sizes, strides)


def test_parts_of_storages_as_pytorch_before_0_4_wrote_them(folder: Path) -> None:
    numbers = torch.arange(40.0) / 7
    state = {
        "head.weight": of_part(Part("a", 40, 7, 12), (3, 4), (4, 1)),
        "head.bias": of_part(Part("a", 40, 30, 5), (3,), (2,)),
        "whole": of_part(Part("a", 40), (40,), (1,)),
        "turned": of_part(Part("a", 40, 7, 12), (4, 2), (1, 4), 4),
    }
    write_old(Path("w.pth"), state, {"a": numbers})
    want = torch.load("w.pth", weights_only=False)
    with _opened(Path("w.pth")) as sets:
        got = {name: make() for name, make in sets[""].items()}
    assert set(got) == set(want) == set(state)
    for name, value in want.items():
        assert got[name].equal(value), name
    assert got["head.bias"].equal(numbers[30:35:2])


@pytest.mark.parametrize("view", [(30, 12), (-1, 2), (0, 41), (2**62, 2**62), (0, -1)])
def test_a_part_beyond_its_storage_is_refused(folder: Path, view: tuple[int, int]) -> None:
    write_old(Path("w.pth"), {"x": of_part(Part("a", 40, *view), (1,), (1,))}, {"a": torch.ones(40)})
    with pytest.raises(ModelError, match="holds a pickle with a part of a storage"):
        load_source("net.py:Net", weights="w.pth")


def test_a_tensor_beyond_its_part_is_refused(folder: Path) -> None:
    write_old(Path("w.pth"), {"x": of_part(Part("a", 40, 7, 12), (13,), (1,))}, {"a": torch.ones(40)})
    with pytest.raises(ModelError, match="needs 13 elements of a storage of 12"):
        load_source("net.py:Net", weights="w.pth")


def test_a_file_of_a_machine_with_the_other_byte_order(folder: Path) -> None:
    from support.hostile import members_of, write_zip

    torch.save(state_of(), "w.pth")
    members = members_of(Path("w.pth"))
    for member in members:
        if member.name.endswith("byteorder"):
            member.data = b"big"
        elif "/data/" in member.name:
            width = 8 if len(member.data) == 8 else 4  # the count of batches is the one int64
            member.data = np.frombuffer(member.data, np.uint8).reshape(-1, width)[:, ::-1].tobytes()
        member.__post_init__()
    write_zip(Path("swapped.pth"), members)
    assert same(load_source("net.py:Net", weights="swapped.pth").module, state_of())


def test_a_changed_bit_of_a_weight_is_seen(folder: Path) -> None:
    torch.save(state_of(), "w.pth")
    content = bytearray(Path("w.pth").read_bytes())
    at = content.find(state_of()["head.weight"].numpy().tobytes())
    content[at + 5] ^= 1
    Path("w.pth").write_bytes(bytes(content))
    with pytest.raises(ModelError, match="does not have its declared size and checksum"):
        load_source("net.py:Net", weights="w.pth")


def test_quantized_and_conjugated_tensors_are_refused(folder: Path) -> None:
    with no_warnings:
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    assert "quantized" in refusal({**state_of(), "head.bias": quantized})
    assert "resolve_conj" in refusal({**state_of(), "head.bias": torch.ones(3, dtype=torch.complex64).conj()})
