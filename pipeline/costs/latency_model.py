"""How long ONNX Runtime takes for a list of kernels on a measured device (METHODS 4; stacked as in ANNETTE, arXiv 2105.03176)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import LinearRegression

from pipeline.costs.kernel_call import KernelCall
from pipeline.errors import ProfileError

Array = NDArray[np.float64]

_LEAST = 24  # kernels of a kind from which trees learn anything
_FEW = 8  # kernels of a kind from which its own rates are better than its operator's
_LEAST_MS = 1e-4
_PRIOR = 0.02  # how strongly, in relative error, the correction of runs is drawn to none
_ROUNDS = 20
_LEAST_SHARE = 0.2  # of what its kernels take alone, that a run takes
_HUBER = 0.05  # relative error beyond which a run counts as an outlier
_DIGITS = 9  # what is fitted is rounded to: the last bits differ between processors, and trees choose between equal splits by them


@dataclass(frozen=True)
class KernelTime:
    """The median of one kernel, by ONNX Runtime's own profile."""

    call: KernelCall
    ms: float


@dataclass(frozen=True)
class RunTime:
    """A whole `session.run` of these kernels without profiling: median and quartiles."""

    calls: tuple[KernelCall, ...]
    median_ms: float
    low_ms: float
    high_ms: float


class LatencyModel:
    """Predicted time of a run, fitted to `kernels` and `runs` measured on one device (deterministic).

    A kernel that was measured takes its median. Any other takes the roofline of its kind (a call, its multiply-accumulates, its bytes, each at the rate
    that fits best) times what boosted trees have learnt of the kind's deviation from that, but not less than its multiply-accumulates take at the highest
    rate of any kernel of floats, or of integers, that was measured. Profiled kernels are slower than those of a run without
    profiling, by a time each and by a factor that are fitted to `runs`. All that is fitted is rounded, so that processors which differ in the
    last bits of their arithmetic predict the same.

    Raises:
        ProfileError: no kernel was measured.
    """

    def __init__(self, kernels: Sequence[KernelTime], runs: Sequence[RunTime]) -> None:
        if not kernels:
            raise ProfileError("the profile holds no kernel times; measure the device again.")
        samples = defaultdict[KernelCall, list[float]](list)
        for kernel in kernels:
            samples[kernel.call].append(max(kernel.ms, _LEAST_MS))
        self._known = {call: median(times) for call, times in samples.items()}
        self._peak = {
            integer: max((_macs(call) / ms for call, ms in self._known.items() if _integer(call) == integer), default=0.0) or math.inf
            for integer in (False, True)
        }
        self._any = _Kind(self._known)
        self._kinds: dict[str, _Kind] = {}
        for name, least in ((_operator, 1), (_kind, _FEW)):
            groups = defaultdict[str, dict[KernelCall, float]](dict)
            for call, ms in self._known.items():
                groups[name(call)][call] = ms
            self._kinds |= {kind: _Kind(times) for kind, times in groups.items() if len(times) >= least}
        self._correction = self._correct(runs)

    def run_ms(self, calls: Sequence[KernelCall]) -> float:
        """Predicted median of one `session.run` that calls these kernels."""
        terms = self._terms(calls)
        # a correction fitted to other runs may go below what any run takes
        return _rounded(max(terms @ self._correction, _LEAST_SHARE * terms[2:].sum()), 6)

    def least_ms(self, macs: float, *, integers: bool) -> float:
        """At most what `run_ms` gives for any run of so many multiply-accumulates or more, all of floats or some also of `integers`.

        Widths play no part in it: a narrower layer is not always predicted to be faster, but each takes its multiply-accumulates at the highest rate.
        """
        computing = macs / max(self._peak[integer] for integer in {False, integers})
        constant, each, floats, others = self._correction
        corrected = constant + (min(floats, others) if integers else floats) * computing if min(each, floats, others) >= 0 else 0.0
        return float(max(corrected, _LEAST_SHARE * computing, 0.0)) * (1 - 1e-5)  # more than rounding takes

    def kernel_ms(self, calls: Sequence[KernelCall]) -> list[float]:
        """What each call takes by the profile of ONNX Runtime, measured or predicted."""
        unknown = defaultdict[str, list[KernelCall]](list)
        for call in dict.fromkeys(calls):
            if call not in self._known:
                unknown[next((kind for kind in (_kind(call), _operator(call)) if kind in self._kinds), "")].append(call)
        for kind, asked in unknown.items():
            predicted = self._kinds.get(kind, self._any).predict(asked)
            # a kind measured only where bytes decide, as linear layers of one row, has no rate of its own for multiply-accumulates
            self._known |= {call: max(ms, _macs(call) / self._peak[_integer(call)]) for call, ms in zip(asked, predicted, strict=True)}
        return [self._known[call] for call in calls]

    def _terms(self, calls: Sequence[KernelCall]) -> Array:
        """One, the number of calls, and the sum of the float and of the integer kernels."""
        sums = [0.0, 0.0]
        for call, ms in zip(calls, self.kernel_ms(calls), strict=True):
            sums[_integer(call)] += ms
        return np.array([1.0, len(calls), *sums])

    def _correct(self, runs: Sequence[RunTime]) -> Array:
        """Weights of `_terms`: relative least squares, drawn to the plain sum, runs that do not fit counting less."""
        weights = np.array([0.0, 0.0, 1.0, 1.0])
        if not runs:
            return weights
        measured = np.array([run.median_ms for run in runs])
        terms = np.array([self._terms(run.calls) for run in runs]) / measured[:, None]
        scale = np.sqrt((terms**2).mean(0))
        scale[scale == 0] = 1.0  # as integers where none ran, which stay as they were measured
        prior = np.diag(_PRIOR * scale * math.sqrt(len(runs)))
        for _ in range(_ROUNDS):
            error = np.abs(terms @ weights - 1)
            trust = np.sqrt(np.minimum(1, _HUBER / np.maximum(error, 1e-12)))
            given, wanted = np.vstack([terms * trust[:, None], prior]), np.concatenate([trust, prior @ np.array([0.0, 0.0, 1.0, 1.0])])
            weights = np.linalg.lstsq(given, wanted, rcond=None)[0]
        return np.array([_rounded(weight) for weight in weights])


class _Kind:
    """Calls of one kind: a roofline, and trees on what it leaves."""

    def __init__(self, times: dict[KernelCall, float]) -> None:
        work, ms = np.array([_work(call) for call in times]), np.array(list(times.values()))
        fitted = LinearRegression(fit_intercept=False, positive=True).fit(work / ms[:, None], np.ones(len(ms)))
        self._rates: Array = np.array([_rounded(rate) for rate in fitted.coef_])
        self._times = dict(times)

    @cached_property
    def _trees(self) -> Any:
        # fitted when first asked, for most kinds are never
        if len(self._times) < _LEAST:
            return None
        trees = GradientBoostingRegressor(
            n_estimators=150, learning_rate=0.08, max_depth=4, min_samples_leaf=3, subsample=0.7, max_features=0.5, random_state=0
        )
        expected = self._roofline(np.array([_work(call) for call in self._times]))
        left = np.log(np.array(list(self._times.values())) / expected)
        return trees.fit(np.array([_features(call) for call in self._times]).round(_DIGITS), left.round(_DIGITS))

    def _roofline(self, work: Array) -> Array:
        expected: Array = np.maximum(work @ self._rates, _LEAST_MS)
        return expected

    def predict(self, calls: Sequence[KernelCall]) -> list[float]:
        ms = self._roofline(np.array([_work(call) for call in calls]))
        if self._trees is not None:
            ms = ms * np.exp(self._trees.predict(np.array([_features(call) for call in calls]).round(_DIGITS)))
        return [_rounded(value) for value in ms]


def _rounded(value: float, digits: int = _DIGITS) -> float:
    return float(f"{value:.{digits}g}")


def _integer(call: KernelCall) -> bool:
    return _quantised(call) or call.dtype != "float"


def _quantised(call: KernelCall) -> bool:
    return call.op.startswith("Q") and call.op != "QuickGelu"


def _operator(call: KernelCall) -> str:
    return f"{call.op}:{call.dtype}"


def _kind(call: KernelCall) -> str:
    """Which of an operator's ways of working: depthwise, pointwise, of few input channels or of many; beside convolutions, by how many tensors it reads."""
    if len(call.weights) != 4:
        return f"{_operator(call)}:{len(call.inputs)}"
    if call.groups > 1 and call.weights[1] == 1:
        return f"{_operator(call)}:depthwise"
    if call.kernel == (1, 1):
        return f"{_operator(call)}:pointwise"
    return f"{_operator(call)}:{'image' if call.weights[1] < 8 else 'full'}"


def _macs(call: KernelCall) -> float:
    if call.op in ("MatMul", "QLinearMatMul") and not call.weights:
        return float(math.prod(call.output) * call.inputs[0][-1])
    if call.op == "ConvTranspose":
        return math.prod(call.inputs[0]) * math.prod(call.weights[1:])
    if len(call.weights) == 4:
        return math.prod(call.output) * math.prod(call.weights[1:])
    return float(math.prod(call.output) * call.weights[-1]) if len(call.weights) == 2 else 0.0


def _bytes(call: KernelCall) -> tuple[float, float, float]:
    """Read, written and of weights."""
    each = 4 if call.dtype == "float" else 8 if call.dtype == "int64" else 1
    width = 1 if _quantised(call) else 4
    return float(each * sum(math.prod(shape) for shape in call.inputs)), float(width * math.prod(call.output)), float(width * math.prod(call.weights or (0,)))


def _work(call: KernelCall) -> list[float]:
    read, written, weights = _bytes(call)
    return [1.0, _macs(call) / 1e6, (read + written) / 1e6, weights / 1e6]


_ACTIVATIONS = ("", "Relu", "Clip", "LeakyRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh")


def _features(call: KernelCall) -> list[float]:
    read, written, weights = _bytes(call)
    last = _quantised(call) or call.op.startswith("Nhwc")
    inside, outside = (_sides(shape, last) for shape in (call.inputs[0], call.output))
    kernel, stride = (call.kernel or (1,))[0], (call.strides or (1,))[0]
    return [
        *(math.log1p(value) for value in (_macs(call), read, written, weights)),
        *inside,
        *outside,
        inside[0] % 16,
        outside[0] % 16,
        outside[0] % 64,
        outside[2] % 6,
        outside[1] * outside[2],
        kernel,
        stride,
        math.log(call.groups),
        len(call.inputs),
        float(len(call.inputs) > 1 and call.inputs[0] != call.inputs[1]),
        _ACTIVATIONS.index(call.activation) if call.activation in _ACTIVATIONS else -1,
        _macs(call) / max(read + written + weights, 1),
    ]


def _sides(shape: tuple[int, ...], last: bool) -> tuple[int, int, int]:
    """Channels, height and width."""
    if len(shape) != 4:
        return (shape[-1] if shape else 1, 1, 1)
    return (shape[3], shape[1], shape[2]) if last else (shape[1], shape[2], shape[3])
