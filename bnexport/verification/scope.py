"""How much a verification looks at: precisions, optimisation levels, ways of calling an engine, samples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from bnexport.bundle import MODEL_ONNX
from bnexport.errors import UsageError
from bnexport.runtimes.base import CONV_SEARCHES, KERNEL_PRECISIONS, OPTIMISATIONS, RunSettings
from bnexport.runtimes.catalogue import RunnerSpec


@dataclass(frozen=True)
class Scope:
    """What each runtime is put through. Every combination is a run of its own.

    Attributes:
        precisions: Of the kernels: "float32" (stage 2), "tf32" (stage 3). None: float32, and what each runtime is served
            with where that is another one.
        optimisations: ONNX Runtime's levels of graph optimisation; "all" is what users serve with.
        bindings: False: a plain call. True: inputs and outputs bound to the device's memory.
        conv_searches: How cuDNN chooses a convolution's algorithm.
        max_samples: At most so many samples of each kind; None: what a few seconds allow.
        drift: Whether to compare layer by layer: True, False, or None: where it is cheap, and where a runtime failed.

    Raises:
        UsageError: A value that is not known, or no value at all.
    """

    precisions: tuple[str, ...] | None = None
    optimisations: tuple[str, ...] = ("all",)
    bindings: tuple[bool, ...] = (False,)
    conv_searches: tuple[str, ...] = ("heuristic",)
    max_samples: int | None = None
    drift: bool | None = None

    def __post_init__(self) -> None:
        for what, values, known in (
            ("precision", self.precisions, KERNEL_PRECISIONS),
            ("optimisation", self.optimisations, OPTIMISATIONS),
            ("conv_search", self.conv_searches, CONV_SEARCHES),
            ("binding", self.bindings, (False, True)),
        ):
            if values is not None and (not values or any(value not in known for value in values)):
                odd = next((value for value in values if value not in known), "nothing")
                raise UsageError(f"the {what} {odd!r} is not known", remedy=f"Known: {', '.join(map(str, known))}")
        if self.max_samples is not None and self.max_samples < 1:
            raise UsageError(f"{self.max_samples} samples show nothing", remedy="Give at least 1")

    def settings_of(self, spec: RunnerSpec, *, precision: str = "float32") -> tuple[RunSettings, ...]:
        """The runs of one runtime, strict float32 first; empty when it has none of the precisions asked for.

        Optimisation levels and bindings are ONNX Runtime's alone, and searches those of its GPU providers.

        Args:
            spec: The runtime.
            precision: Of the file. In half precision there is but one setting of the kernels: its own.
        """
        asked = self.precisions or tuple(dict.fromkeys(("float32", spec.served)))
        if precision != "float32":
            asked = ("float32",)
        session, gpu = spec.engine == "onnxruntime", spec.device != "cpu"
        chosen = itertools.product(
            [name for name in KERNEL_PRECISIONS if name in asked and name in spec.precisions],
            self.optimisations if session else ("all",),
            self.bindings if session else (False,),
            self.conv_searches if session and gpu else ("heuristic",),
        )
        return tuple(
            RunSettings(kernels, optimisation, search, binding, isolated=gpu)
            for kernels, optimisation, binding, search in chosen
        )

    def require(self, spec: RunnerSpec) -> None:
        """Refuse a runtime asked for by name that has none of the precisions asked for.

        Raises:
            UsageError: It has none.
        """
        if not self.settings_of(spec):
            raise UsageError(
                f"{spec.name} has no {' or '.join(self.precisions or ())} kernels",
                remedy=f"It has: {', '.join(spec.precisions)}",
            )


def reads_onnx(spec: RunnerSpec) -> bool:
    """Whether a runtime opens model.onnx, so that its layers can be looked at one by one."""
    return spec.file == MODEL_ONNX
