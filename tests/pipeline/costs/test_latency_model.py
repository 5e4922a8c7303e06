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


def linear(rows: int, inputs: int, outputs: int) -> KernelCall:
    return KernelCall("Gemm", ((rows, inputs),), (rows, outputs), (outputs, inputs))


def test_no_kernel_beats_the_most_multiply_accumulates_a_millisecond_that_were_measured() -> None:
    """Linear layers of one row, all that a classifier has, read a weight for each multiply-accumulate: of what many rows take they say nothing."""
    one_row = [linear(1, 16 * n, 16 * m) for n in range(1, 9) for m in range(1, 9)]
    convs = [conv(8 * n, 64, 16) for n in range(1, 9)]
    times = {call: 0.001 + math.prod(call.weights) / 1e6 for call in one_row} | {
        call: 0.001 + math.prod(call.output) * call.weights[1] * 9 / 1e7 for call in convs
    }
    model = LatencyModel([KernelTime(call, ms) for call, ms in times.items()], [])
    (many_rows,) = model.kernel_ms([linear(500, 128, 128)])
    assert many_rows >= 500 * 128 * 128 / 1e7


def test_a_product_of_two_tensors_takes_longer_the_more_it_multiplies() -> None:
    model = LatencyModel([KernelTime(conv(8 * n, 64, 16), 0.1 * n) for n in range(1, 9)], [])
    few, many = model.kernel_ms([KernelCall("MatMul", ((1, 4, 64, width), (1, 4, width, 64)), (1, 4, 64, 64)) for width in (64, 6400)])
    assert many > 10 * few


def test_a_way_of_working_of_which_few_kernels_are_known_goes_by_its_operator() -> None:
    usual = {conv(8 * n, 8 * m, 16, 3): 0.01 + 8 * n * 8 * m * 9 * 256 / 1e7 for n in range(1, 9) for m in range(1, 9)}
    odd = conv(64, 64, 16, 1)  # measured in a bad moment
    model = LatencyModel([KernelTime(call, ms) for call, ms in {**usual, odd: 50.0}.items()], [])
    (alike,) = model.kernel_ms([conv(64, 56, 16, 1)])
    assert alike < 10


def test_without_a_run_in_integers_they_take_what_their_kernels_took() -> None:
    kernels = [KernelTime(call, made_up_ms(call)) for call in (conv(16, 16, 8), quantised(16, 16, 8))]
    model = LatencyModel(kernels, [run([kernels[0].call] * count, count * kernels[0].ms) for count in range(1, 9)])
    assert model.run_ms([kernels[1].call]) == pytest.approx(kernels[1].ms, rel=0.1)


def test_silu_is_computed_in_floats() -> None:
    """Its kernel, QuickGelu, begins with the letter of the integer ones, which runs correct by another factor."""
    silu = KernelCall("QuickGelu", ((1, 8, 16, 16),), (1, 8, 16, 16))
    kernels = [KernelTime(call, ms) for call, ms in ((conv(16, 16, 8), 0.1), (quantised(16, 16, 8), 0.1), (silu, 0.1))]
    runs = [run([kernels[number].call] * count, share * 0.1 * count) for number, share in ((0, 0.5), (1, 1.0)) for count in range(1, 9)]
    assert LatencyModel(kernels, runs).run_ms([silu] * 4) == pytest.approx(0.5 * 0.1 * 4, rel=0.1)


def test_a_kernel_of_a_kind_never_measured_still_takes_some_time() -> None:
    model = LatencyModel([KernelTime(conv(8 * n, 16, 8), 0.1 * n) for n in range(1, 5)], [])
    assert 0 < model.run_ms([KernelCall("Softmax", ((1, 10),), (1, 10))]) < 1


def test_a_profile_without_kernels_is_refused() -> None:
    with pytest.raises(ProfileError, match="no kernel times"):
        LatencyModel([], [])
