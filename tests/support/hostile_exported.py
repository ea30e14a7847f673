"""Hostile files of torch.export."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.hostile import Good, Hostile, Member, members_of, replaced, write_zip
from support.hostile_archives import Code, call, checkpoint


def exported(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Good], Path]:
    """A .pt2 file whose model.json was changed."""

    def build(folder: Path, good: Good) -> Path:
        members = members_of(good.exported)
        text = next(member.data for member in members if member.name.endswith("models/model.json"))
        value = json.loads(text)
        change(value)
        return write_zip(folder / "model.pt2", replaced(members, "models/model.json", json.dumps(value).encode()))

    return build


def exported_file(ending: str, data: bytes) -> Callable[[Path, Good], Path]:
    return lambda folder, good: write_zip(folder / "model.pt2", replaced(members_of(good.exported), ending, data))


def exported_more(name: str, data: bytes) -> Callable[[Path, Good], Path]:
    def build(folder: Path, good: Good) -> Path:
        members = members_of(good.exported)
        root = members[0].name.partition("/")[0]
        return write_zip(folder / "model.pt2", [*members, Member(f"{root}/{name}", data)])

    return build


def weights_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Good], Path]:
    def build(folder: Path, good: Good) -> Path:
        members = members_of(good.exported)
        ending = "model_weights_config.json"
        value = json.loads(next(member.data for member in members if member.name.endswith(ending)))
        change(next(iter(value["config"].values())))
        return write_zip(folder / "model.pt2", replaced(members, ending, json.dumps(value).encode()))

    return build


def symbol(text: str) -> Callable[[Path, Good], Path]:
    """A .pt2 file with another expression for its first size that varies."""

    def change(value: dict[str, Any]) -> None:
        found = [item for item in _walk(value) if "expr_str" in item]
        assert found
        found[0]["expr_str"] = text

    return exported(change)


def _walk(value: Any) -> Any:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)


def first_node(**changes: Any) -> Callable[[Path, Good], Path]:
    return exported(lambda value: value["graph_module"]["graph"]["nodes"][0].update(changes))


PT2: dict[str, Hostile] = {
    "pt2: operator by its path": Hostile("pt2", first_node(target="torch.serialization.os.system"), "not an operator"),
    "pt2: hub": Hostile("pt2", first_node(target="torch.hub.load"), "not an operator"),
    "pt2: attribute of the operator module": Hostile("pt2", first_node(target="_operator.attrgetter"), "not an operator"),
    "pt2: operator that writes a file": Hostile(
        "pt2", first_node(target="torch.ops.aten.from_file.default"), "not an operator"
    ),
    "pt2: operator of others": Hostile("pt2", first_node(target="torch.ops.evil.run.default"), "not an operator"),
    "pt2: extension": Hostile("pt2", first_node(target="#evil:run"), "not an operator"),
    "pt2: size that is code": Hostile("pt2", symbol("__import__('os').mkdir('hacked')"), "where a size is expected"),
    "pt2: size that is code in a symbol": Hostile(
        "pt2", symbol("Symbol(__import__('os').mkdir('hacked'))"), "where a size is expected"
    ),
    "pt2: size with an attribute": Hostile("pt2", symbol("(1).__class__"), "where a size is expected"),
    "pt2: tower of powers": Hostile("pt2", symbol("9**9**9**9"), "where a size is expected"),
    "pt2: tower of powers in sympy's words": Hostile(
        "pt2", symbol("Pow(Integer(9), Pow(Integer(9), Integer(9)))"), "where a size is expected"
    ),
    "pt2: size that is a program": Hostile("pt2", symbol("lambda: 0"), "where a size is expected"),
    "pt2: size of 100 kB": Hostile("pt2", symbol("(" * 50_000 + "1" + ")" * 50_000), "longer than"),
    "pt2: size nested deep": Hostile("pt2", symbol("-" * 4000 + "1"), "where a size is expected"),
    "pt2: symbol with a huge number": Hostile(
        "pt2", exported(lambda v: v["range_constraints"].update({"u99999999999": {"min_val": 0, "max_val": 9}})), "invalid name"
    ),
    "pt2: guard that is code": Hostile(
        "pt2", exported(lambda v: v.update(guards_code=["__import__('os')"])), "condition on sizes"
    ),
    "pt2: guard that is code of torch": Hostile(
        "pt2", exported(lambda v: v.update(guards_code=["torch.hub.load('a', 'b')"])), "condition on sizes"
    ),
    "pt2: guard that hides code": Hostile(
        "pt2", exported(lambda v: v.update(guards_code=["torch.sym_max(L['x'].__class__, 1) > 0"])), "condition on sizes"
    ),
    "pt2: name that is code": Hostile(
        "pt2", first_node(name="x=__import__('os').mkdir('hacked')"), "not a plain word"
    ),
    "pt2: name of an argument that is code": Hostile(
        "pt2",
        exported(lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(
            forward_arg_names=["x=__import__('os').mkdir('hacked')"])),
        "not a plain word",
    ),
    "pt2: key of an argument that is code": Hostile(
        "pt2",
        exported(lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec=json.dumps([1, {"type": "builtins.dict", "context": '["x=open(1)"]', "children_spec": []}]))),
        "not a plain word",
    ),
    "pt2: name of a parameter that is code": Hostile(
        "pt2",
        exported(lambda v: v["graph_module"]["signature"]["input_specs"][0]["parameter"].update(parameter_name='"]+x["')),
        "not a plain word",
    ),
    "pt2: no model": Hostile(
        "pt2", lambda folder, good: write_zip(folder / "model.pt2", [Member("m/version", b"1")]), "it has no models/"
    ),
    "pt2: model that is a list": Hostile("pt2", exported_file("models/model.json", b"[]"), "not a table"),
    "pt2: name that is a number": Hostile("pt2", first_node(name=7), "not a string"),
    "pt2: arguments that are a number": Hostile(
        "pt2",
        exported(lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=7)), "invalid in_spec",
    ),
    "pt2: no ranges": Hostile("pt2", exported(lambda v: v.pop("range_constraints")), "no table 'range_constraints'"),
    "pt2: table of weights that is none": Hostile(
        "pt2", exported_file("model_weights_config.json", b'{"config": {"w": 7}}'), "invalid entry 'w'"
    ),
    "pt2: weights without sizes": Hostile("pt2", weights_config(lambda v: v.pop("tensor_meta")), "no plain sizes"),
    "pt2: weights of a broken width": Hostile("pt2", exported_file("weights/weight_0", bytes(143)), "not a whole number"),
    "pt2: sample inputs with code": Hostile(
        "pt2", exported_file("sample_inputs/model.pt", pickle.dumps(Code(), protocol=2)), "names 'posix.mkdir'"
    ),
    "pt2: archive of sample inputs with code": Hostile(
        "pt2",
        lambda folder, good: exported_file(
            "sample_inputs/model.pt", checkpoint(call("os.mkdir"))(folder, good).read_bytes()
        )(folder, good),
        "names 'os.mkdir'",
    ),
    "pt2: weights as a pickle": Hostile("pt2", weights_config(lambda v: v.update(use_pickle=True)), "as a pickle"),
    "pt2: weights beyond their file": Hostile(
        "pt2", weights_config(lambda v: v["tensor_meta"].update(sizes=[{"as_int": 2**40}])), "elements"
    ),
    "pt2: weights elsewhere": Hostile("pt2", weights_config(lambda v: v.update(path_name="../x")), "has no data"),
    "pt2: native library": Hostile("pt2", exported_more("data/aotinductor/model/x.so", b"\x7fELF"), "not part of"),
    "pt2: pickled constant": Hostile("pt2", exported_more("data/constants/opaque_obj_0", b"cos\nsystem\n."), "not part of"),
    "pt2: NaN in its JSON": Hostile("pt2", exported(lambda v: v.update(schema_version={"major": float("nan")})), "NaN"),
    "pt2: container of a custom class": Hostile(
        "pt2",
        exported(lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec='[1, {"type": "os.path", "context": null, "children_spec": []}]')),
        "container of the kind 'os.path'",
    ),
    "pt2: object of a custom class": Hostile(
        "pt2", first_node(inputs=[{"name": "x", "arg": {"as_custom_obj": {"name": "a", "class_fqn": "os"}}, "kind": 1}]),
        "object of a custom class",
    ),
}  # fmt: skip
