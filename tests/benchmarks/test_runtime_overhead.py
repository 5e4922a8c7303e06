"""What is subtracted from a request belongs to that request, and small runs of all ways through real edges."""

import os
import shutil

import numpy as np
import pytest

from benchmarks import runtime_wire
from benchmarks.runtime_overhead import add_edge_times, figures, measure


@pytest.fixture(scope="module")
def raw():
    return measure(rounds=3, warm_up=1, wire_images=5)


def test_an_edge_s_times_go_to_the_requests_it_was_asked_in_their_order():
    samples = {"tcp": [{"onnx_ms": 1.0}, {"onnx_ms": 2.0}], "grpc": [{"onnx_ms": 3.0}]}
    add_edge_times(samples, ["tcp", "grpc", "tcp"], [0.1, 0.2, 0.3])
    assert samples == {"tcp": [{"onnx_ms": 1.1}, {"onnx_ms": 2.3}], "grpc": [{"onnx_ms": 3.2}]}
    with pytest.raises(RuntimeError, match="ran 2 times for 3 requests"):
        add_edge_times(samples, ["tcp", "grpc", "tcp"], [0.1, 0.2])


def test_every_way_is_measured_and_its_calls_of_onnx_runtime_and_the_coder_are_within_it(raw):
    assert set(raw["ways"]) == {"tcp", "tcp_static", "tcp_compact", "tcp_tls", "grpc"}
    for parts in raw["ways"].values():
        assert {len(times) for times in parts.values()} == {3}
        assert np.all(np.subtract(parts["total_ms"], parts["onnx_ms"]) > parts["coder_ms"])
        assert min(parts["coder_ms"]) > 0
    assert raw["frame_overhead_bytes"] == {"whole": 13, "compact": 6}


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces take root and iproute2")
def test_bytes_on_the_interface_are_the_frames_with_a_header_a_packet(raw):
    wire = raw["wire"]
    assert "why" not in wire, wire
    for name in ("tcp", "tcp_compact"):
        found = wire[name]["bytes"]
        assert found["up"] == pytest.approx(wire[name]["predicted_up"] + 52 * (found["up_packets"] - 1), abs=0.01)
    assert wire["tcp"]["bytes"]["up"] - wire["tcp"]["bytes"]["up_packets"] * 52 - (
        wire["tcp_compact"]["bytes"]["up"] - wire["tcp_compact"]["bytes"]["up_packets"] * 52
    ) == pytest.approx(7, abs=0.01)
    assert wire["grpc"]["bytes"]["up"] > wire["grpc"]["predicted_up"]


def test_figures_subtract_request_by_request_and_say_why_there_are_none():
    parts = {"total_ms": [3.0, 9.0, 4.0], "onnx_ms": [2.0, 8.5, 2.5], "coder_ms": [0.1, 0.2, 0.3]}
    raw = {"ways": {"tcp": parts}, "floor": {"tcp": [0.1, 0.3, 0.2]}, "frame_overhead_bytes": {"whole": 13}, "wire": {"why": "no root"}}
    found = figures(raw)
    assert found["overhead_ms.tcp"]["value"] == 1.0  # the difference of the medians would be 1.5
    assert (found["floor_ms.tcp"]["value"], found["frame_overhead_bytes"]["value"]) == (0.2, 13)
    assert (found["wire_bytes_per_image.grpc"]["value"], found["wire_bytes_per_image.grpc"]["how"]) == (None, "no root")
    assert set(runtime_wire.figures({"why": "no root"})) <= set(found)
