from __future__ import annotations

import math
import random

import numpy as np
import pytest

from pipeline.costs.kernel_call import KernelCall
from pipeline.costs.latency_model import KernelTime, LatencyModel, RunTime
from pipeline.errors import ProfileError


def conv(inputs: int, outputs: int, side: int, kernel: int = 3) -> KernelCall:
    shapes = (1, inputs, side, side), (1, outputs, side, side)
    return KernelCall("nchwc.Conv", (shapes[0],), shapes[1], (outputs, inputs, kernel, kernel), (kernel, kernel), (1, 1))


def quantised(inputs: int, outputs: int, side: int) -> KernelCall:
    return KernelCall("QLinearConv", ((1, side, side, inputs),), (1, side, side, outputs), (outputs, inputs, 1, 1), (1, 1), (1, 1), dtype="uint8")


def made_up_ms(call: KernelCall) -> float:
    """A device whose convolutions slow down where filters do not fill four blocks of 8."""
    macs = math.prod(call.output) * math.prod(call.weights[1:])
    filled = (1 + call.output[1] // 8 % 4 / 8) if call.dtype == "float" else 0.5
    return 0.004 + filled * macs / 2e7 + 4 * math.prod(call.inputs[0]) / 1e7


def drawn(draw: random.Random) -> KernelCall:
    if draw.random() < 0.3:
        return quantised(draw.randint(4, 64), draw.randint(4, 64), draw.randint(4, 32))
    return conv(8 * draw.randint(1, 12), 8 * draw.randint(1, 12), draw.randint(4, 32), draw.choice((1, 3)))


def run(calls: list[KernelCall], ms: float) -> RunTime:
    return RunTime(tuple(calls), ms, 0.95 * ms, 1.05 * ms)


def test_a_measured_kernel_takes_its_median() -> None:
    call = conv(16, 16, 8)
    model = LatencyModel([KernelTime(call, ms) for ms in (0.3, 0.1, 0.2)], [])
    assert model.kernel_ms([call]) == [0.2]
    assert model.run_ms([call, call]) == pytest.approx(0.4)


def test_kernels_never_measured_are_predicted_from_their_kind() -> None:
    draw = random.Random(0)
    model = LatencyModel([KernelTime(call, made_up_ms(call)) for call in (drawn(draw) for _ in range(600))], [])
    unseen = [drawn(draw) for _ in range(200)]
    errors = np.abs(np.array(model.kernel_ms(unseen)) / [made_up_ms(call) for call in unseen] - 1)
    assert np.median(errors) < 0.06
    assert np.percentile(errors, 90) < 0.2


def test_runs_correct_overhead_and_scale_by_precision_whatever_a_few_outliers_say() -> None:
    draw = random.Random(1)
    pool = [drawn(draw) for _ in range(100)]
    kernels = [KernelTime(call, made_up_ms(call)) for call in pool]

    def true_ms(calls: list[KernelCall]) -> float:
        return 0.02 + sum((0.8 if call.dtype == "float" else 0.6) * made_up_ms(call) for call in calls)

    runs = []
    for number in range(80):
        calls = draw.choices(pool, k=draw.randint(1, 20))
        runs.append(run(calls, true_ms(calls) * (3 if number % 16 == 0 else 1)))
    model = LatencyModel(kernels, runs)
    for _ in range(20):
        calls = draw.choices(pool, k=12)
        assert model.run_ms(calls) == pytest.approx(true_ms(calls), rel=0.04)


def test_equal_measurements_give_equal_predictions_in_any_order_of_asking() -> None:
    draw = random.Random(2)
    kernels = [KernelTime(call, made_up_ms(call)) for call in (drawn(draw) for _ in range(100))]
    unseen = [drawn(draw) for _ in range(10)]
    one, other = LatencyModel(kernels, []), LatencyModel(kernels, [])
    expected = [one.run_ms([call]) for call in unseen]
    assert [other.run_ms([call]) for call in reversed(unseen)][::-1] == pytest.approx(expected)
    assert one.run_ms(unseen) == pytest.approx(sum(expected), rel=1e-5)


def test_the_last_bits_of_what_was_measured_decide_nothing() -> None:
    """Between processors NNLS, BLAS and logarithms differ as much."""
    draw = random.Random(3)
    calls = [drawn(draw) for _ in range(300)]
    unseen = [drawn(draw) for _ in range(60)]
    models = []
    for _ in range(2):
        times = {call: made_up_ms(call) * (1 + draw.choice((-1, 0, 1)) * 2**-52) for call in calls}
        runs = [run(calls[start : start + 7], 0.02 + 0.7 * sum(times[call] for call in calls[start : start + 7])) for start in range(0, 280, 7)]
        models.append(LatencyModel([KernelTime(call, ms) for call, ms in times.items()], runs))
    one, other = ([model.run_ms([call]) for call in unseen] for model in models)
    assert one == other


def test_a_kernel_of_a_kind_never_measured_still_takes_some_time() -> None:
    model = LatencyModel([KernelTime(conv(8 * n, 16, 8), 0.1 * n) for n in range(1, 5)], [])
    assert 0 < model.run_ms([KernelCall("Softmax", ((1, 10),), (1, 10))]) < 1


def test_a_profile_without_kernels_is_refused() -> None:
    with pytest.raises(ProfileError, match="no kernel times"):
        LatencyModel([], [])
