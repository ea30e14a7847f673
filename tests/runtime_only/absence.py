"""A program: commands of bnexport in a Python that has only some of the installed packages.

Use: python absence.py NAME,NAME,... '[["verify", "BUNDLE"], ...]'. Every other package outside the standard library is
hidden as if it had never been installed. Prints one JSON object: exit code and output of each command, and loaded packages.
"""

import contextlib
import io
import json
import sys
import sysconfig
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

#: Packages that pip installs with numpy, onnxruntime, click and rich.
SERVING = (
    "numpy", "onnxruntime", "click", "rich", "markdown_it", "mdurl", "pygments", "flatbuffers", "google", "packaging",
)  # fmt: skip
#: These, and the packages that pip installs with onnx.
WITH_ONNX = (*SERVING, "onnx", "ml_dtypes", "typing_extensions")
#: Packages that must not be loaded there.
HEAVY = {
    "torch", "torchvision", "onnx", "onnxscript", "onnx_ir", "safetensors", "matplotlib", "jinja2", "PIL", "platformdirs",
}  # fmt: skip
#: A committed bundle, whose figures at export are real.
REFERENCE = Path(__file__).parents[2] / "models" / "bn_lenet" / "1"


class OnlySome:
    """A finder of packages on sys.path that finds only a few of those in site-packages.

    It replaces Python's own finder, so that ``importlib.util.find_spec`` finds nothing either. A finder that raises would
    differ from an absent package for code that calls ``find_spec`` first.
    """

    def __init__(self, allowed: set[str]) -> None:
        self._allowed = allowed
        self._hidden = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target)  # type: ignore[arg-type]
        if spec is None or name.partition(".")[0] in self._allowed:
            return spec
        places = [Path(place) for place in (spec.origin, *(spec.submodule_search_locations or ())) if place]
        return None if any(place.is_relative_to(folder) for place in places for folder in self._hidden) else spec

    def invalidate_caches(self) -> None:
        PathFinder.invalidate_caches()


def hide_all_but(allowed: set[str]) -> None:
    sys.meta_path[:] = [OnlySome(allowed) if finder is PathFinder else finder for finder in sys.meta_path]


def run_all(commands: list[list[str]]) -> list[dict[str, object]]:
    from bnexport.cli.main import run

    results: list[dict[str, object]] = []
    for words in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run(words)
            except SystemExit as leaving:  # --help of a command
                code = int(leaving.code or 0)
        results.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
    return results


if __name__ == "__main__":
    names = set(sys.argv[1].split(","))
    hide_all_but(names)
    found = run_all(json.loads(sys.argv[2]))
    loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
    print(json.dumps({"results": found, "loaded": sorted(loaded)}))
