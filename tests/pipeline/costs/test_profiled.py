from __future__ import annotations

import pytest

from pipeline.costs.profiled import block_probe, channel_block, profiled_kernels
from pipeline.errors import ProfileError
from tests.pipeline.costs.kernels import profiled_session


def test_a_machine_has_a_block_or_plain_layouts_and_its_probe_calls_it_so() -> None:
    optimised, events = profiled_session(block_probe().SerializeToString(), runs=3)
    block = channel_block(optimised)
    assert block in (0, 8, 16)
    calls = [time.call for time in profiled_kernels(optimised, events)]
    assert calls[0].output == (1, block or 1, 4, 4)
    assert calls[0].op == ("nchwc.Conv" if block else "Conv")


def test_the_time_of_a_kernel_is_the_median_of_the_runs_after_the_first_ones() -> None:
    optimised, events = profiled_session(block_probe().SerializeToString(), runs=4)
    name = f"{optimised.graph.node[0].name}_kernel_time"
    for event, dur in zip([event for event in events if event["name"] == name], (900, 10, 30, 20), strict=True):
        event["dur"] = dur
    assert profiled_kernels(optimised, events, warmup=1)[0].ms == pytest.approx(0.020)


def test_a_profile_of_another_model_or_without_runs_is_refused() -> None:
    optimised, events = profiled_session(block_probe().SerializeToString())
    with pytest.raises(ProfileError, match="does not fit"):
        profiled_kernels(optimised, [])
    with pytest.raises(ProfileError, match="does not fit"):
        profiled_kernels(optimised, events, warmup=1)
    optimised.graph.node[0].name = "another"
    with pytest.raises(ProfileError, match="does not fit"):
        profiled_kernels(optimised, events)
