"""Protobuf messages of the gRPC services and of Triton's model configuration, from the files in ``proto/``.

``proto/descriptors.binpb`` holds the compiled ``.proto`` files; it is built in that folder by::

    python -m grpc_tools.protoc -I. --include_imports --descriptor_set_out=descriptors.binpb inference.proto health.proto

The set is loaded into a separate pool. Generated code would register its names in the process's default pool, where a second
``inference`` package (Triton's client, KServe's) is an error, and it depends on the protobuf release that generated it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnexport.optional import require

FOLDER = Path(__file__).with_name("proto")
DESCRIPTORS = FOLDER / "descriptors.binpb"
#: Packages of the two services.
INFERENCE, HEALTH = "inference", "grpc.health.v1"


@functools.cache
def message_classes(purpose: str) -> dict[str, Any]:
    """Return name without package ("ModelInferRequest.InferInputTensor") -> class, for all messages except map entries.

    Raises:
        MissingDependency: protobuf, which ``purpose`` (the start of a sentence) needs, is not installed.
    """
    descriptors = require("google.protobuf.descriptor_pb2", purpose=purpose)
    pool = require("google.protobuf.descriptor_pool", purpose=purpose).DescriptorPool()
    factory = require("google.protobuf.message_factory", purpose=purpose)
    files = descriptors.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file
    for file in files:  # each after the files that it imports
        pool.Add(file)
    return {
        message.full_name.removeprefix(f"{file.package}."): factory.GetMessageClass(message)
        for file in files
        for message in _with_nested(pool.FindFileByName(file.name).message_types_by_name.values())
        if not message.GetOptions().map_entry
    }


def _with_nested(messages: Any) -> Iterator[Any]:
    for message in messages:
        yield message
        yield from _with_nested(message.nested_types)
