"""The table of releases in docs/deploying.md is the one of the code."""

import re
from pathlib import Path

import pytest

from bnexport.deploying.releases import TRITON_RELEASES, release_reads

TEXT = (Path(__file__).parents[2] / "docs" / "deploying.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if re.match(r"\| \d\d\.\d\d", line)
]


def covers(cell: str, word: str) -> bool:
    """Return True if "26.02 to 26.06", "1.21, 1.22" or "1.17" contains a version."""
    first, _, last = cell.partition(" to ")
    wanted = tuple(map(int, word.split(".")))
    if last:
        return tuple(map(int, first.split("."))) <= wanted <= tuple(map(int, last.split(".")))
    return word in cell.split(", ")


@pytest.mark.parametrize("release", TRITON_RELEASES)
def test_every_release_is_in_one_row(release: str) -> None:
    (row,) = [row for row in ROWS if covers(row[0], release)]
    assert covers(row[1], TRITON_RELEASES[release].rpartition(".")[0])
    assert tuple(map(int, row[2:])) == release_reads(release)
