"""Imports go down only, packages of one floor do not import each other, files and functions have a largest length.

The measuring code in benchmarks/ may import every unit of bnexport, and none of them imports it.

The checker reads the source with ast, so imports inside functions and under TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support import architecture_picture

ROOT = Path(__file__).parents[2]
MAX_LINES = 600
MAX_FUNCTION_LINES = 60

#: From the top to the ground. A unit is a package or a module directly inside bnexport.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("onnx_pipeline",),
    ("pipeline",),
    ("reporting",),
    ("auditing", "evaluating", "benchmarking"),
    ("verification", "serving", "deploying"),
    ("training", "folding", "exporting", "runtimes", "quantization"),
    ("loading", "onnx_files"),
    ("nn", "data"),
)
#: Floor 0 has an order, from top to bottom; each may import those after it.
GROUND = (
    "tuned",
    "bundle",
    "tensor_proto",
    "proto_messages",
    "validation",
    "protobuf_wire",
    "reproducibility",
    "environment",
    "plain_table",
    "tensors",
    "files",
    "interrupts",
    "optional",
    "request_fields",
    "progress",
    "errors",
)
#: The door and ``python -m`` may import anything; the door's lazy imports would make every unit depend on every other.
DOORS = ("__init__", "__main__")

HEIGHT = {unit: len(FLOORS) - index for index, floor in enumerate(FLOORS) for unit in floor}
DEPTH = {unit: index for index, unit in enumerate(GROUND)}


def unit_of(module: str) -> str:
    """'bnexport.nn.lenet' -> 'nn'; 'bnexport' itself is its door."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path: Path, module: str, within: str = "bnexport") -> list[tuple[int, str]]:
    """(line, imported module) for every import of something in ``within``, relative ones and import_module("...") too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*base, *filter(None, [node.module])])
            # ``from bnexport import folding`` names a unit, ``from bnexport.folding import fold`` a module or an object.
            found += [(node.lineno, f"{source}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            found += [
                (node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
    return [(line, name) for line, name in found if name.split(".")[0] == within]


def verdict(importer: str, imported: str) -> str | None:
    """Why unit ``importer`` may not import unit ``imported``; None when it may."""
    if importer in DOORS or importer == imported:
        return None
    for unit in (importer, imported):
        if unit not in HEIGHT and unit not in DEPTH and unit not in DOORS:
            return f"{unit} has no floor"
    if imported in DOORS:
        # The version is all that the ground and the floors may take from the door.
        return "the door is above every floor"
    if importer in DEPTH:
        return (
            None if imported in DEPTH and DEPTH[importer] < DEPTH[imported] else f"{imported} is not below {importer}"
        )
    if imported in DEPTH or HEIGHT[importer] > HEIGHT[imported]:
        return None
    return f"{imported} is {'beside' if HEIGHT[importer] == HEIGHT[imported] else 'above'} {importer}"


def names_version(name: str) -> bool:
    return name == "bnexport.__version__"


def cycle_in(graph: dict[str, set[str]]) -> list[str] | None:
    """One cycle of a directed graph as a path, or None."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for follower in sorted(graph.get(node, ())):
            if (found := visit(follower, [*path, node])) is not None:
                return found
        done.add(node)
        return None

    return next((found for node in sorted(graph) if (found := visit(node, [])) is not None), None)


def long_functions(path: Path) -> list[tuple[str, int]]:
    """(name, lines) of every function above the limit."""
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_bytes(), str(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions]
    return [(name, lines) for name, lines in lengths if lines > MAX_FUNCTION_LINES]


def problems(root: Path) -> list[str]:
    """Everything that breaks a rule below ``root``/bnexport, one sentence each."""
    found: list[str] = []
    files = sorted((root / "bnexport").rglob("*.py"))
    modules = {module_of(path, root): path for path in files}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        lines = len(path.read_bytes().splitlines())
        if lines > MAX_LINES:
            found.append(f"{module}: {lines} lines, more than {MAX_LINES}")
        found += [
            f"{module}: {name} has {lines} lines, more than {MAX_FUNCTION_LINES}"
            for name, lines in long_functions(path)
        ]
        for line, name in imports_of(path, module):
            target = name if name in modules else name.rpartition(".")[0]
            if names_version(name):
                continue
            if target in modules and module != "bnexport":
                graph.setdefault(module, set()).add(target)
            unit = unit_of(target if target in modules and target != "bnexport" else name)
            if (why := verdict(unit_of(module), unit)) is not None:
                found.append(f"{module}:{line}: imports {name}: {why}")
    if (cycle := cycle_in(graph)) is not None:
        found.append("cycle: " + " -> ".join(cycle))
    return found


def test_tree_keeps_the_rules() -> None:
    assert problems(ROOT) == []


def foreign_imports(root: Path) -> list[str]:
    """Imports, in bnexport, of code of the checkout that is not in the wheel."""
    trees = {path: ast.parse(path.read_bytes(), str(path)) for path in sorted((root / "bnexport").rglob("*.py"))}
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            words = [name for name in named if name.split(".")[0] in ("benchmarks", "tests", "scripts")]
            found += [f"{path.relative_to(root)} imports {name}" for name in words]
    return found


def chained_modes(tree: ast.Module) -> list[int]:
    """Lines that use what ``eval()`` or ``train()`` of a module returns: a network's own ``train`` may return nothing."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [
        node.lineno
        for node in calls
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("eval", "train") and id(node) not in statements
    ]


def test_nothing_uses_what_eval_and_train_return() -> None:
    files = [path for folder in ("bnexport", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert [(str(path), line) for path in files for line in chained_modes(ast.parse(path.read_bytes()))] == []
    assert chained_modes(ast.parse("net.eval()\nnet.train(False)\ny = net.eval()(x)\nreturned(net.train())")) == [3, 4]


def test_bnexport_imports_nothing_outside_the_wheel(tmp_path: Path) -> None:
    assert foreign_imports(ROOT) == []
    make_tree(tmp_path, {"nn/lenet.py": "def f():\n    from benchmarks.clock import Spread"})
    assert foreign_imports(tmp_path) == ["bnexport/nn/lenet.py imports benchmarks.clock"]


def test_the_files_of_benchmarks_are_short_and_without_cycles() -> None:
    files = {module_of(path, ROOT): path for path in sorted((ROOT / "benchmarks").rglob("*.py"))}
    assert [module for module, path in files.items() if len(path.read_bytes().splitlines()) > MAX_LINES] == []
    graph = {
        module: {name.rpartition(".")[0] for _, name in imports_of(path, module, "benchmarks")}
        for module, path in files.items()
    }
    assert graph["benchmarks.pages"] == {"benchmarks.clock"}
    assert cycle_in(graph) is None


def test_every_unit_has_a_floor() -> None:
    units = {
        path.stem for path in (ROOT / "bnexport").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert units - set(DOORS) <= set(HEIGHT) | set(DEPTH)
    assert {"errors", "nn", "reporting"} <= units, "the checker looks at the wrong folder"


def test_floors_are_the_documented_ones() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for height, floor in zip(range(len(FLOORS), 0, -1), FLOORS, strict=True):
        row = next(line for line in text.splitlines() if line.startswith(f"| {height} |"))
        assert [unit.strip(" `") for unit in row.split("|")[2].split(",")] == list(floor)
    row = next(line for line in text.splitlines() if line.startswith("| 0 |"))
    assert [unit.strip(" `") for unit in row.split("|")[2].split(">")] == list(GROUND)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("nn/lenet.py", "from bnexport.folding.fold import fold", "folding is above nn"),
        ("nn/lenet.py", "def f():\n    import bnexport.cli.main", "cli is above nn"),
        ("runtimes/base.py", "from bnexport.exporting import export_onnx", "exporting is beside runtimes"),
        ("runtimes/base.py", "from ..folding.fold import fold", "folding is beside runtimes"),
        ("runtimes/base.py", "from .. import training", "training is beside runtimes"),
        ("runtimes/base.py", "from bnexport import pipeline", "pipeline is above runtimes"),
        (
            "runtimes/base.py",
            "import importlib\nimportlib.import_module('bnexport.training')",
            "training is beside runtimes",
        ),
        (
            "runtimes/base.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bnexport.cli",
            "cli is above",
        ),
        ("data/sets.py", "from bnexport import fold", "fold has no floor"),
        ("newroom/x.py", "import bnexport.errors", "newroom has no floor"),
        ("errors.py", "from bnexport.files import sha256", "files is not below errors"),
        ("tensors.py", "def f():\n    from bnexport import bundle", "bundle is not below tensors"),
        ("environment.py", "from bnexport.nn.lenet import bn_lenet", "nn is not below environment"),
        ("nn/lenet.py", "x = 1\n" * 601, "601 lines"),
        ("nn/lenet.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
    ],
)
def test_checker_finds(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    make_tree(tmp_path, {file: source})
    found = problems(tmp_path)
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("nn/lenet.py", "from bnexport.errors import ModelError\nimport torch\nfrom bnexport.nn import batch_norm"),
        ("nn/lenet.py", "x = 1\n" * 600),
        ("nn/lenet.py", "def f():\n" + "    x = 1\n" * 59),
        ("cli/main.py", "def f():\n    from bnexport.nn.lenet import bn_lenet\n    from bnexport import __version__"),
        ("bundle.py", "from bnexport.files import sha256\nfrom bnexport.errors import BundleError"),
        ("verification/verify.py", "import bnexport.runtimes.base\nfrom bnexport.data import datasets"),
        ("__init__.py", "from bnexport.cli import main"),
        ("reporting/html.py", "from bnexport.verification.verdict import Row"),
    ],
)
def test_checker_accepts(tmp_path: Path, file: str, source: str) -> None:
    make_tree(tmp_path, {file: source})
    assert problems(tmp_path) == []


def test_checker_finds_cycles(tmp_path: Path) -> None:
    make_tree(
        tmp_path,
        {
            "folding/a.py": "from bnexport.folding import b",
            "folding/b.py": "def late():\n    from bnexport.folding.c import x",
            "folding/c.py": "from .a import y",
        },
    )
    assert problems(tmp_path) == [
        "cycle: bnexport.folding.a -> bnexport.folding.b -> bnexport.folding.c -> bnexport.folding.a"
    ]


def make_tree(root: Path, files: dict[str, str]) -> None:
    """A small bnexport with every file that the cases import, and ``files`` over it."""
    there = ("folding/fold", "exporting/export_onnx", "cli/main", "nn/lenet", "nn/batch_norm", "data/datasets")
    rest = ("runtimes/base", "verification/verdict", "training/loop", "pipeline", "errors", "files", "bundle")
    for name in ("__init__", *there, *rest):
        path = root / "bnexport" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        (path.parent / "__init__.py").touch()
    for name, source in files.items():
        path = root / "bnexport" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")


def test_the_picture_shows_the_imports() -> None:
    """``python tests/support/architecture_picture.py`` draws it again."""
    assert (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8") == architecture_picture.draw()
    assert architecture_picture.floors() == [*map(list, FLOORS), list(GROUND)]
