"""The table of calls that must be refused, each with the code and a part of the reason."""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import numpy as np
from support.grpc_calls import HEALTH, SERVICE, infer_request

from bnexport.serving.grpc.inference import classes

INFER = SERVICE + "ModelInfer"
_ONE = np.linspace(0, 1, 784, dtype=np.float32).reshape(1, 1, 28, 28)
BAD, GONE, LARGE, NONE = "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED"


class Case(NamedTuple):
    """One call: its fault, the code, a part of the reason, its messages, its path and its options."""

    name: str
    code: str
    reason: str
    messages: tuple[bytes, ...]
    path: str = INFER
    options: dict[str, Any] = {}  # noqa: RUF012 -- never changed


def good() -> Any:
    return infer_request(_ONE)


def changed(change: Callable[[Any], object]) -> tuple[bytes]:
    """Return a good request with one change."""
    request = good()
    change(request)
    return (request.SerializeToString(),)


def with_input(**fields: Any) -> tuple[bytes]:
    """Return a good request with other values in its input."""

    def change(request: Any) -> None:
        for name, value in fields.items():
            if name == "shape":
                del request.inputs[0].shape[:]
                request.inputs[0].shape.extend(value)
            else:
                setattr(request.inputs[0], name, value)

    return changed(change)


def raw(*tensors: bytes) -> tuple[bytes]:
    def change(request: Any) -> None:
        del request.raw_input_contents[:]
        request.raw_input_contents.extend(tensors)

    return changed(change)


def typed(**contents: Any) -> tuple[bytes]:
    """Return a request whose tensor is in typed contents."""
    request = good()
    del request.raw_input_contents[:]
    for name, values in contents.items():
        getattr(request.inputs[0].contents, name).extend(values)
    return (request.SerializeToString(),)


def with_number(value: float) -> bytes:
    array = _ONE.copy()
    array[0, 0, 3, 3] = value
    return array.tobytes()


def parameter(name: str, **value: Any) -> tuple[bytes]:
    return changed(lambda request: request.parameters[name].CopyFrom(classes()["InferParameter"](**value)))


def output(*names: str, **parameters: Any) -> tuple[bytes]:
    def change(request: Any) -> None:
        for name in names:
            item = request.outputs.add(name=name)
            for key, value in parameters.items():
                item.parameters[key].CopyFrom(value)

    return changed(change)


def of(kind: str, **fields: Any) -> tuple[bytes]:
    return (classes()[kind](**fields).SerializeToString(),)


def _of_input(key: str) -> tuple[bytes]:
    def change(request: Any) -> None:
        request.inputs[0].parameters[key].string_param = "region"

    return changed(change)


_PARAMETER = classes()["InferParameter"]
_TEXT = _PARAMETER(string_param="three")
_FLAT = _ONE.reshape(-1).tolist()
_GOOD = good().SerializeToString()
_BOMB = bytes(100_000_000)
_UNKNOWN = b"\x9a\x3f"  # field 1011, sized

CASES: tuple[Case, ...] = (
    # Messages
    Case("text", BAD, "not an inference.ModelInferRequest", (b"hello world, this is no message",)),
    Case("noise", BAD, "not an inference.ModelInferRequest", (bytes(range(255, 0, -1)) * 40,)),
    Case("JSON", BAD, "not an inference.ModelInferRequest", (b'{"inputs": []}',)),
    Case("cut short", BAD, "ends too early", (_GOOD[:-9],)),
    Case("a length of 10^18", BAD, "ends too early", (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x0d",)),
    Case("a number without an end", BAD, "not an inference.ModelInferRequest", (b"\x08" + b"\xff" * 100,)),
    Case("a group", BAD, "not an inference.ModelInferRequest", (b"\x0b\x0c" + _GOOD,)),
    Case("field 0", BAD, "not an inference.ModelInferRequest", (b"\x02\x00" + _GOOD,)),
    Case("a name that is not UTF-8", BAD, "not an inference.ModelInferRequest", (b"\x0a\x02\xff\xfe",)),
    Case("an id that is not UTF-8", BAD, "not UTF-8", (_GOOD + b"\x1a\x02\xff\xfe",)),
    Case("an id of 10,000 characters", BAD, '"id"', changed(lambda request: setattr(request, "id", "x" * 10_000))),
    Case("no message", BAD, "no readable message", ()),
    Case("70 MB", LARGE, "larger than max", raw(bytes(70_000_000))),
    Case("a gzip bomb", LARGE, "larger than max", raw(_BOMB), options={"compression": grpc.Compression.Gzip}),
    Case("a deflate bomb", LARGE, "larger than max", raw(_BOMB), options={"compression": grpc.Compression.Deflate}),
    Case("2 MB of unknown fields", LARGE, "besides raw tensors", (_UNKNOWN + b"\x80\x89\x7a" + bytes(2_000_000),)),
    Case("nested a million deep", LARGE, "besides raw tensors", (b"\x2a\x80\x89\x7a" + b"\x2a" * 2_000_000,)),
    # Models
    Case("an empty message", GONE, "no model ''", (b"",)),
    Case("an unknown model", GONE, "no model 'x'", changed(lambda request: setattr(request, "model_name", "x"))),
    Case("a long name", GONE, "no model", changed(lambda request: setattr(request, "model_name", "n" * 100_000))),
    Case("an escape", GONE, "no model", changed(lambda request: setattr(request, "model_name", "\x1b[2J\n"))),
    Case("an unknown version", GONE, "no version", changed(lambda request: setattr(request, "model_version", "9"))),
    Case("a version in words", GONE, "no version", changed(lambda request: setattr(request, "model_version", "one"))),
    # Inputs
    Case("no inputs", BAD, "inputs", of("ModelInferRequest", model_name="bn_lenet")),
    Case("raw tensors without inputs", BAD, "1 raw_input_contents for 0", changed(lambda r: r.ClearField("inputs"))),
    Case("an unknown input", BAD, "no input 'x'", with_input(name="x")),
    Case("no name", BAD, "no input ''", with_input(name="")),
    Case("an input twice", BAD, "2 inputs", changed(lambda r: r.inputs.append(r.inputs[0]))),
    Case("100,000 inputs", BAD, "100001 inputs", (_GOOD + b"\x2a\x00" * 100_000,)),
    Case("a million inputs", LARGE, "besides raw tensors", (_GOOD + b"\x2a\x00" * 1_000_000,)),
    Case("2,000 raw tensors", BAD, "more than 1024 raw", raw(*[b""] * 2000)),
    Case("no datatype", BAD, "the datatype ''", with_input(datatype="")),
    Case("another datatype", BAD, "the datatype 'FP64'", with_input(datatype="FP64")),
    Case("an unknown datatype", BAD, "the datatype 'FP8'", with_input(datatype="FP8")),
    Case("texts", BAD, "the datatype 'BYTES'", with_input(datatype="BYTES")),
    Case("shared memory", BAD, "shared memory", _of_input("shared_memory_region")),
    # Shapes
    Case("no shape", BAD, "the shape", with_input(shape=[])),
    Case("three dimensions", BAD, "the shape '1x28x28'", with_input(shape=[1, 28, 28])),
    Case("another size", BAD, "1x1x28x29", with_input(shape=[1, 1, 28, 29])),
    Case("1,000 dimensions", BAD, "the shape", with_input(shape=[1] * 1000)),
    Case("a size of 0", BAD, "positive whole numbers", with_input(shape=[0, 1, 28, 28])),
    Case("a size of -1", BAD, "positive whole numbers", with_input(shape=[-1, 1, 28, 28])),
    Case("a batch of 10^12", LARGE, "the limit is 1024", with_input(shape=[10**12, 1, 28, 28])),
    Case("a batch of 2^63 - 1", LARGE, "the limit is 1024", with_input(shape=[2**63 - 1, 1, 28, 28])),
    # Data
    Case("4 bytes too few", BAD, "3132 bytes", raw(_ONE.tobytes()[:-4])),
    Case("4 bytes too many", BAD, "3140 bytes", raw(_ONE.tobytes() + bytes(4))),
    Case("one byte too few", BAD, "3135 bytes", raw(_ONE.tobytes()[:-1])),
    Case("an empty raw tensor", BAD, "0 bytes", raw(b"")),
    Case("two raw tensors", BAD, "2 raw_input_contents for 1", raw(_ONE.tobytes(), b"")),
    Case("NaN", BAD, "NaN or infinity", raw(with_number(np.nan))),
    Case("infinity", BAD, "NaN or infinity", raw(with_number(-np.inf))),
    Case("neither raw nor typed", BAD, "no data", typed()),
    Case("typed NaN", BAD, "NaN or infinity", typed(fp32_contents=[*_FLAT[:-1], float("nan")])),
    Case("typed, one too few", BAD, "3132 bytes", typed(fp32_contents=_FLAT[:-1])),
    Case("typed, one too many", BAD, "3140 bytes", typed(fp32_contents=[*_FLAT, 1.0])),
    Case("typed as another type", BAD, "has int_contents", typed(int_contents=[1] * 784)),
    Case("typed twice", BAD, "int_contents and fp32_contents", typed(int_contents=[1] * 784, fp32_contents=_FLAT)),
    Case("2 MB of typed contents", LARGE, "besides raw tensors", typed(fp32_contents=[0.0] * 500_000)),
    Case(
        "both raw and typed", BAD, "both contents and raw",
        changed(lambda request: request.inputs[0].contents.fp32_contents.extend(_FLAT)),
    ),
    # Outputs and parameters
    Case("an unknown output", BAD, "no output 'x'", output("x")),
    Case("an output twice", BAD, "not a list of outputs", output("logits", "logits")),
    Case("shared memory for an output", BAD, "shared memory", output("logits", shared_memory_region=_TEXT)),
    Case("-1 classes", BAD, "into '-1' classes", output("logits", classification=_PARAMETER(int64_param=-1))),
    Case("classes in words", BAD, "classes", output("logits", classification=_TEXT)),
    Case("true classes", BAD, "classes", output("logits", classification=_PARAMETER(bool_param=True))),
    Case("a timeout below 0", BAD, '"timeout"', parameter("timeout", int64_param=-5)),
    Case("a timeout in words", BAD, '"timeout"', parameter("timeout", string_param="soon")),
    Case("a timeout of 1.5", BAD, '"timeout"', parameter("timeout", double_param=1.5)),
    # Methods
    Case("an unknown method", NONE, "no method", (b"",), SERVICE + "ModelTrain"),
    Case("an unknown service", NONE, "no method", (b"",), "/other.Service/ModelInfer"),
    Case("a path of 5,000 characters", NONE, "no method", (b"",), "/" + "x" * 5000),
    Case("shared memory is registered", NONE, "no method", (b"",), SERVICE + "SystemSharedMemoryRegister"),
    Case("noise for a name", BAD, "parsed as inference.ModelReadyRequest", (b"\xff" * 9,), SERVICE + "ModelReady"),
    Case("2 MB for a name", LARGE, "the limit is", of("ModelReadyRequest", name="x" * 2_000_000), SERVICE + "ModelReady"),
    Case("metadata of none", GONE, "no model 'x'", of("ModelMetadataRequest", name="x"), SERVICE + "ModelMetadata"),
    Case("metadata without a name", GONE, "no model ''", (b"",), SERVICE + "ModelMetadata"),
    Case("a configuration of none", GONE, "no model 'x'", of("ModelConfigRequest", name="x"), SERVICE + "ModelConfig"),
    Case(
        "statistics of no version", GONE, "no version",
        of("ModelStatisticsRequest", name="bn_lenet", version="7"), SERVICE + "ModelStatistics",
    ),
    Case(
        "loading", "PERMISSION_DENIED", "--allow-load",
        of("RepositoryModelLoadRequest", model_name="bn_lenet"), SERVICE + "RepositoryModelLoad",
    ),
    Case(
        "unloading", "PERMISSION_DENIED", "--allow-load",
        of("RepositoryModelUnloadRequest", model_name="bn_lenet"), SERVICE + "RepositoryModelUnload",
    ),
    Case("the health of none", GONE, "no service 'x'", of("HealthCheckRequest", service="x"), HEALTH + "Check"),
    Case("noise for health", BAD, "parsed as grpc.health.v1", (struct.pack("<q", -1),), HEALTH + "Check"),
    Case("40 kB of metadata", LARGE, "", (_GOOD,), options={"metadata": [("x-long", "y" * 40_000)]}),
)  # fmt: skip
