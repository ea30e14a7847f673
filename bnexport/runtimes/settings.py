"""How an engine is to run a file: precision of its kernels, optimisation, algorithm choice, memory binding."""

from __future__ import annotations

from dataclasses import dataclass

from bnexport.errors import UsageError

#: What an engine's float32 kernels may round to. A file that is written in float16 or bfloat16 keeps its own precision.
KERNEL_PRECISIONS = ("float32", "tf32", "bfloat16")
#: ONNX Runtime's levels of graph optimisation, the one that users serve with first.
OPTIMISATIONS = ("all", "extended", "basic", "none")
#: How a convolution's algorithm is chosen. torch measures times for "exhaustive", so results may differ between sessions;
#: onnxruntime selects modes of cuDNN's heuristics (``onnxruntime_session.provider_options``).
CONV_SEARCHES = ("heuristic", "default", "exhaustive")


@dataclass(frozen=True)
class RunSettings:
    """Settings of a runner. An engine that has no such setting ignores it; one that can't obey it refuses.

    Attributes:
        precision: "float32": IEEE float32, TF32 off. "tf32": the engine's TF32 kernels, for convolutions and products.
            "bfloat16": what OpenVINO makes of a float32 file on CPUs that have it.
        optimisation: Level of graph optimisation; one of OPTIMISATIONS.
        conv_search: One of CONV_SEARCHES.
        binding: Inputs and outputs are bound to the device's memory, instead of being copied by each call.
        threads: Threads inside one operator; None leaves it to the engine.
        isolated: Run in a child process, so that no global state (TF32 flags, environment variables) leaks in or out.
    """

    precision: str = "float32"
    optimisation: str = "all"
    conv_search: str = "heuristic"
    binding: bool = False
    threads: int | None = None
    isolated: bool = False

    def __post_init__(self) -> None:
        for what, value, known in (
            ("precision", self.precision, KERNEL_PRECISIONS),
            ("optimisation", self.optimisation, OPTIMISATIONS),
            ("conv_search", self.conv_search, CONV_SEARCHES),
        ):
            if value not in known:
                raise UsageError(f"the {what} {value!r} is not known", remedy=f"Known: {', '.join(known)}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"{self.threads} threads can't run anything", remedy="Give at least 1")

    def describe(self) -> str:
        """What differs from strict float32 as users serve it: "tf32, IO binding, optimisation basic"; "" when nothing."""
        parts = [
            "" if self.precision == "float32" else self.precision,
            "IO binding" if self.binding else "",
            "" if self.optimisation == "all" else f"optimisation {self.optimisation}",
            "" if self.conv_search == "heuristic" else f"{self.conv_search} search",
        ]
        return ", ".join(part for part in parts if part)
