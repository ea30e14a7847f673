"""One contract, every runtime."""

import numpy as np
import pytest
from support.bundles import network
from support.runtimes import RUNTIMES

from bnexport.bundle import Bundle
from bnexport.errors import FeedError, UsageError
from bnexport.runtimes.catalogue import runner_spec
from bnexport.verification.reference import Reference

#: An engine may refuse an empty batch, in one sentence.
NO_EMPTY_BATCH = ("openvino-cpu",)
X = np.random.default_rng(4).random((65, 1, 28, 28), dtype=np.float32)

pytestmark = pytest.mark.parametrize("name", RUNTIMES)


def test_the_description_states_where_it_runs(bundle: Bundle, name: str) -> None:
    with runner_spec(name).open(bundle) as runner:
        runner.run({"input": X[:2]})
        assert runner.name == name
        assert runner.effective_device == ("cpu" if name.endswith("-cpu") else "cuda:0")
        assert runner.description["device"] == runner.effective_device
        assert runner.description["version"]
        assert runner.signature == bundle.manifest.signature


@pytest.mark.parametrize("size", [0, 1, 2, 7, 64, 65])
def test_every_batch_size(bundle: Bundle, name: str, size: int) -> None:
    expected = Reference(network(), bundle.manifest.signature, description="").evaluate({"input": X})["logits"]
    with runner_spec(name).open(bundle) as runner:
        if size == 0 and name in NO_EMPTY_BATCH:
            with pytest.raises(FeedError, match="at least one sample"):
                runner.run({"input": X[:0]})
            size = 1  # and it still works
        logits = runner.run({"input": X[:size]})["logits"]
    assert logits.shape == (size, 10)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected[:size], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_outputs_belong_to_the_caller(bundle: Bundle, name: str) -> None:
    feed = X[:3].copy()
    with runner_spec(name).open(bundle) as runner:
        first = runner.run({"input": feed})["logits"]
        kept = first.copy()
        first[:] = 0
        feed[:] = 7
        other = runner.run({"input": X[3:6]})["logits"]
        assert (first == 0).all()
        np.testing.assert_array_equal(runner.run({"input": X[:3]})["logits"], kept)
    assert not np.shares_memory(first, feed)
    assert not np.shares_memory(first, other)
    assert (first == 0).all()  # after the runner is closed, too
    assert first.flags.writeable


@pytest.mark.parametrize(
    "feeds",
    [
        {},
        {"image": X},
        {"input": X, "more": X},
        {"input": X.astype(np.float64)},
        {"input": (X * 255).astype(np.uint8)},
        {"input": X[:, 0]},
        {"input": X[:, :, :27]},
        {"input": X[0, 0, 0, 0]},
    ],
    ids=["nothing", "other name", "one too many", "float64", "uint8", "rank", "size", "scalar"],
)
def test_feeds_that_do_not_fit_are_refused(bundle: Bundle, name: str, feeds: dict[str, np.ndarray]) -> None:
    with runner_spec(name).open(bundle) as runner:
        with pytest.raises(FeedError):
            runner.run({key: np.asarray(value) for key, value in feeds.items()})
        assert runner.run({"input": X[:1]})["logits"].shape == (1, 10)  # and it still works


def test_strided_and_read_only_feeds_give_the_same(bundle: Bundle, name: str) -> None:
    wide = np.zeros((6, 1, 28, 56), np.float32)
    wide[..., ::2] = X[:6]
    view = wide[..., ::2]
    view.flags.writeable = False
    with runner_spec(name).open(bundle) as runner:
        np.testing.assert_array_equal(runner.run({"input": view})["logits"], runner.run({"input": X[:6]})["logits"])


def test_two_runners_at_once_and_a_closed_one(bundle: Bundle, name: str) -> None:
    with runner_spec(name).open(bundle) as one, runner_spec(name).open(bundle) as two:
        np.testing.assert_array_equal(one.run({"input": X[:2]})["logits"], two.run({"input": X[:2]})["logits"])
    with pytest.raises(UsageError):
        one.run({"input": X[:2]})


def test_nonfinite_numbers_go_in_and_come_out(bundle: Bundle, name: str) -> None:
    spoiled = X[:2].copy()
    spoiled[1, 0, 3, 3] = np.nan
    with runner_spec(name).open(bundle) as runner:
        logits = runner.run({"input": spoiled})["logits"]
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).any()
