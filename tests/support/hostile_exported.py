"""Hostile files of torch.export."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.hostile import Good, Member, hostile, members_of, replaced, write_zip
from support.hostile_archives import Code, call, checkpoint

Change = Callable[[dict[str, Any]], object]


def json_changed(ending: str, change: Change) -> Callable[[Path, Good], Path]:
    """A .pt2 file in which one JSON file was changed."""

    def build(folder: Path, good: Good) -> Path:
        members = members_of(good.exported)
        value = json.loads(next(member.data for member in members if member.name.endswith(ending)))
        change(value)
        return write_zip(folder / "model.pt2", replaced(members, ending, json.dumps(value).encode()))

    return build


def exported(change: Change) -> Callable[[Path, Good], Path]:
    return json_changed("models/model.json", change)


def call_graph(**changes: Any) -> Callable[[Path, Good], Path]:
    return exported(lambda value: value["graph_module"]["module_call_graph"][0]["signature"].update(changes))


def exported_file(ending: str, data: bytes) -> Callable[[Path, Good], Path]:
    return lambda folder, good: write_zip(folder / "model.pt2", replaced(members_of(good.exported), ending, data))


def exported_more(name: str, data: bytes) -> Callable[[Path, Good], Path]:
    def build(folder: Path, good: Good) -> Path:
        members = members_of(good.exported)
        root = members[0].name.partition("/")[0]
        return write_zip(folder / "model.pt2", [*members, Member(f"{root}/{name}", data)])

    return build


def weights_config(change: Change) -> Callable[[Path, Good], Path]:
    return json_changed("model_weights_config.json", lambda value: change(next(iter(value["config"].values()))))


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


PT2 = hostile("pt2", {
    "pt2: operator by its path": (first_node(target="torch.serialization.os.system"), "not an operator"),
    "pt2: hub": (first_node(target="torch.hub.load"), "not an operator"),
    "pt2: attribute of the operator module": (first_node(target="_operator.attrgetter"), "not an operator"),
    "pt2: operator that writes a file": (first_node(target="torch.ops.aten.from_file.default"), "not an operator"),
    "pt2: operator of others": (first_node(target="torch.ops.evil.run.default"), "not an operator"),
    "pt2: extension": (first_node(target="#evil:run"), "not an operator"),
    "pt2: size that is code": (symbol("__import__('os').mkdir('hacked')"), "where a size is expected"),
    "pt2: size that is code in a symbol": (symbol("Symbol(__import__('os').mkdir('hacked'))"), "where a size is expected"),
    "pt2: size with an attribute": (symbol("(1).__class__"), "where a size is expected"),
    "pt2: tower of powers": (symbol("9**9**9**9"), "where a size is expected"),
    "pt2: tower of powers in sympy's words": (
        symbol("Pow(Integer(9), Pow(Integer(9), Integer(9)))"), "where a size is expected",
    ),
    "pt2: size that is a program": (symbol("lambda: 0"), "where a size is expected"),
    "pt2: size of 100 kB": (symbol("(" * 50_000 + "1" + ")" * 50_000), "longer than"),
    "pt2: size nested deep": (symbol("-" * 4000 + "1"), "where a size is expected"),
    "pt2: symbol with a huge number": (
        exported(lambda v: v["range_constraints"].update({"u99999999999": {"min_val": 0, "max_val": 9}})), "invalid name",
    ),
    "pt2: guard that is code": (exported(lambda v: v.update(guards_code=["__import__('os')"])), "condition on sizes"),
    "pt2: guard that is code of torch": (
        exported(lambda v: v.update(guards_code=["torch.hub.load('a', 'b')"])), "condition on sizes",
    ),
    "pt2: guard that hides code": (
        exported(lambda v: v.update(guards_code=["torch.sym_max(L['x'].__class__, 1) > 0"])), "condition on sizes",
    ),
    "pt2: name that is code": (first_node(name="x=__import__('os').mkdir('hacked')"), "not a plain word"),
    "pt2: name of an argument that is code": (
        call_graph(forward_arg_names=["x=__import__('os').mkdir('hacked')"]), "not a plain word",
    ),
    "pt2: key of an argument that is code": (
        call_graph(in_spec=json.dumps([1, {"type": "builtins.dict", "context": '["x=open(1)"]', "children_spec": []}])),
        "not a plain word",
    ),
    "pt2: name of a parameter that is code": (
        exported(lambda v: v["graph_module"]["signature"]["input_specs"][0]["parameter"].update(parameter_name='"]+x["')),
        "not a plain word",
    ),
    "pt2: no model": (lambda folder, good: write_zip(folder / "model.pt2", [Member("m/version", b"1")]), "it has no models/"),
    "pt2: model that is a list": (exported_file("models/model.json", b"[]"), "not a table"),
    "pt2: name that is a number": (first_node(name=7), "not a string"),
    "pt2: arguments that are a number": (call_graph(in_spec=7), "invalid in_spec"),
    "pt2: no ranges": (exported(lambda v: v.pop("range_constraints")), "no table 'range_constraints'"),
    "pt2: table of weights that is none": (
        exported_file("model_weights_config.json", b'{"config": {"w": 7}}'), "invalid entry 'w'",
    ),
    "pt2: weights without sizes": (weights_config(lambda v: v.pop("tensor_meta")), "no plain sizes"),
    "pt2: weights of a broken width": (exported_file("weights/weight_0", bytes(143)), "not a whole number"),
    "pt2: sample inputs with code": (
        exported_file("sample_inputs/model.pt", pickle.dumps(Code(), protocol=2)), "names 'posix.mkdir'",
    ),
    "pt2: archive of sample inputs with code": (
        lambda folder, good: exported_file(
            "sample_inputs/model.pt", checkpoint(call("os.mkdir"))(folder, good).read_bytes()
        )(folder, good),
        "names 'os.mkdir'",
    ),
    "pt2: weights as a pickle": (weights_config(lambda v: v.update(use_pickle=True)), "as a pickle"),
    "pt2: weights beyond their file": (
        weights_config(lambda v: v["tensor_meta"].update(sizes=[{"as_int": 2**40}])), "elements",
    ),
    "pt2: weights elsewhere": (weights_config(lambda v: v.update(path_name="../x")), "has no data"),
    "pt2: native library": (exported_more("data/aotinductor/model/x.so", b"\x7fELF"), "not part of"),
    "pt2: pickled constant": (exported_more("data/constants/opaque_obj_0", b"cos\nsystem\n."), "not part of"),
    "pt2: NaN in its JSON": (exported(lambda v: v.update(schema_version={"major": float("nan")})), "NaN"),
    "pt2: container of a custom class": (
        call_graph(in_spec='[1, {"type": "os.path", "context": null, "children_spec": []}]'), "container of the kind 'os.path'",
    ),
    "pt2: object of a custom class": (
        first_node(inputs=[{"name": "x", "arg": {"as_custom_obj": {"name": "a", "class_fqn": "os"}}, "kind": 1}]),
        "object of a custom class",
    ),
})  # fmt: skip
