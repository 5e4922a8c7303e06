from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.measured_times import Spread
from pipeline.costs.profiled import block_probe, channel_block, profiled_kernels
from pipeline.errors import ProfileError
from tests.pipeline.costs.kernels import profiled_session
from tests.pipeline.costs.profiles import toy_profile


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


def test_a_kernel_that_reads_constants_alone_can_be_written_and_predicted_from() -> None:
    """As a constant that an int8 model keeps in integers until it is used."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y"))
    constants = {"c": np.ones((1, 4), np.uint8), "scale": np.array(0.5, np.float32), "zero": np.array(0, np.uint8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["c", "scale", "zero"], ["read"], name="dequantise"),
        helper.make_node("Sin", ["x"], ["sin"], name="sin"),
        helper.make_node("Add", ["sin", "read"], ["y"], name="add"),
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    timed = {time.call: time.ms for time in profiled_kernels(*profiled_session(model.SerializeToString()))}
    assert {call.op for call in timed} == {"DequantizeLinear", "Sin", "Add"}
    profile = replace(toy_profile(), kernels={**toy_profile().kernels, **{call: Spread(ms, ms, ms) for call, ms in timed.items()}})
    assert timed.keys() <= DeviceProfile.from_dict(profile.to_dict()).kernels.keys()
