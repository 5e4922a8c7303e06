from __future__ import annotations

import time

import pytest

from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.timing import REHEARSALS, Stopwatch, timed
from pipeline.runtime.transport import LoopbackTransport


def _elapsed_ms(work):
    start = time.perf_counter()
    return work(), (time.perf_counter() - start) * 1e3


@pytest.mark.parametrize(("slowdown", "calls"), [(1, 1), (1.9, 1), (2, 2), (3, 3), (100, REHEARSALS + 1)])
def test_a_slowed_result_comes_when_a_slower_machine_would_give_it(slowdown, calls):
    given = []

    def work(watch: Stopwatch) -> str:
        given.append(watch)
        with watch.part("a"):
            time.sleep(0.002)
        with watch.part("b"):
            time.sleep(0.001)
        return "result"

    (result, parts), elapsed_ms = _elapsed_ms(lambda: timed(work, slowdown))
    assert result == "result"
    assert len(given) == calls
    assert parts == {name: slowdown * ms for name, ms in given[-1].parts.items()}
    assert parts["a"] >= slowdown * 2
    assert elapsed_ms >= sum(parts.values())


def test_work_that_fails_fails_at_once():
    def work(watch: Stopwatch) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        timed(work, 50)


def test_both_halves_take_as_long_as_they_say(make_bundle, picture):
    bundle = make_bundle()
    device, transport = DeviceHalf(bundle, slowdown=200), LoopbackTransport(EdgeHalf(bundle, slowdown=300))
    device.classify(picture, transport)
    answer, elapsed_ms = _elapsed_ms(lambda: device.classify(picture, transport))
    assert elapsed_ms >= answer.parts["total_ms"]
    assert answer.parts["encode_ms"] > 0.2  # under 0.05 ms by itself
    assert answer.parts["decode_ms"] > 0.2
    answer, elapsed_ms = _elapsed_ms(lambda: device.classify_locally(picture))
    assert elapsed_ms >= answer.parts["total_ms"]
