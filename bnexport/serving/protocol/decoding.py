"""Decodes requests: from bytes or JSON to arrays that fit a model."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from bnexport.errors import FeedError, RequestError
from bnexport.optional import one_line
from bnexport.serving.protocol.messages import DATATYPES, InferRequest, RequestedOutput, all_finite
from bnexport.serving.serving_limits import BoundedCache, ServingLimits, above_limit
from bnexport.tensors import Array, Signature, TensorSpec, check_feeds
from bnexport.validation.limits import shown

#: Kind of numpy's element type -> Python types of JSON's values. (True is an int in Python, but not a number in JSON.)
_VALUES: dict[str, set[type]] = {"f": {int, float}, "i": {int}, "u": {int}, "b": {bool}}
_WORDS = {"f": "numbers", "i": "whole numbers", "u": "whole numbers", "b": "true and false"}


def array_from_json(data: Any, spec: TensorSpec, shape: tuple[int, ...], *, booleans: bool = True) -> Array:
    """Convert JSON's data to an array; ``booleans``: they may contain true or false."""
    if type(data) is not list:
        raise RequestError(f"the data of input {spec.name!r} is not a list", remedy="Send a list of values")
    count = math.prod(shape)
    flat = data if len(data) == count and (not data or type(data[0]) is not list) else _flattened(data, spec, shape)
    kind = np.dtype(spec.dtype).kind
    known = kind == "f" and not booleans  # packing refuses everything but numbers
    if not known and not set(map(type, flat)) <= _VALUES[kind]:
        raise _other_values(spec, kind)
    try:
        with np.errstate(over="ignore"):  # check_finite refuses infinity
            array: Array = _packed(flat).astype(spec.dtype) if known else np.array(flat, spec.dtype)
            array = array.reshape(shape)
    except struct.error as error:
        raise _other_values(spec, kind) from error
    except OverflowError as error:
        raise RequestError(
            f"the data of input {spec.name!r} contains a number outside the range of {spec.dtype}",
            remedy="Send smaller numbers",
        ) from error
    check_finite(array, spec.name)
    return array


def _packed(numbers: list[Any]) -> Array:
    """Return numbers as float64, in a third of ``np.array``'s time; other values raise ``struct.error``."""
    return np.frombuffer(struct.pack(f"{len(numbers)}d", *numbers), np.float64)


def _other_values(spec: TensorSpec, kind: str) -> RequestError:
    return RequestError(
        f"the data of input {spec.name!r} contains other values than {_WORDS[kind]}", remedy=f"Send only {_WORDS[kind]}"
    )


def _flattened(data: list[Any], spec: TensorSpec, shape: tuple[int, ...]) -> list[Any]:
    """Return the values of nested lists, whose lengths must be those of the shape."""
    level: list[Any] = [data]
    for size in shape:
        if any(type(item) is not list or len(item) != size for item in level):
            raise RequestError(
                f"the data of input {spec.name!r} does not have the shape {'x'.join(map(str, shape))}",
                remedy="Send as many values as the shape has elements, flat or as lists of lists",
            )
        level = list(itertools.chain.from_iterable(level))
    return level


def check_finite(array: Array, name: str) -> None:
    """Refuse NaN and infinity."""
    if not all_finite(array):
        raise RequestError(f"the data of input {name!r} contains NaN or infinity", remedy="Send finite numbers")


def checked_flags(array: Array, name: str) -> Array:
    """Return bytes as booleans; refuse others than 0 and 1."""
    if array.size and array.max() > 1:
        raise RequestError(f"the data of input {name!r} contains a byte that is neither 0 nor 1", remedy="Send 0 or 1")
    return array.view(np.bool_)


#: Bytes of the longest cached header: clients repeat the same short header.
SHORT = 2048
#: numpy's element type -> element type of its bytes.
_STORED = {name: np.dtype("uint8" if name == "bool" else name) for name in DATATYPES}
_SHAPES = "The model's metadata (v2/models/NAME) has names, shapes and datatypes"


@dataclass(frozen=True, slots=True)
class _Input:
    """The description of one input."""

    spec: TensorSpec
    shape: tuple[int, ...]
    count: int  # Elements in the binary part
    size: int  # Bytes in the binary part
    data: Any  # JSON's data; None for data in the binary part


@dataclass(frozen=True, slots=True)
class _RequestPlan:
    """The parsed description of a request."""

    inputs: tuple[_Input, ...]
    request: InferRequest  # The request without its inputs
    binary_bytes: int


class Decoder:
    """Decodes the requests to one model within the limits. The first named dimension is the batch."""

    def __init__(self, signature: Signature, limits: ServingLimits) -> None:
        self.signature = signature
        self._limits = limits
        self._specs = {spec.name: spec for spec in signature.inputs}
        self._outputs = {spec.name: spec for spec in signature.outputs}
        firsts = [spec.shape[0] for spec in signature.inputs if spec.shape]
        self._batch = next((dim for dim in firsts if isinstance(dim, str)), None)
        self._fixed_rows = next((dim for dim in firsts if isinstance(dim, int)), 1)
        # Keys are JSON or protobuf; no JSON object begins like a protobuf message.
        self._plans: BoundedCache[bytes, _RequestPlan] = BoundedCache(256)

    def decode(self, body: bytes, header_length: int | None = None) -> InferRequest:
        """Decode a request of JSON, of JSON and binary tensors (``header_length`` bytes of JSON), or of raw data (0)."""
        if header_length == 0:
            return self._raw(body)
        if header_length is None:
            if len(body) > self._limits.json_bytes:
                fact = f"the JSON has {len(body)} bytes"
                raise above_limit(fact, self._limits.json_bytes, remedy="Send the tensors in binary")
            plan, start = self._planned(load_json(body, brackets=self._limits.brackets)), len(body)
        else:
            if header_length > len(body) or header_length > self._limits.header_json_bytes:
                raise RequestError(
                    f"Inference-Header-Content-Length is {header_length}, but the body has {len(body)} bytes",
                    remedy=f"Give the length of the JSON before the tensors, at most {self._limits.header_json_bytes}",
                )
            header, start = body[:header_length], header_length
            cached = self._plans.get(header)
            plan = cached or self._remember(header, load_json(header, brackets=self._limits.brackets))
        if len(body) - start != plan.binary_bytes:
            raise RequestError(
                f"{len(body) - start} bytes follow the JSON, but the sum of binary_data_size is {plan.binary_bytes}",
                remedy="Send exactly the bytes of each tensor, in the order of the inputs",
            )
        arrays = {}
        for item in plan.inputs:
            if item.data is None:
                arrays[item.spec.name] = _from_bytes(body, start, item)
                start += item.size
            else:
                arrays[item.spec.name] = array_from_json(
                    item.data, item.spec, item.shape, booleans=_may_hold_booleans(body)
                )
        return self._request(plan, arrays, plan.request.id, plan.request.timeout)

    def decode_parts(
        self,
        body: bytes,
        spans: Sequence[tuple[int, int]],
        *,
        describe: Callable[[], Mapping[str, Any]],
        key: bytes,
        request_id: str,
        patience: float | None,
    ) -> InferRequest:
        """Decode a request with binary tensors of a protocol without JSON; ``spans`` has start and size of each in ``body``.

        ``describe`` returns the description of the request in the form of the protocol's JSON. ``key`` determines the
        description; b"" if it must not be cached. The client waits for ``patience`` seconds.
        """
        plan = self._plans.get(key)
        if plan is None or [item.size for item in plan.inputs] != [size for _, size in spans]:
            plan = self._remember(key, describe())
        arrays = {
            item.spec.name: _from_bytes(body, start, item) for item, (start, _) in zip(plan.inputs, spans, strict=True)
        }
        timeouts = [seconds for seconds in (plan.request.timeout, patience) if seconds is not None]
        return self._request(plan, arrays, _id({"id": request_id}), min(timeouts, default=None))

    def check_count(self, count: int) -> None:
        """Refuse more inputs than the model has, before they are parsed."""
        if count > len(self._specs):
            raise RequestError(
                f"the request has {count} inputs, but the model takes {len(self._specs)}", remedy=_SHAPES
            )

    def _request(
        self, plan: _RequestPlan, arrays: dict[str, Array], request_id: str, timeout: float | None
    ) -> InferRequest:
        if len(arrays) > 1:  # named dimensions must have one size in all inputs
            try:
                check_feeds(self.signature, arrays)
            except FeedError as error:
                raise RequestError(error.message, remedy=error.remedy) from error
        return InferRequest(arrays, plan.request.rows, plan.request.outputs, request_id, timeout)

    def _remember(self, key: bytes, description: object) -> _RequestPlan:
        """Return the plan of a description; cache it if it contains no data and its key is short."""
        plan = self._planned(description)
        if 0 < len(key) <= SHORT and all(item.data is None for item in plan.inputs):
            self._plans[key] = plan
        return plan

    def _raw(self, body: bytes) -> InferRequest:
        """Decode the data of the one input; the batch follows from the size (Triton, "Raw Binary Request")."""
        spec = self.signature.inputs[0]
        sizes = [dim for dim in spec.shape[1:] if isinstance(dim, int)]
        if len(self._specs) != 1 or len(sizes) != len(spec.shape) - 1 or isinstance(spec.shape[0], int):
            raise RequestError(
                "this model takes no raw binary requests: the number of bytes does not determine its shape",
                remedy="Send JSON with the shapes before the bytes",
            )
        row = math.prod(sizes) * np.dtype(spec.dtype).itemsize
        if not body or len(body) % row:
            raise RequestError(
                f"the body has {len(body)} bytes, but one sample of {spec.name!r} has {row}",
                remedy="Send whole samples",
            )
        shape = (len(body) // row, *sizes)
        item = _Input(spec, self._checked_shape(spec, list(shape)), math.prod(shape), len(body), None)
        return InferRequest({spec.name: _from_bytes(body, 0, item)}, shape[0], self._wanted(None, binary=True))

    def _planned(self, value: object) -> _RequestPlan:
        if not isinstance(value, dict):
            raise RequestError("the request is not a JSON object", remedy='Send {"inputs": [...]}')
        given = value.get("inputs")
        if not isinstance(given, list) or not given:
            raise RequestError('the request has no list "inputs"', remedy=_SHAPES)
        self.check_count(len(given))
        inputs = tuple(self._input(item) for item in given)
        names = [item.spec.name for item in inputs]
        if len(set(names)) < len(names):
            raise RequestError("the request has an input twice", remedy="Send each input once")
        if missing := self._specs.keys() - set(names):
            raise RequestError(f"the input {min(missing)!r} is missing", remedy=_SHAPES)
        rows = {item.shape[0] for item in inputs if self._batch is not None and item.spec.shape[:1] == (self._batch,)}
        if len(rows) > 1:
            raise RequestError(
                f"the inputs have batches of {sorted(rows)}", remedy="Send the same number of samples for each input"
            )
        parameters = _object(value, "parameters")
        outputs = self._wanted(value.get("outputs"), binary=_flag(parameters, "binary_data_output"))
        request = InferRequest({}, max(rows, default=self._fixed_rows), outputs, _id(value), _timeout(parameters))
        return _RequestPlan(inputs, request, sum(item.size for item in inputs))

    def _input(self, item: object) -> _Input:
        item, spec = _named(item, "input", self._specs)
        if item.get("datatype") != (expected := DATATYPES[spec.dtype]):
            found = shown(str(item.get("datatype")))
            raise RequestError(f"input {spec.name!r} has the datatype {found}", remedy=f"Send {expected}")
        shape = self._checked_shape(spec, item.get("shape"))
        parameters = _own_parameters(item, "Send the data in the request")
        size, data = parameters.get("binary_data_size"), item.get("data")
        if (size is None) == (data is None):
            raise RequestError(
                f"input {spec.name!r} has {'no data' if size is None else 'both data and binary_data_size'}",
                remedy='Send "data", or the parameter "binary_data_size" and the bytes after the JSON',
            )
        if size is None:
            return _Input(spec, shape, 0, 0, data)
        expected_size = math.prod(shape) * np.dtype(spec.dtype).itemsize
        if type(size) is not int or size != expected_size:
            found = str(size) if type(size) is int else shown(str(size))
            raise RequestError(
                f"input {spec.name!r} has {found} bytes (binary_data_size), but its shape needs {expected_size}",
                remedy="Send the bytes of the whole tensor",
            )
        return _Input(spec, shape, math.prod(shape), size, None)

    def _checked_shape(self, spec: TensorSpec, shape: object) -> tuple[int, ...]:
        """Return a shape that fits. Python's integers do not overflow, and the size of the data is compared later."""
        if not isinstance(shape, list) or any(type(dim) is not int or dim < 1 for dim in shape):
            raise RequestError(f"input {spec.name!r} has no shape of positive whole numbers", remedy=_SHAPES)
        fits = len(shape) == len(spec.shape) and all(
            isinstance(want, str) or want == have for want, have in zip(spec.shape, shape, strict=True)
        )
        if not fits:
            have = shown("x".join(map(str, shape[:16])))
            expected = "x".join(map(str, spec.shape))
            raise RequestError(f"input {spec.name!r} has the shape {have}", remedy=f"Send {expected}")
        if (problem := spec.too_small(shape)) is not None:
            raise RequestError(f"input {problem}", remedy="Send larger ones")
        if shape and isinstance(spec.shape[0], str) and shape[0] > self._limits.batch:
            raise above_limit(f"the batch is {shape[0]}", self._limits.batch, remedy="Send several requests")
        if (size := math.prod(shape) * np.dtype(spec.dtype).itemsize) > self._limits.inflated_bytes:
            fact = f"input {spec.name!r} would have {size} bytes"
            raise above_limit(fact, self._limits.inflated_bytes, remedy="Send smaller tensors")
        return tuple(shape)

    def _wanted(self, given: object, *, binary: bool) -> tuple[RequestedOutput, ...]:
        if given is None or given == []:
            return tuple(RequestedOutput(name, DATATYPES[spec.dtype], binary) for name, spec in self._outputs.items())
        if not isinstance(given, list) or len(given) > len(self._outputs):
            raise RequestError('"outputs" is not a list of outputs of this model', remedy=_SHAPES)
        wanted = tuple(self._output(item, binary=binary) for item in given)
        if len({want.name for want in wanted}) < len(wanted):
            raise RequestError("the request has an output twice", remedy="Request each output once")
        return wanted

    def _output(self, item: object, *, binary: bool) -> RequestedOutput:
        item, spec = _named(item, "output", self._outputs)
        parameters = _own_parameters(item, "Take the data from the answer")
        classes = parameters.get("classification", 0)
        if type(classes) is not int or classes < 0 or (classes and len(spec.shape) != 2):
            raise RequestError(
                f"output {spec.name!r} can't be classified into {shown(str(classes))} classes",
                remedy="Request a whole number of classes, of an output with one score per class",
            )
        binary = _flag(parameters, "binary_data", default=binary)
        return RequestedOutput(spec.name, DATATYPES[spec.dtype], binary, classes)


def load_json(text: bytes, *, brackets: int) -> Any:
    """Parse JSON after counting its lists and objects."""
    if len(text) > brackets and text.count(b"[") + text.count(b"{") > brackets:
        raise RequestError(
            f"the JSON has more than {brackets} lists and objects",
            remedy="Send the data flat, or in binary",
            status=413,
        )
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the request is not JSON: {one_line(error, 120)}", remedy="Send JSON in UTF-8") from error


def _may_hold_booleans(text: bytes) -> bool:
    """Return True if true or false may occur; a letter is found in a fiftieth of the time of a word."""
    return (b"r" in text and b"true" in text) or (b"l" in text and b"false" in text)


def _from_bytes(body: bytes, start: int, item: _Input) -> Array:
    array: Array = np.frombuffer(body, _STORED[item.spec.dtype], item.count, start).reshape(item.shape)
    if item.spec.dtype == "bool":
        return checked_flags(array, item.spec.name)
    check_finite(array, item.spec.name)
    return array


def _object(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RequestError(f'"{key}" is not a JSON object', remedy=f'Omit "{key}", or send an object')
    return found


def _named(item: object, kind: str, specs: Mapping[str, TensorSpec]) -> tuple[dict[str, Any], TensorSpec]:
    """Return the description of an input or output, and the model's tensor of its name."""
    if not isinstance(item, dict):
        raise RequestError(f"an {kind} is not a JSON object", remedy=_SHAPES)
    spec = specs.get(name) if isinstance(name := item.get("name"), str) else None
    if spec is None:
        raise RequestError(f"the model has no {kind} {shown(str(name))}", remedy=f"The {kind}s are {', '.join(specs)}")
    return item, spec


def _own_parameters(item: Mapping[str, Any], instead: str) -> Mapping[str, Any]:
    """Return the parameters of an input or output, which must be in the message itself."""
    parameters = _object(item, "parameters")
    if "shared_memory_region" in parameters:
        raise RequestError("shared memory is not supported", remedy=instead)
    return parameters


def _flag(parameters: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    found = parameters.get(key, default)
    if not isinstance(found, bool):
        raise RequestError(f'the parameter "{key}" is neither true nor false', remedy="Send true or false")
    return found


def _id(value: Mapping[str, Any]) -> str:
    found = value.get("id", "")
    if not isinstance(found, str) or len(found) > 256:
        raise RequestError('"id" is not a text of at most 256 characters', remedy="Send a shorter text, or no id")
    return found


def _timeout(parameters: Mapping[str, Any]) -> float | None:
    """Return the timeout in seconds; the protocol has microseconds."""
    found = parameters.get("timeout")
    if found is None or found == 0:
        return None
    if type(found) is not int or found < 0:
        raise RequestError(
            'the parameter "timeout" is not a whole number of microseconds',
            remedy="Send a positive number, or no timeout",
        )
    return found / 1e6
