"""Measure which ONNX form of a standalone affine y = s x + t runs fastest on each execution provider of this machine.

``python -m benchmarks.folding.affine_form [PAGE]`` writes docs/affine_form.md. It takes a few minutes on an idle machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.clock import Spread
from benchmarks.command import finish, options, progress
from benchmarks.pages import ranged, render, write_page
from bnexport.environment import describe, environment
from bnexport.runtimes.catalogue import runner_spec
from bnexport.runtimes.onnxruntime_session import load_engine
from bnexport.tensors import Array

#: The form that the other forms are compared with.
BASE = "BatchNormalization"
#: Name -> (channels, height, width).
SHAPES: dict[str, tuple[int, int, int]] = {"small": (16, 28, 28), "medium": (64, 56, 56), "large": (256, 28, 28)}
BATCHES = (1, 32)
#: Bursts in a round; the fastest one counts, since another process may have had the processor in the others.
_BURSTS = 3
_ROUNDS, _SEED = 15, 0
_OPSET, _IR_VERSION = 18, 8


@dataclass(frozen=True)
class Numbers:
    """The constants of one model, all float32."""

    scale: Array  # (C,), of both signs unless the context needs positive ones
    shift: Array  # (C,)
    weight: Array  # (C, C, 1, 1), of the convolution next to the affine


@dataclass(frozen=True)
class Context:
    """The operators, "Relu" or "Conv", around the affine; an engine may fuse them with it."""

    name: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    positive: bool = False  # every scale is positive, as BOUNDS need

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms measured in this context: BOUNDS too if Relu follows the affine."""
        return (*FORMS, *(BOUNDS if self.after[:1] == ("Relu",) else ()))


#: The contexts that are measured.
CONTEXTS: tuple[Context, ...] = (
    Context("alone"),
    Context("after Relu", before=("Relu",)),
    Context("before Relu", after=("Relu",), positive=True),
    Context("before Conv", after=("Conv",)),
    Context("between Conv, Relu and Conv", before=("Conv", "Relu"), after=("Conv",)),
    Context("before Relu and Conv", after=("Relu", "Conv"), positive=True),
)


def _batch_normalization(builder: Builder, value: str, numbers: Numbers) -> str:
    ones, zeros = np.ones_like(numbers.scale), np.zeros_like(numbers.scale)
    return builder.node("BatchNormalization", value, numbers.scale, numbers.shift, zeros, ones, epsilon=0.0)


def _mul_add(builder: Builder, value: str, numbers: Numbers) -> str:
    return builder.node("Add", builder.node("Mul", value, _column(numbers.scale)), _column(numbers.shift))


def _depthwise(builder: Builder, value: str, numbers: Numbers) -> str:
    weight = numbers.scale.reshape(-1, 1, 1, 1)
    return builder.node("Conv", value, weight, numbers.shift, group=len(numbers.scale), kernel_shape=[1, 1])


#: Form -> its writer. A new form is a new row.
FORMS: dict[str, Callable[[Builder, str, Numbers], str]] = {
    BASE: _batch_normalization,
    "Mul and Add": _mul_add,
    "depthwise Conv": _depthwise,
}
#: relu(s x + t) = s max(x, -t / s) + t for s > 0, and with min for s < 0: only bounds stay, the rest goes into the
#: convolution after them. Name -> operators; the second holds for scales of both signs.
BOUNDS: dict[str, tuple[str, ...]] = {"one bound": ("Max",), "two bounds": ("Max", "Min")}


@dataclass(frozen=True)
class FormRow:
    """The measurement of one form in one setting."""

    provider: str
    threads: int  # of one operator; 0: all cores
    context: str
    shape: str
    batch: int
    form: str
    seconds: Spread  # of one run
    ratio: Spread  # each round's time as a multiple of BASE's in the same round
    error: float  # largest |difference| from float64 arithmetic as a share of the largest |value|

    @property
    def setting(self) -> tuple[str, int, str, str, int]:
        """Everything but the form."""
        return self.provider, self.threads, self.context, self.shape, self.batch


class Builder:
    """Collector of the nodes and constants of one model."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, kind: str, *inputs: str | Array, **attributes: Any) -> str:
        """Add an operator, with arrays as constants, and return the name of its output."""
        names = [item if isinstance(item, str) else self._constant(item) for item in inputs]
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [name], **attributes))
        return name

    def _constant(self, array: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


def build(context: Context, form: str, numbers: Numbers) -> bytes:
    """Return the model of one form in its context: input "x" (batch, C, H, W), output "y"."""
    builder = Builder()
    value = "x"
    for kind in context.before:
        value = _operator(builder, kind, value, numbers)
    if form in BOUNDS:
        value = _bounded(builder, value, form, numbers)
        if "Conv" in context.after:
            bias = numbers.weight[:, :, 0, 0] @ numbers.shift
            value = builder.node("Conv", value, numbers.weight * numbers.scale[None, :, None, None], bias)
    else:
        value = FORMS[form](builder, value, numbers)
        for kind in context.after:
            value = _operator(builder, kind, value, numbers)
    builder.nodes[-1].output[0] = "y"
    channels = len(numbers.scale)
    specs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, "height", "width"])
        for name in ("x", "y")
    ]
    graph = helper.make_graph(builder.nodes, "affine", specs[:1], specs[1:], builder.constants)
    opset = [helper.make_opsetid("", _OPSET)]
    model: bytes = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION).SerializeToString()
    return model


def expected(context: Context, form: str, numbers: Numbers, x: Array) -> Array:
    """Return the same computation in float64; for bounds without a convolution after them, the bounded input."""
    value: Array = x.astype(np.float64)
    if form in BOUNDS and context.after == ("Relu",):
        return np.maximum(value, _column(-numbers.shift / numbers.scale).astype(np.float64))
    for kind in (*context.before, "affine", *context.after):
        if kind == "affine":
            value = value * _column(numbers.scale).astype(np.float64) + _column(numbers.shift).astype(np.float64)
        elif kind == "Relu":
            value = np.maximum(value, 0.0)
        else:
            value = np.einsum("oc,nchw->nohw", numbers.weight[:, :, 0, 0].astype(np.float64), value, optimize=True)
    return value


def draw(context: Context, channels: int, *, seed: int = 0) -> Numbers:
    """Draw scales over two decades: of both signs with one 0, unless the context needs positive ones."""
    generator = np.random.default_rng(seed)
    scale = 10 ** generator.uniform(-1, 1, channels)
    if not context.positive:
        scale *= generator.choice([-1.0, 1.0], channels)
        scale[channels // 2] = 0.0
    weight = generator.standard_normal((channels, channels, 1, 1)) / math.sqrt(channels)
    shift = generator.standard_normal(channels)
    return Numbers(scale.astype(np.float32), shift.astype(np.float32), weight.astype(np.float32))


def measure_forms(
    *,
    providers: Sequence[str] | None = None,
    contexts: Sequence[Context] = CONTEXTS,
    shapes: Sequence[str] = tuple(SHAPES),
    batches: Sequence[int] = BATCHES,
    threads: Sequence[int] = (1, 0),
    rounds: int = 21,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _line: None,
) -> list[FormRow]:
    """Time every form in every setting, the forms of one setting in turn; without providers the CPU, and CUDA if it works."""
    found: list[FormRow] = []
    for provider in providers or usable_providers():
        for count in threads if provider == "CPUExecutionProvider" else (0,):
            for context in contexts:
                for shape in shapes:
                    for batch in batches:
                        rows = _setting(provider, count, context, shape, batch, rounds=rounds, seed=seed)
                        found += rows
                        tell(", ".join([_name(rows[0]), *(f"{row.form} {row.ratio.middle:.2f}" for row in rows[1:])]))
    return found


def usable_providers() -> tuple[str, ...]:
    """Return the CPU, and CUDA if a session runs on it here."""
    cuda = () if runner_spec("onnxruntime-cuda").available() else ("CUDAExecutionProvider",)
    return ("CPUExecutionProvider", *cuda)


def scores(rows: Sequence[FormRow]) -> dict[str, dict[str, float]]:
    """Return provider -> form -> geometric mean of its median ratios over all settings; BASE is 1."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.form in FORMS:
            found.setdefault(row.provider, {}).setdefault(row.form, []).append(math.log(row.ratio.middle))
    return {
        provider: {form: math.exp(sum(logs) / len(logs)) for form, logs in forms.items()}
        for provider, forms in found.items()
    }


def winners(rows: Sequence[FormRow]) -> dict[str, str]:
    """Return provider -> the form with the lowest score, which an exporter for that provider should write."""
    return {provider: min(forms, key=lambda form: forms[form]) for provider, forms in scores(rows).items()}


class _Session:
    """One model on one provider, with its input bound once."""

    def __init__(self, model: bytes, provider: str, threads: int, x: Array) -> None:
        ort = load_engine()
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.intra_op_num_threads = threads
        if provider != "CPUExecutionProvider":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        self._session = ort.InferenceSession(model, options, providers=[provider])
        device = "cpu" if provider == "CPUExecutionProvider" else "cuda"
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x, device, 0))
        self._binding.bind_output("y", device)

    def seconds(self, runs: int) -> float:
        """Return the mean seconds of one run."""
        started = time.perf_counter()
        for _ in range(runs):
            self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        return (time.perf_counter() - started) / runs

    def output(self) -> Array:
        """Return the output of the last run."""
        value: Array = self._binding.copy_outputs_to_cpu()[0]
        return value


def _setting(
    provider: str, threads: int, context: Context, shape: str, batch: int, *, rounds: int, seed: int
) -> list[FormRow]:
    channels, height, width = SHAPES[shape]
    numbers = draw(context, channels, seed=seed)
    x = np.random.default_rng(seed + 1).standard_normal((batch, channels, height, width), dtype=np.float32)
    forms = context.forms
    sessions = {form: _Session(build(context, form, numbers), provider, threads, x) for form in forms}
    runs = 1
    errors: dict[str, float] = {}
    for form, session in sessions.items():
        session.seconds(1)
        want = expected(context, form, numbers, x)
        errors[form] = float(np.abs(session.output() - want).max() / np.abs(want).max())
        runs = max(runs, math.ceil(1e-3 / session.seconds(3)))  # a round lasts a millisecond or longer
    taken: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(rounds):
        for form in forms if number % 2 == 0 else reversed(forms):
            taken[form].append(min(sessions[form].seconds(runs) for _ in range(_BURSTS)))
    return [
        FormRow(
            provider, threads, context.name, shape, batch, form,
            Spread.of(taken[form]),
            Spread.of([mine / base for mine, base in zip(taken[form], taken[BASE], strict=True)]),
            errors[form],
        )
        for form in forms
    ]  # fmt: skip


def _bounded(builder: Builder, value: str, form: str, numbers: Numbers) -> str:
    limit = -numbers.shift / numbers.scale
    limits = {"Max": np.where(numbers.scale > 0, limit, -np.inf), "Min": np.where(numbers.scale < 0, limit, np.inf)}
    for kind in BOUNDS[form]:
        value = builder.node(kind, value, _column(limits[kind].astype(np.float32)))
    return value


def _operator(builder: Builder, kind: str, value: str, numbers: Numbers) -> str:
    return builder.node("Relu", value) if kind == "Relu" else builder.node("Conv", value, numbers.weight)


def _column(vector: Array) -> Array:
    column: Array = vector.reshape(1, -1, 1, 1)
    return column


def _name(row: FormRow) -> str:
    threads = f"{row.threads} thread" if row.threads else "all cores"
    return f"{row.provider}, {threads}, {row.context}, {row.shape} x {row.batch}"


def write_document(rows: Sequence[FormRow], path: Path, *, record: Mapping[str, Any], rounds: int, seed: int) -> None:
    """Write the page of measured rows; ``record`` is that of ``bnexport.environment.environment``."""
    best = winners(rows)
    found = scores(rows).items()
    contexts = list(dict.fromkeys(row.context for row in rows))
    text = render(
        "folding/affine_form.md.jinja", base=BASE, forms=list(FORMS), batches=BATCHES, rounds=rounds, seed=seed,
        cuda="CUDAExecutionProvider" in best, machine=describe(dict(record)), settings=len({row.setting for row in rows}),
        shapes=", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in SHAPES.items()),
        answers=[[name, f"**{best[name]}**", *(f"{each[form]:.2f}" for form in FORMS)] for name, each in found],
        errors=[[name, *(_worst(rows, name, form) for form in FORMS)] for name in contexts],
        bounds=list(_bounds(rows)), tables=[_table(rows, context) for context in CONTEXTS if context.name in contexts],
    )  # fmt: skip
    write_page([text], path)


def _worst(rows: Sequence[FormRow], context: str, form: str) -> str:
    return f"{max(row.error for row in rows if (row.context, row.form) == (context, form)):.1e}"


def _bounds(rows: Sequence[FormRow]) -> Iterator[list[str]]:
    """The cells of bounds per channel that replace the affine: a scale moved across a Relu leaves them."""
    measured = [row for row in rows if row.form in BOUNDS]
    for provider, context, form in dict.fromkeys((row.provider, row.context, row.form) for row in measured):
        found = [row for row in measured if (row.provider, row.context, row.form) == (provider, context, form)]
        ratios = [row.ratio.middle for row in found]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        yield [
            provider,
            context,
            form,
            f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            _worst(found, context, form),
        ]


def _table(rows: Sequence[FormRow], context: Context) -> tuple[str, list[str], list[list[str]]]:
    """Heading, heads and cells of one context."""
    here = [row for row in rows if row.context == context.name]
    others = [form for form in context.forms if form != BASE and any(row.form == form for row in here)]
    cells = []
    for setting in dict.fromkeys(row.setting for row in here):
        found = {row.form: row for row in here if row.setting == setting}
        place = f"{setting[0].removesuffix('ExecutionProvider')}, {setting[1] or 'all'}"
        base = f"{found[BASE].seconds.middle * 1e6:.0f}"
        cells.append([place, setting[3], str(setting[4]), base, *(ranged(found[form].ratio) for form in others)])
    chain = ", ".join([*context.before, "affine", *context.after])
    heads = ["provider, threads", "shape", "batch", f"{BASE}, us", *others]
    return f"{context.name[0].upper()}{context.name[1:]} ({chain})", heads, cells


def main() -> None:
    """Measure, write the page and print the fastest form of each provider."""
    parser = options("folding.affine_form", __doc__)
    parser.add_argument("page", nargs="?", type=Path, default=Path("docs/affine_form.md"))
    page = parser.parse_args().page
    rows = measure_forms(rounds=_ROUNDS, seed=_SEED, tell=progress)
    write_document(rows, page, record=environment(), rounds=_ROUNDS, seed=_SEED)
    print("\n".join(f"{provider}: {form}" for provider, form in winners(rows).items()))


if __name__ == "__main__":
    finish("affine_form", main)
