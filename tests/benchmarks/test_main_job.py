"""The side-by-side measurement of the main job runs on a small network, and its table judges the targets."""

import sys
from pathlib import Path

import pytest

from benchmarks import main_job
from benchmarks.main_job import LENET, Run, row_of

FAST, SLOW = Run(1.0, 1.0, 100.0), Run(2.5, 2.0, 200.0)


@pytest.mark.parametrize(
    ("network", "ours", "met"),
    [
        ("resnet50", FAST, True),
        ("resnet50", SLOW, False),
        ("resnet50", Run(1.0, 1.0, 300.0), False),
        (LENET, SLOW, True),
    ],
)
def test_the_row_judges_the_targets(network: str, ours: Run, met: bool) -> None:
    cells, found = row_of(network, [FAST, FAST], [ours, ours])
    assert found == met
    assert cells[-1] == ("met" if met else "missed")
    assert cells[3].startswith(f"{ours.wall:.2f} (")


@pytest.mark.slow
def test_the_command_measures_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides do their real work on a small network, in this process."""
    network = "shufflenet_v2_x0_5"

    def measure(way: str, network: str, folder: Path) -> Run:
        if way == "plain":
            main_job.run_way(way, network, str(folder))
        else:
            with pytest.raises(SystemExit) as ended:
                main_job.run_way(way, network, str(folder))
            assert ended.value.code == 0
        return FAST

    monkeypatch.setattr(main_job, "NETWORKS", {network: (3, 32, 32)})
    monkeypatch.setattr(main_job, "VERIFIED", network)
    monkeypatch.setattr(main_job, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["main_job", "--rounds", "1", "--out", str(tmp_path / "page.md")])
    assert main_job.main() == 0
    page = " ".join((tmp_path / "page.md").read_text().split())
    assert f"| {network} | 1.0 (1.0 to 1.0) |" in page
    assert f"verify` of {network} with one runtime: 1.0" in page
