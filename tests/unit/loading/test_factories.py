"""Factories: a user's own code that makes the network, and all the ways in which it fails."""

import sys

import pytest
from torch import nn
from weights_files import SMALL, message

from bnexport.loading.sources import load_source


def test_a_factory_gives_the_network_in_eval_mode(factory):
    loaded = load_source(f"{factory}:make")
    assert [type(layer) for layer in loaded.module] == [nn.Linear, nn.BatchNorm1d]
    assert not any(module.training for module in loaded.module.modules())
    assert (loaded.name, loaded.network) == ("make", {"source": f"{factory}:make", "options": {}})
    assert (loaded.input_shape, loaded.labels, loaded.preprocessing) == (None, None, None)


def test_a_network_in_eval_mode_keeps_layers_in_training_mode(factory):
    factory.write_text(SMALL + "\ndef mixed():\n    m = make().eval()\n    m[1].train()\n    return m\n")
    assert [layer.training for layer in load_source(f"{factory}:mixed").module] == [False, True]


def test_a_class_is_a_factory_too(factory):
    factory.write_text("from torch import nn\nclass Net(nn.Linear):\n    def __init__(self): super().__init__(2, 3)\n")
    assert load_source(f"{factory}:Net").module.weight.shape == (3, 2)


def test_a_package_s_factory(tmp_path, monkeypatch):
    (tmp_path / "bnexport_example_package").mkdir()
    (tmp_path / "bnexport_example_package" / "net.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert isinstance(load_source("bnexport_example_package.net:make").module, nn.Sequential)
    assert sys.path == before
    assert "can't be imported: ModuleNotFoundError" in message("bnexport_no_such_package:make")


FACTORIES = {
    "syntax error": ("x = 1\ndef make(:\n", "net.py can't be run at line 2: SyntaxError"),
    "raising at import": ("x = 1\n\nraise KeyError('a b')\n", "net.py can't be run at line 3: KeyError: 'a b'"),
    "leaving at import": ("import sys\nsys.exit(7)\n", "net.py can't be run at line 2: SystemExit: 7"),
    "missing function": ("def other(): pass\n", "net.py has no function 'make'"),
    "not a function": ("make = 3\n", "net.py has no function 'make'"),
    "raising": ("def make():\n    x = 1\n    return 1 / 0\n", "make failed at line 3: ZeroDivisionError"),
    "leaving": ("import sys\ndef make():\n    sys.exit(0)\n", "make failed at line 3: SystemExit: 0"),
    "arguments": ("def make(n): pass\n", "make failed: TypeError: make() missing 1 required"),
    "no module": ("def make(): return 3\n", "make returned a int, not a torch.nn.Module"),
    "class itself": ("from torch import nn\ndef make(): return nn.ReLU\n", "make returned a type"),
    "lines": ("def make(): raise ValueError('a\\nb')\n", "ValueError: a b"),
}


@pytest.mark.parametrize("kind", FACTORIES)
@pytest.mark.parametrize("prefix", ["", "./", "../here/"])
def test_a_factory_that_fails(tmp_path, monkeypatch, kind, prefix):
    code, expected = FACTORIES[kind]
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "net.py").write_text(code)
    monkeypatch.chdir(tmp_path / "here")
    before = list(sys.path)
    assert expected in message(f"{prefix}net.py:make")
    assert sys.path == before


def test_a_module_that_leaves_at_import(tmp_path, monkeypatch):
    (tmp_path / "bnexport_leaving_example.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    assert "can't be imported: SystemExit" in message("bnexport_leaving_example:make")


def test_ctrl_c_in_a_factory_passes(factory):
    factory.write_text("def make(): raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_source(f"{factory}:make")


def test_a_factory_file_that_is_not_there(tmp_path):
    assert message(f"{tmp_path}/nowhere.py:make") == f"{tmp_path}/nowhere.py does not exist"


@pytest.mark.parametrize("late", [False, True])
def test_a_factory_file_may_import_its_neighbours(tmp_path, monkeypatch, late):
    name = f"bnexport_neighbour_{late}"
    (tmp_path / f"{name}.py").write_text("WIDTH = 5\n")
    imports = f"from {name} import WIDTH"
    where = ("", f"    {imports}\n") if late else (imports, "")
    (tmp_path / "net.py").write_text(
        f"from torch import nn\n{where[0]}\ndef make():\n{where[1]}    return nn.ReLU6()\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = list(sys.path)
    assert isinstance(load_source("../net.py:make").module, nn.ReLU6)
    assert sys.path == before


def test_a_factory_file_may_extend_the_path(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "net.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path / 'lib')!r})\n{SMALL}")
    before = list(sys.path)
    monkeypatch.setattr(sys, "path", list(before))
    load_source(f"{tmp_path}/net.py:make")
    assert sys.path == [str(tmp_path / "lib"), *before]


def test_two_files_of_one_name_do_not_mix(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "net.py").write_text(
            f"from torch import nn\ndef make(): return nn.Linear({number}, 1)\n"
        )
    assert [load_source(f"{tmp_path}/{n}/net.py:make").module.in_features for n in (1, 2)] == [1, 2]
