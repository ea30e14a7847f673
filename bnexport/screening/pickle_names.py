"""Names that a pickle may use: what rebuilds tensors, and nothing that does anything else."""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Kinds of storage -> bytes of one element.
STORAGES: Mapping[str, int] = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
    "torch.ComplexDoubleStorage": 16,
    "torch.ComplexFloatStorage": 8,
    "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1,
    "torch.QInt32Storage": 4,
    "torch.QUInt4x2Storage": 1,
    "torch.QUInt2x4Storage": 1,
    "torch.storage.UntypedStorage": 1,
    "torch.UntypedStorage": 1,
}
#: Functions whose arguments are (storage, offset, sizes, strides, ...).
REBUILD = frozenset(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "qtensor"))
_TENSORS = REBUILD | {
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    "torch.per_tensor_affine",
    "torch.per_channel_affine",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
}
#: What torch.load reads as weights: tensors and plain containers of them.
WEIGHTS = _TENSORS | {
    "collections.Counter",
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.Tensor",
    "_codecs.encode",
    "builtins.set",
    "builtins.complex",
}
#: Named as a type only: called with a number they would take so much memory.
NOT_CALLED = frozenset({*STORAGES, "torch.Tensor"})
#: What TorchScript's own reader builds lists and dictionaries with.
SCRIPT = _TENSORS | {
    "torch.jit._pickle.build_intlist",
    "torch.jit._pickle.build_doublelist",
    "torch.jit._pickle.build_boollist",
    "torch.jit._pickle.build_tensorlist",
    "torch.jit._pickle.build_tensor_from_id",
    "torch.jit._pickle.restore_type_tag",
}
_DTYPE = re.compile(r"torch\.(?:float|bfloat|complex|u?int|bool|qu?int|float8_e|float4_e)[0-9a-z_]*")
#: Classes that the archive's own code defines. ``torch.classes`` are written in C++, and some open files or sockets.
_SCRIPT_CLASS = re.compile(r"__torch__\.(?!torch\.classes\.)[A-Za-z0-9_.]+")


def is_weight_name(name: str) -> bool:
    """Whether a pickle of weights may use a name."""
    return name in WEIGHTS or name in STORAGES or _DTYPE.fullmatch(name) is not None


def is_script_name(name: str) -> bool:
    """Whether a pickle in a TorchScript archive may use a name."""
    return name in SCRIPT or name in STORAGES or _SCRIPT_CLASS.fullmatch(name) is not None
