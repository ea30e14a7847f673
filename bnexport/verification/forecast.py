"""Predict the noise that each precision makes on this model, once for each input batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnexport.errors import BnexportError
from bnexport.onnx_files.emulation import ROUNDINGS, Emulator
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.tensors import Array
from bnexport.verification.inputs import Case, Outputs, heads
from bnexport.verification.metrics import measure
from bnexport.verification.prediction import points_along, rounding_noise
from bnexport.verification.verdict import Prediction

if TYPE_CHECKING:
    from onnx import ModelProto

#: Error over prediction that passes. A prediction is one draw of the same roundings in another order of summation.
FACTOR = 3.0
#: Samples on which the rounding of weights is measured: each needs several evaluations of the model.
_ROUNDED = 64
#: Samples below which a batch's own noise is no bound.
_FEW = 8
#: Samples that are evaluated of each batch from which on another evaluation takes no time worth mention.
_CHEAP = 64


@dataclass(frozen=True)
class Emulated:
    """The front of a batch under an emulated precision; as many samples as time allows (n).

    Attributes:
        outputs: Output name -> (n, ...).
        exact: The same of the file in float64. Only this precision causes the difference.
        error: max |outputs - exact| / scale; infinite where the precision overflows.
        rms: Root mean square of outputs - exact, over scale.
        flips: Labels that differ from those of the file in float64; None where no output is one score per class.
    """

    n: int
    outputs: Mapping[str, Array]
    exact: Mapping[str, Array]
    error: float
    rms: float
    flips: int | None


class Forecast:
    """Evaluates model.onnx in float64, emulates precisions on demand, and caches the results.

    The noise of a precision is measured against the same file in float64, never against the reference: a fault of the
    file must not widen the bound that judges it.

    Args:
        model: model.onnx as read; None when it can't be read here, so that only ``recorded`` predictions remain.
        limit: Samples per batch.
        stored: Precision of the file's weights.
        recorded: Precision -> error of scale, predicted when the bundle was made.

    Attributes:
        lead: The batch of many real samples, if any. Its noise counts for smaller batches where it is larger, since the
            largest error of a few samples says little about other roundings.
    """

    def __init__(
        self,
        model: ModelProto | None,
        *,
        limit: int,
        stored: str = "float32",
        recorded: Mapping[str, float] | None = None,
    ) -> None:
        self._model = model
        self.limit = limit
        self.lead: Case | None = None
        self._stored = stored
        self._recorded = dict(recorded or {})
        self._evaluator: Float64Evaluator | None = None
        self._engines: dict[str, Emulator | None] = {}
        self._exact: dict[str, tuple[int, Outputs]] = {}
        self._rounding: dict[str, float] = {}
        self._found: dict[tuple[str, str], Emulated | None] = {}

    @property
    def possible(self) -> bool:
        """Return whether the model can be read here."""
        return self._model is not None

    @property
    def cheap(self) -> bool:
        """Return whether the model is so small that optional evaluations take no noticeable time."""
        return self.limit >= _CHEAP

    def exact(self, case: Case) -> tuple[int, Outputs]:
        """Evaluate the front of a batch in float64, and return the number of samples and output name -> (n, ...).

        Raises:
            BundleError: The file can't be evaluated.
            ProofError: The evaluation left float64.
        """
        if case.batch.name not in self._exact:
            assert self._model is not None, "ask possible first"
            self._evaluator = self._evaluator or Float64Evaluator(self._model)
            n = min(self.limit, case.batch.n) if self._evaluator.varies else case.batch.n
            self._exact[case.batch.name] = n, self._evaluator.evaluate(case.batch.head(n).feeds)
        return self._exact[case.batch.name]

    def rounding(self, case: Case) -> float | None:
        """Return the change of the outputs, of scale, by rounding the weights to the file's type; None for float32.

        In float32 the fixed bound of the proof covers it. In half precision it is most of the error, so it is measured.
        """
        if self._stored == "float32" or self._model is None:
            return None
        if case.batch.name not in self._rounding:
            n, _ = self.exact(case)
            feeds = case.batch.head(min(n, _ROUNDED) if n < case.batch.n else n).feeds
            self._rounding[case.batch.name] = rounding_noise(self._model, feeds)
        return self._rounding[case.batch.name]

    def noise(self, precision: str, case: Case) -> float | None:
        """Return the predicted max |candidate - reference| / scale of a batch; None when nothing is known."""
        found = self.emulated(precision, case)
        if found is None:
            return self._recorded.get(precision)
        error = found.error
        if found.n < _FEW and self.lead is not None and self.lead is not case:
            lead = self.emulated(precision, self.lead)
            error = max(error, 0.0 if lead is None else lead.error)
        if not np.isfinite(error):  # values that are no numbers have no rounding that could be measured
            return error
        return error + (self.rounding(case) or 0.0)

    def emulated(self, precision: str, case: Case) -> Emulated | None:
        """Evaluate a batch under an emulated precision; None when the file can't be evaluated."""
        key = (precision, case.batch.name)
        if key not in self._found:
            try:
                self._found[key] = self._emulate(precision, case)
            except BnexportError:
                self._found[key] = None
        return self._found[key]

    def rounding_seen(self, precision: str, case: Case, outputs: Outputs) -> str:
        """Return the way of rounding (``emulation.ROUNDINGS``) that the error of a run shows; the usual way otherwise.

        The error of TF32 that truncates is 2 to 6 times that of TF32 that rounds to nearest. Truncation is a bias: its errors
        point in one direction, also those of the unfolded network (cosine 0.86 to 1.00). Roundings to nearest do not (-0.5 to
        0.1). So an engine that rounds keeps the smaller bound. A fault that points along truncation by chance gets the
        larger one here; the strict stage judges it by its fixed bound.
        """
        usual, *others = ROUNDINGS.get(precision, (precision,))
        for name in others:
            found = self.emulated(name, case)
            if found is not None and np.isfinite(found.error):
                n = found.n
                if points_along(heads(outputs, n), heads(case.expected, n), found.outputs, found.exact):
                    return name
        return usual

    def prediction(self, precision: str, case: Case) -> Prediction | None:
        """Return a precision's noise for the report, by its noisiest way of rounding; None when unknown or infinite."""
        ways = [self.emulated(name, case) for name in ROUNDINGS.get(precision, (precision,))]
        found = max((way for way in ways if way is not None), key=lambda way: way.error, default=None)
        if found is None or not np.isfinite(found.error):
            return None
        return Prediction(precision, found.error, found.rms, found.n, found.flips, case.batch.name)

    def _emulate(self, precision: str, case: Case) -> Emulated | None:
        engine = self._engine(precision)
        if engine is None:
            return None
        n, exact = self.exact(case)
        outputs = engine.evaluate(case.batch.head(n).feeds)
        found = measure(outputs, exact, bound=0.0, scales=case.scales)
        if found.problem:  # infinity or NaN: this precision can't hold the model's values
            return Emulated(n, outputs, exact, float("inf"), float("inf"), None)
        flips = None if found.flips is None else found.flips.explained + found.flips.unexplained
        relative = found.rms * (found.error / found.max_abs) if found.max_abs else 0.0
        return Emulated(n, outputs, exact, found.error, relative, flips)

    def _engine(self, precision: str) -> Emulator | None:
        if self._model is None:
            return None
        if precision not in self._engines:
            self._engines[precision] = None
            self._engines[precision] = Emulator(self._model, precision)
        return self._engines[precision]
