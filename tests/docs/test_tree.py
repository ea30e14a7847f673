"""Nothing in the tree names one machine's paths or a package registry's host, and no file is too large to commit."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Put together from parts, so that this file does not find itself.
HOSTS = tuple("".join(parts) for parts in (("py", "pi.org"), ("python", "hosted.org"), ("download.py", "torch.org")))
FOLDERS = tuple(
    "".join(parts) for parts in (("/wo", "rk/"), ("/tm", "p/w/"), ("/ro", "ot/"), ("/Us", "ers/"), ("/ho", "me/"))
)
#: Folders of the container image, which are the same everywhere.
ALLOWED = ("".join(("/ho", "me/")) + "bnexport",)
PATTERN = re.compile(rb"(?<![\w.~*-])(?:" + "|".join(map(re.escape, FOLDERS)).encode() + rb")[\w./-]*")


def findings(content: bytes) -> list[str]:
    """Hosts and paths that must not be there."""
    hosts = [host for host in HOSTS if host.encode() in content]
    paths = [match.group().decode() for match in PATTERN.finditer(content)]
    return hosts + [path for path in paths if not path.startswith(ALLOWED)]


def tree() -> list[Path]:
    """Files that are committed, or would be by adding everything."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_no_machine_paths_or_registry_hosts() -> None:
    files = tree()
    assert ROOT / "pyproject.toml" in files
    found = {str(path.relative_to(ROOT)): hits for path in files if (hits := findings(path.read_bytes()))}
    assert found == {}


def test_no_large_files() -> None:
    assert [str(path.relative_to(ROOT)) for path in tree() if path.stat().st_size >= 2_000_000] == []


@pytest.mark.parametrize("text", [*HOSTS, *(f"see {folder}someone/x.py" for folder in FOLDERS)])
def test_check_finds(text: str) -> None:
    assert findings(text.encode()) != []


@pytest.mark.parametrize("text", [f"{ALLOWED[0]}/runs", "a/wo" + "rk/b", "https://example.org/ho" + "me/"])
def test_check_accepts(text: str) -> None:
    assert findings(text.encode()) == []
