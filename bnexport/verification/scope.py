"""The extent of a verification: precisions, optimisation levels, ways of calling an engine, samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bnexport.errors import UsageError
from bnexport.runtimes.base import CONV_SEARCHES, KERNEL_PRECISIONS, OPTIMISATIONS, RunSettings
from bnexport.runtimes.catalogue import RunnerSpec


@dataclass(frozen=True)
class Scope:
    """Settings that each runtime is run with. Every combination is a separate run.

    Raises:
        UsageError: A value is unknown, or no value is given.
    """

    #: Precisions of the kernels: "float32" (stage 2), "tf32" (stage 3). None: float32, and each runtime's serving
    #: precision where that is another one
    precisions: tuple[str, ...] | None = None
    #: ONNX Runtime's levels of graph optimisation; "all" is what users serve with
    optimisations: tuple[str, ...] = ("all",)
    bindings: tuple[bool, ...] = (False,)  # False: a plain call. True: inputs and outputs bound to the device's memory
    conv_searches: tuple[str, ...] = ("heuristic",)  # cuDNN's ways of choosing an algorithm
    max_samples: int | None = None  # Maximum number of samples of each kind; None: what the budget allows (``budget``)
    all_files: bool = False  # Prove also the files of a large network that none of the named runtimes reads
    thorough: bool = False  # At least 16 samples of each kind and every batch size, however large the network is
    #: Compare layer by layer: True, False, or None: where it is cheap, and where a runtime failed
    drift: bool | None = None
    #: Accept an original network whose accuracy on labelled samples is at or below chance (``data.classes``)
    allow_low_accuracy: bool = False

    def __post_init__(self) -> None:
        for what, values, known in (
            ("precision", self.precisions, KERNEL_PRECISIONS),
            ("optimisation level", self.optimisations, OPTIMISATIONS),
            ("search for convolutions", self.conv_searches, CONV_SEARCHES),
            ("binding", self.bindings, (False, True)),
        ):
            if values is None or (values and set(values) <= set(known)):
                continue
            odd = next(
                (f"the {what} {value!r} is unknown" for value in values if value not in known), f"no {what} is given"
            )
            raise UsageError(odd, remedy=f"Choose from {', '.join(map(str, known))}")
        if self.max_samples is not None and self.max_samples < 1:
            raise UsageError(f"--max-samples is {self.max_samples}", remedy="Give at least 1")

    def settings_of(self, spec: RunnerSpec, *, precision: str = "float32") -> tuple[RunSettings, ...]:
        """Return the runs of one runtime, strict float32 first; empty if the runtime has none of the requested precisions.

        Optimisation levels and bindings exist for ONNX Runtime alone, and searches for its GPU providers. For a file in half
        ``precision`` the kernels have one setting: that precision.
        """
        wanted = self.precisions or tuple(dict.fromkeys(("float32", spec.served)))
        if precision != "float32":
            wanted = ("float32",)
        session, gpu = spec.engine == "onnxruntime", spec.device != "cpu"
        chosen = itertools.product(
            [name for name in KERNEL_PRECISIONS if name in wanted and name in spec.precisions],
            self.optimisations if session else ("all",),
            self.bindings if session else (False,),
            self.conv_searches if session and gpu else ("heuristic",),
        )
        runs = [
            RunSettings(kernels, optimisation, search, binding, isolated=gpu)
            for kernels, optimisation, binding, search in chosen
        ]
        if precision == "int8" and session and not gpu:
            runs += [replace(run, precise=True) for run in runs]
        return tuple(runs)

    def check_used(self, specs: Sequence[RunnerSpec]) -> None:
        """Refuse (UsageError) settings that none of the runtimes has, which would be ignored."""
        sessions = [spec for spec in specs if spec.engine == "onnxruntime"]
        for flag, given, useful, where in (
            ("--optimisation", self.optimisations != ("all",), sessions, "onnxruntime-cpu"),
            ("--io-binding", self.bindings != (False,), sessions, "onnxruntime-cpu"),
            (
                "--conv-search",
                self.conv_searches != ("heuristic",),
                [spec for spec in sessions if spec.device != "cpu"],
                "onnxruntime-cuda",
            ),
        ):
            if given and not useful:
                raise UsageError(f"{flag} has no effect on {specs[0].name}", remedy=f"Choose --runtime {where}")

    def require(self, spec: RunnerSpec) -> None:
        """Refuse (UsageError) a named runtime that has none of the requested precisions."""
        if not self.settings_of(spec):
            raise UsageError(
                f"{spec.name} has no {' or '.join(self.precisions or ())} kernels",
                remedy=f"Choose from {', '.join(spec.precisions)}",
            )
