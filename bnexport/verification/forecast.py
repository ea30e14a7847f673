"""Predict the noise that each precision makes on this model, once for each input batch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnexport.errors import BnexportError
from bnexport.onnx_files.emulation import ROUNDINGS, ApproximatingEvaluator, Emulator, approximated_operators
from bnexport.onnx_files.float64 import Float64Evaluator
from bnexport.quantization.integer_emulation import EXACT, LAST_BIT, WAYS, IntegerEmulator, int8_layers
from bnexport.tensors import Array
from bnexport.verification.budget import Budget
from bnexport.verification.inputs import Case, Outputs, each_once, heads
from bnexport.verification.metrics import measure
from bnexport.verification.prediction import points_along, rounding_noise
from bnexport.verification.verdict import NoisePrediction

if TYPE_CHECKING:
    from onnx import ModelProto

#: Error over prediction that passes. A prediction is one draw of the same roundings in another order of summation.
FACTOR = 3.0
#: Share of the noise of approximated functions that counts as predicted, so that 1.5 times that noise passes. That
#: noise is already the largest of several draws, each with the engine's largest error; the noise of rounding is one draw.
FUNCTIONS = 0.5
#: Samples on which the rounding of weights is measured: each needs several evaluations of the model.
_ROUNDED = 64
#: Number of samples of a batch on which the noise is predicted before the batch fails.
DECISIVE = 16
#: A batch with fewer samples is also bounded by the noise of the first batch.
_FEW = 8
#: An optional evaluation is cheap if the budget allows at least this number of samples.
_CHEAP = 64
#: Number of draws of random errors; relative change of the inputs from one draw to the next.
_DRAWS, _NUDGE = 3, 2.0**-12


@dataclass(frozen=True)
class Emulated:
    """The front of a batch under an emulated precision; as many samples as time allows (n)."""

    n: int
    outputs: Mapping[str, Array]  # Output name -> (n, ...)
    exact: Mapping[str, Array]  # Outputs of the file in float64; only the precision differs
    error: float  # max |outputs - exact| / scale; infinite where the precision overflows
    rms: float  # Root mean square of outputs - exact, over scale
    #: Labels that differ from those of the file in float64; None where no output is one score per class
    flips: int | None


@dataclass(frozen=True)
class FunctionNoise:
    """Change of the outputs by the accuracy of the functions that a runtime approximates."""

    #: Operators of the file that the runtime approximates: "Sigmoid".
    operators: tuple[str, ...]
    #: Largest change, of scale.
    error: float
    #: Root mean square of the change, over scale.
    rms: float

    def __str__(self) -> str:
        names = " and ".join(self.operators)
        return f"this runtime's approximation of {names} changes the outputs by {self.error:.1e} of scale"


class Forecast:
    """Evaluates model.onnx in float64, emulates precisions on demand, and caches the results.

    The noise of a precision is measured against the same file in float64, never against the reference: a fault of the
    file must not widen the bound that judges it.

    ``model`` is None when model.onnx can't be read here, so that only the predictions ``recorded`` when the bundle was made
    remain. The noise of the first case, the lead, counts for smaller batches where it is larger, since the largest error of a
    few samples does not bound other roundings. Where the batch dimension ``varies``, a batch may be cut and joined to others.
    ``stored`` is the precision of the weights; ``pixels``: the only input is pixels as uint8. For an int8 bundle, ``int8`` is
    model.onnx and ``model`` the float32 file, and ``integer_emulation.WAYS`` are precisions, too.
    """

    def __init__(
        self,
        model: ModelProto | None,
        *,
        cases: Sequence[Case],
        budget: Budget,
        varies: bool,
        stored: str = "float32",
        recorded: Mapping[str, float] | None = None,
        int8: ModelProto | None = None,
        pixels: bool = False,
    ) -> None:
        self._model = model
        self._pixels = pixels
        self._int8 = int8
        self._cases = tuple(cases)
        self._budget = budget
        self._varies = varies
        self._stored = "float32" if stored == "int8" else stored
        self._recorded = dict(recorded or {})
        self._evaluator: Float64Evaluator | None = None
        self._engines: dict[str, Float64Evaluator | None] = {}
        self._exact: dict[str, Outputs | BnexportError] = {}
        self._rounding: dict[tuple[str, bool], float] = {}
        self._found: dict[tuple[str, str], Emulated | None] = {}
        self._functions: dict[tuple[str, str], FunctionNoise | None] = {}
        self._last_bits: dict[str, float] = {}

    @property
    def possible(self) -> bool:
        """Return whether the model can be read here."""
        return self._model is not None

    @property
    def cheap(self) -> bool:
        """Return whether the model is so small that optional evaluations take no noticeable time."""
        return self._budget.proof >= _CHEAP

    def front(self, case: Case, *, most: int | None = None) -> Case:
        """Return the samples of a batch, at most ``most``, that are evaluated in float64 and under emulated precisions."""
        if not self._varies:
            return case
        leads = bool(self._cases) and case.batch.name == self._cases[0].batch.name
        n = self._budget.proof if leads else self._budget.proof_other
        return case.head(min(case.batch.n, n, n if most is None else most))

    def exact(self, case: Case) -> Outputs:
        """Return the file's outputs in float64 for the front of a batch; errors are those of ``Float64Evaluator``."""
        if case.batch.name not in self._exact:
            assert self._model is not None, "the model must be readable"
            self._evaluator = self._evaluator or Float64Evaluator(self._model)
            named = {item.batch.name: item for item in (*self._cases, case)}
            fronts = [self.front(item).batch for item in named.values()]
            found = each_once(fronts, self._evaluator.evaluate, together=self._varies)
            self._exact |= dict(zip(named, found, strict=True))
        outputs = self._exact[case.batch.name]
        if isinstance(outputs, BnexportError):
            raise outputs
        return outputs

    def rounding(self, case: Case, *, always: bool = False, on_all: bool = False) -> float | None:
        """Return the change of the outputs, of scale, by rounding the weights to the file's type; None for float32.

        In float32 the fixed bound of the proof covers this change. A few networks turn the last digit of a weight into much of
        their output; for these the change is measured (``always``). In half precision it is most of the error of every network.
        In networks with tiny variances one sample of hundreds may have ten times the error of the others, so a batch that would
        fail is measured on all its samples (``on_all``).
        """
        if self._model is None or (self._stored == "float32" and not always):
            return None
        key = case.batch.name, on_all
        if key not in self._rounding:
            front = self.front(case).batch
            feeds = (front.head(_ROUNDED) if self._varies and not on_all else front).feeds
            self._rounding[key] = rounding_noise(self._model, feeds)
        return self._rounding[key]

    def noise(self, precision: str, case: Case, *, on: Case | None = None) -> float | None:
        """Return the predicted max |candidate - reference| / scale of a batch; None when nothing is known.

        The largest error of two samples does not bound that of five, and one sample of hundreds may have ten times the error of
        the others. So a batch that would fail is judged by the noise of the samples with the largest errors, too (``on``).
        """
        found = self.emulated(precision, case)
        if found is None:
            return self._recorded.get(precision)
        error = found.error
        if found.n < _FEW and self._cases and self._cases[0] is not case:
            lead = self.emulated(precision, self._cases[0])
            error = max(error, 0.0 if lead is None else lead.error)
        if on is not None:
            error = max(error, self._noise_on(precision, on))
        if not np.isfinite(error):  # the rounding of infinite values can't be measured
            return error
        return error + (self.rounding(case) or 0.0)

    def _noise_on(self, precision: str, part: Case) -> float:
        """Return the largest noise of several draws on few samples.

        Each draw scales the inputs by another factor close to 1, which changes every rounding. In a network where the errors of
        all outputs follow one direction, a draw is one random number, and can be near 0 by chance.
        """
        engine, worst = self._engine(precision), 0.0
        if engine is None or self._evaluator is None:
            return worst
        for draw in range(_DRAWS + 1):
            feeds = {name: self._nudged(x, draw) for name, x in part.batch.feeds.items()}
            try:
                outputs, exact = engine.evaluate(feeds), self._evaluator.evaluate(feeds)
            except BnexportError:
                break
            worst = max(worst, _emulated(outputs, exact, part).error)
        return worst

    def _nudged(self, x: Array, draw: int) -> Array:
        """Return an input changed by little for a draw: floats by a factor near 1, pixels in their lowest bits."""
        if x.dtype.kind == "f":
            return np.asarray(x * x.dtype.type(1 + draw * _NUDGE))
        return np.asarray(x ^ np.uint8(draw)) if self._pixels else x

    def function_noise(self, runtime: str, case: Case) -> FunctionNoise | None:
        """Return the effect of a runtime's approximated functions (``emulation.APPROXIMATED``) on at most 16 samples.

        It is None where the file has no such function, or can't be evaluated.
        """
        key = (runtime, case.batch.name)
        if key in self._functions or self._model is None:
            return self._functions.get(key)
        self._functions[key] = None
        whole = case.head(DECISIVE) if self._varies else case
        with contextlib.suppress(BnexportError):
            if operators := approximated_operators(self._model, runtime):
                self._evaluator = self._evaluator or Float64Evaluator(self._model)
                exact = self._evaluator.evaluate(whole.batch.feeds)
                engines = (ApproximatingEvaluator(self._model, runtime, seed=seed) for seed in range(_DRAWS))
                draws = [_emulated(engine.evaluate(whole.batch.feeds), exact, whole) for engine in engines]
                largest = max(draw.error for draw in draws), max(draw.rms for draw in draws)
                self._functions[key] = FunctionNoise(operators, *largest)
        return self._functions[key]

    def emulated(self, precision: str, case: Case) -> Emulated | None:
        """Evaluate the front of a batch under an emulated precision; None when the file can't be evaluated."""
        if (precision, case.batch.name) not in self._found:
            self.emulate(precision, [case])
        return self._found[precision, case.batch.name]

    def emulate(self, precision: str, cases: Sequence[Case]) -> None:
        """Evaluate the fronts of several batches in one call, for ``emulated``."""
        missing = [case for case in cases if (precision, case.batch.name) not in self._found]
        for case in missing:
            self._found[precision, case.batch.name] = None
        try:
            engine = self._engine(precision)
            if engine is None:
                return
            exact = [self.exact(case) for case in missing]
        except BnexportError:
            return
        outputs = each_once([self.front(case).batch for case in missing], engine.evaluate, together=self._varies)
        for case, found, right in zip(missing, outputs, exact, strict=True):
            if not isinstance(found, BnexportError):
                self._found[precision, case.batch.name] = _emulated(found, right, case)

    def rounding_seen(self, precision: str, case: Case, outputs: Outputs) -> str:
        """Return the way of rounding (``emulation.ROUNDINGS``) that the error of a run shows; the usual way otherwise.

        TF32 that truncates has 2 to 6 times the error of TF32 that rounds to nearest. The errors of truncation point in one
        direction, also those of the unfolded network (cosine 0.86 to 1.00); those of rounding to nearest do not (-0.5 to 0.1).
        So an engine that rounds keeps the smaller bound. A fault that points along truncation by chance gets the larger one
        here; the strict stage judges it by its fixed bound.
        """
        usual, *others = ROUNDINGS.get(precision, (precision,))
        for name in others:
            found = self.emulated(name, case)
            if found is not None and np.isfinite(found.error):
                n = found.n
                if points_along(heads(outputs, n), heads(case.expected, n), found.outputs, found.exact):
                    return name
        return usual

    def prediction(self, precision: str, case: Case) -> NoisePrediction | None:
        """Return a precision's noise for the report, by its noisiest way of rounding; None when unknown or infinite."""
        ways = [self.emulated(name, case) for name in ROUNDINGS.get(precision, (precision,))]
        found = max((way for way in ways if way is not None), key=lambda way: way.error, default=None)
        if found is None or not np.isfinite(found.error):
            return None
        return NoisePrediction(precision, found.error, found.rms, found.n, found.flips, case.batch.name)

    def last_bit(self, case: Case) -> float | None:
        """Return the largest disagreement, of scale, of kernels that compute an int8 file right; None when it is unknown.

        On few samples one draw can be too small by chance, so the largest of several counts.
        """
        exact, other = self.emulated(EXACT, case), self.emulated(LAST_BIT, case)
        if exact is None or other is None or self._int8 is None:
            return None
        if (name := case.batch.name) not in self._last_bits:
            draws, few = [other.outputs], self.front(case).batch
            if exact.n <= DECISIVE:
                draws += [IntegerEmulator(self._int8, LAST_BIT, seed=n).evaluate(few.feeds) for n in range(1, _DRAWS)]
            errors = (measure(draw, exact.outputs, bound=0.0, scales=case.scales).error for draw in draws)
            self._last_bits[name] = max(errors)
        return self._last_bits[name]

    def saturates(self) -> bool:
        """Return whether 16-bit sums can saturate in the int8 file."""
        return self._int8 is not None and any(layer.saturates for layer in int8_layers(self._int8))

    def _engine(self, precision: str) -> Float64Evaluator | None:
        source = self._int8 if precision in WAYS else self._model
        if self._model is None or source is None:
            return None
        if precision not in self._engines:
            self._engines[precision] = None  # of a file that can't be emulated
            own = precision in WAYS
            self._engines[precision] = IntegerEmulator(source, precision) if own else Emulator(source, precision)
        return self._engines[precision]


def _emulated(outputs: Outputs, exact: Outputs, case: Case) -> Emulated:
    n = len(next(iter(exact.values())))
    found = measure(outputs, exact, bound=0.0, scales=case.scales)
    if found.problem:  # infinity or NaN: this precision can't hold the model's values
        return Emulated(n, outputs, exact, float("inf"), float("inf"), None)
    flips = None if found.flips is None else found.flips.explained + found.flips.unexplained
    relative = found.rms * (found.error / found.max_abs) if found.max_abs else 0.0
    return Emulated(n, outputs, exact, found.error, relative, flips)
