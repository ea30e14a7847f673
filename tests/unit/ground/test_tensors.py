import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bnexport.errors import FeedError
from bnexport.tensors import DTYPES, Signature, TensorSpec, check_feeds

IMAGE = TensorSpec("image", "float32", ("batch", 1, 4, "width"), {"width": 5})
TOKENS = TensorSpec("tokens", "int64", ("batch", 3))
SIGNATURE = Signature((IMAGE, TOKENS), (TensorSpec("logits", "float32", ("batch", 10)),))

dims = st.one_of(st.integers(0, 4), st.sampled_from(["batch", "n", "width"]))
limits = st.dictionaries(st.sampled_from(["n", "width"]), st.integers(1, 3))
specs = st.builds(
    lambda name, dtype, shape, least: TensorSpec(
        name, dtype, shape, {dim: size for dim, size in least.items() if dim in shape}
    ),
    st.text("aé \n", max_size=3), st.sampled_from(DTYPES), st.lists(dims, max_size=4).map(tuple), limits,
)  # fmt: skip


def feeds(**changes):
    right = {"image": np.zeros((2, 1, 4, 5), np.float32), "tokens": np.zeros((2, 3), np.int64)}
    return {name: value for name, value in {**right, **changes}.items() if value is not None}


def test_right_feeds_pass():
    check_feeds(SIGNATURE, feeds())
    check_feeds(SIGNATURE, feeds(image=np.zeros((0, 1, 4, 5), np.float32), tokens=np.zeros((0, 3), np.int64)))
    check_feeds(SIGNATURE, feeds(image=np.zeros((2, 1, 4, 10), np.float32)[..., ::2]))  # layout is the runner's matter


WRONG = {
    "missing": ({"tokens": None}, "the input 'tokens' is missing"),
    "unknown": ({"extra": np.zeros(1)}, "there is no input 'extra'"),
    "element type": ({"image": np.zeros((2, 1, 4, 5))}, "input 'image' is float64, expected float32"),
    "integer type": ({"tokens": np.zeros((2, 3), np.int32)}, "input 'tokens' is int32, expected int64"),
    "byte order": ({"image": np.zeros((2, 1, 4, 5), ">f4")}, "input 'image' is >f4, expected float32"),
    "objects": ({"tokens": np.full((2, 3), None)}, "input 'tokens' is object, expected int64"),
    "size": (
        {"image": np.zeros((2, 3, 4, 5), np.float32)},
        "input 'image' has shape 2x3x4x5, expected batchx1x4xwidth",
    ),
    "rank": ({"tokens": np.zeros(3, np.int64)}, "input 'tokens' has shape 3, expected batchx3"),
    "scalar": ({"tokens": np.array(3, np.int64)}, "input 'tokens' has shape scalar, expected batchx3"),
    "list": ({"tokens": [[1, 2, 3]]}, "input 'tokens' is a list, expected a numpy array"),
    "small": ({"image": np.zeros((2, 1, 4, 4), np.float32)}, "input 'image' has width = 4, the model needs at least 5"),
    "unequal batch": (
        {"tokens": np.zeros((3, 3), np.int64)},
        "input 'tokens' has batch = 3, but another input has batch = 2",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_feeds_are_refused_by_name(name):
    changes, message = WRONG[name]
    with pytest.raises(FeedError) as caught:
        check_feeds(SIGNATURE, feeds(**changes))
    assert caught.value.message == message
    assert caught.value.remedy


def test_a_name_used_twice_in_one_shape_is_one_size():
    square = Signature((TensorSpec("x", "float32", ("n", "n")),), ())
    check_feeds(square, {"x": np.zeros((3, 3), np.float32)})
    with pytest.raises(FeedError, match="n = 4"):
        check_feeds(square, {"x": np.zeros((3, 4), np.float32)})


def test_an_unknown_element_type_is_refused():
    with pytest.raises(FeedError, match="'x' has the unknown element type 'complex64'"):
        TensorSpec("x", "complex64", (1,))


@given(st.lists(specs, max_size=3), st.lists(specs, max_size=3))
def test_json_round_trip(inputs, outputs):
    signature = Signature(tuple(inputs), tuple(outputs))
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature


@given(st.data())
def test_an_array_fits_when_its_type_rank_and_sizes_do(data):
    spec = TensorSpec("x", "float32", tuple(data.draw(st.lists(dims, max_size=3))), data.draw(limits))
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
    array = data.draw(arrays(data.draw(st.sampled_from([np.float32, np.float64])), shape, fill=st.just(0)))
    sizes: dict[str, set[int]] = {}
    if len(shape) == len(spec.shape):
        for want, have in zip(spec.shape, shape, strict=True):
            sizes.setdefault(str(want), set()).add(have)
    fits = len(shape) == len(spec.shape) and all(
        have == want if isinstance(want, int) else have >= spec.smallest.get(want, 0)
        for want, have in zip(spec.shape, shape, strict=True)
    )
    assert (spec.problem(array) is None) == (fits and array.dtype == np.float32)
    named = {want: have for want, have in sizes.items() if not want.isdigit()}
    accepted = spec.problem(array) is None and all(len(have) == 1 for have in named.values())
    try:
        check_feeds(Signature((spec,), ()), {"x": array})
    except FeedError:
        assert not accepted
    else:
        assert accepted


def test_sample_shape():
    assert IMAGE.sample_shape == (1, 4, "width")
