"""The wheel of bnexport: the package with its data files and nothing else, and it never looks for a checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Imports every module of an unpacked wheel, and prints the paths of a checkout that it tries to open or list.
IMPORT_ALL = """
import contextlib, pkgutil, sys
from pathlib import Path

root = Path(sys.argv[1]).resolve()
CHECKOUT = set(sys.argv[2:])
opened = set()

def watch(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "glob.glob") and arguments and isinstance(arguments[0], str):
        path = Path(arguments[0]).absolute()
        if root in path.parents and path.relative_to(root).parts[0] in CHECKOUT:
            opened.add(str(path.relative_to(root)))

sys.path.insert(0, str(root))
sys.addaudithook(watch)
import bnexport
from bnexport.errors import MissingDependency

count = 0
for module in pkgutil.walk_packages(bnexport.__path__, "bnexport."):
    if not module.name.endswith("__main__"):
        with contextlib.suppress(ImportError, MissingDependency):
            count += bool(__import__(module.name))
print(Path(bnexport.__file__).parent, count > 200, sorted(opened))
"""


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked wheel, built by pip, which needs the build backend or a package index."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_has_the_package_with_its_data_files_and_nothing_else(unpacked: Path) -> None:
    packed = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    described = {name for name in packed if name.split("/")[0].endswith(".dist-info")}
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bnexport").rglob("*") if path.is_file()}
    assert packed - described == {name for name in there if "__pycache__" not in name}
    assert "bnexport/py.typed" in packed
    assert {Path(name).suffix for name in packed - described} >= {".py", ".jinja", ".html", ".json"}
    for folder in (path for path in (ROOT / "bnexport").rglob("*") if any(path.glob("*.py"))):
        assert f"{folder.relative_to(ROOT).as_posix()}/__init__.py" in packed


@pytest.mark.slow
def test_no_module_of_the_wheel_looks_for_a_checkout(unpacked: Path, tmp_path: Path) -> None:
    checkout = [path.name for path in ROOT.iterdir() if path.name != "bnexport"]
    assert {"docs", "models", "scripts", "benchmarks"} <= set(checkout)
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT_ALL, str(unpacked), *checkout],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    assert done.stdout == f"{unpacked / 'bnexport'} True []\n", done.stdout + done.stderr
