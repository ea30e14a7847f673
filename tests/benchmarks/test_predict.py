"""The comparison of bnexport predict with a bare loop: a short run and its table."""

from pathlib import Path

import numpy as np
import pytest
from support.bundles import write_bundle

from benchmarks.predict import side_by_side
from bnexport.data.datasets import load_dataset


def test_the_measured_table(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", load_dataset("digits").test_images[:90])
    bundle = write_bundle(tmp_path / "bundle")
    head, _, bare, ours, share, *rest = side_by_side(bundle, tmp_path / "a.npy", workers=2, repeats=1).splitlines()
    rate, cpu = ([float(row.split("|")[column].split()[0]) for row in (bare, ours, share)] for column in (2, 3))
    assert head.count("|") == share.count("|") == 4
    assert rate[2] == pytest.approx(rate[1] / rate[0], abs=0.3)
    assert cpu[2] == pytest.approx(cpu[0] / cpu[1], rel=0.02)
    assert cpu[0] > 1000, "the processes are counted: 90 images bear their start"
    assert "n = 1 pairs of 90 images, 2 workers" in " ".join(rest)
