import numpy as np
import pytest
import torch
from torch import nn
from unit.evaluating.conftest import TRAIN, Write, inputs, lenet

import bnexport
from bnexport.data.preprocessing import Preprocessing
from bnexport.errors import BnexportError, UsageError
from bnexport.evaluating.network import sampled_staleness, stale_warning, trained_network
from bnexport.evaluating.network_options import RecalibrationRequest
from bnexport.evaluating.recalibration import recalibrate_checkpoint
from bnexport.exporting.export_request import ExportRequest
from bnexport.loading.sources import LoadedModel
from bnexport.nn.moving_statistics import recalibrate
from bnexport.reporting.html import render_report

DIGITS = {"dataset": "digits", "preprocessing": Preprocessing().to_json()}


def trained(network: nn.Module, **facts: object) -> LoadedModel:
    return LoadedModel(network, "net", {}, **facts)


def fresh() -> nn.Module:
    network = lenet()
    recalibrate(network, [inputs(TRAIN[0])])
    return network


class Keeps(nn.Sequential):
    """Keeps its last input and draws random numbers, as a user's forward may."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x
        torch.rand(1)
        return super().forward(x)


def test_a_fresh_network_is_not_warned_of_and_a_stale_one_is() -> None:
    assert stale_warning(trained(fresh(), **DIGITS)) == ""
    warning = stale_warning(trained(lenet(), **DIGITS))
    assert warning.startswith("the moving statistics are stale on 300 training images")
    assert sampled_staleness(trained(fresh(), **DIGITS)).images == len(TRAIN[0])


def test_the_network_and_the_random_state_are_as_before() -> None:
    network = Keeps(*lenet().children())
    network.last = None
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert stale_warning(trained(network, **DIGITS)) != ""
    assert torch.equal(torch.rand(3), expected)
    assert network.last is None


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        (lenet(), {"dataset": None}),
        (lenet(), {"preprocessing": None}),
        (lenet(), {"dataset": "imagenet"}),
        (lenet(), {"preprocessing": Preprocessing(height=32, width=32).to_json()}),
        (nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), {}),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), {}),
    ],
)
def test_networks_that_can_not_be_compared_get_no_warning(network: nn.Module, changes: dict[str, object]) -> None:
    assert stale_warning(trained(network, **{**DIGITS, **changes})) == ""


def test_without_data_there_is_no_warning(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BNEXPORT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subject = trained(lenet(), dataset="fashion-mnist", preprocessing=Preprocessing().to_json())
    assert stale_warning(subject) == ""
    with pytest.raises(BnexportError, match="is missing"):
        sampled_staleness(subject)


def test_on_request_the_reason_is_reported() -> None:
    with pytest.raises(UsageError, match="training images of the network are unknown"):
        sampled_staleness(trained(lenet()))


def test_the_fold_report_holds_the_warning(write: Write, tmp_path) -> None:
    request = ExportRequest(formats=("onnx",))
    stale = bnexport.fold_and_export(str(write()), tmp_path / "models" / "stale" / "1", request=request)
    assert stale.bundle is not None, "a warning, not a refusal"
    (warning,) = stale.fold.warnings
    assert "bnexport recalibrate" in warning
    assert stale.bundle.manifest.fold["warnings"] == [warning]
    assert "the moving statistics are stale" in (stale.bundle.path / "report.html").read_text()
    page = render_report(
        stale.bundle.manifest, fold=stale.fold, verification=stale.verification, environment={}, commands=[]
    )
    assert "WARNING: the moving statistics are stale" in page
    found = sampled_staleness(trained_network(stale.bundle.path))
    assert found.sentence() == warning, "a bundle keeps the unfolded weights, so its statistics can be compared later"
    mended = recalibrate_checkpoint(write(), tmp_path / "mended.safetensors", RecalibrationRequest())
    exact = bnexport.fold_and_export(str(mended.out), tmp_path / "models" / "exact" / "1", request=request)
    assert exact.fold.warnings == ()
    assert np.isclose(exact.verification.rows[0].error or 0.0, 0.0)
