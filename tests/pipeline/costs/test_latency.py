"""Predicted parts: the sums of METHODS 4, and what must not be predicted."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.costs.latency import HalfCosts, mean_wire_bytes, predict
from pipeline.costs.link import Link
from pipeline.errors import ProfileError
from tests.pipeline.costs.profiles import KEY, toy_profile

LINK = Link(rate_mbps=0.1, rtt_ms=10)
SPLIT = HalfCosts("split", KEY, "stem", {"stem": 1000}, encoder_macs=200, decoder_macs=200, symbols=100, frame_bytes=148, reply_bytes=48)
DEVICE_ONLY = HalfCosts("device-only", KEY, "output", {"stem": 1000, "body": 2000, "output": 160})
EDGE_ONLY = HalfCosts("edge-only", KEY, "input", {}, frame_bytes=148, quality=60, reply_bytes=48)
UP_AND_DOWN_MS = 8 * 200 / 100 + 10 + 8 * 100 / 100


def test_a_split_adds_its_parts_up() -> None:
    parts = predict(SPLIT, toy_profile(), toy_profile(), LINK)
    assert parts["device_ms"] == pytest.approx(0.25 + 0.5 + 1 * 3 / 4 + 0.2)
    assert parts["encode_ms"] == pytest.approx(0.01 + 0.1)
    assert parts["link_ms"] == pytest.approx(UP_AND_DOWN_MS)
    assert parts["decode_ms"] == pytest.approx(0.02 + 0.2)
    assert parts["edge_ms"] == pytest.approx(0.5 + 3 * 3 / 4 + 0.5)
    assert parts["total_ms"] == pytest.approx(sum(parts.values()) - parts["total_ms"])


def test_device_only_is_the_whole_network_as_measured_and_sends_nothing() -> None:
    parts = predict(DEVICE_ONLY, toy_profile(), toy_profile(), LINK)
    assert parts["device_ms"] == parts["total_ms"] == pytest.approx(0.25 + 3.5)
    assert parts["link_ms"] == parts["edge_ms"] == parts["encode_ms"] == parts["decode_ms"] == 0


def test_edge_only_pays_for_webp_and_the_link() -> None:
    parts = predict(EDGE_ONLY, toy_profile(), toy_profile(), LINK)
    assert parts["device_ms"] == 0
    assert parts["encode_ms"] == pytest.approx(1.3)
    assert parts["link_ms"] == pytest.approx(UP_AND_DOWN_MS)
    assert parts["decode_ms"] == pytest.approx(0.7)
    assert parts["edge_ms"] == pytest.approx(0.25 + 3.5)
    assert predict(replace(EDGE_ONLY, quality=100), toy_profile(), toy_profile(), LINK)["encode_ms"] == pytest.approx(4)


def test_a_slow_device_slows_only_what_the_device_does() -> None:
    plain, slow = (predict(SPLIT, device, toy_profile(), LINK) for device in (toy_profile(), toy_profile().slowed(20)))
    assert slow["device_ms"] == pytest.approx(20 * plain["device_ms"])
    assert slow["encode_ms"] == pytest.approx(20 * plain["encode_ms"])
    assert [slow[part] for part in ("link_ms", "decode_ms", "edge_ms")] == [plain[part] for part in ("link_ms", "decode_ms", "edge_ms")]


@given(st.floats(0, 1), st.floats(0, 1))
def test_pruning_more_never_costs_more(a: float, b: float) -> None:
    fewer, more = (predict(replace(SPLIT, block_macs={"stem": 1000 * share}), toy_profile(), toy_profile(), LINK)["device_ms"] for share in sorted((a, b)))
    assert fewer <= more + 1e-12


@given(st.floats(0.01, 100), st.floats(1.01, 10))
def test_a_faster_link_never_costs_more(rate_mbps: float, factor: float) -> None:
    slow, fast = (predict(SPLIT, toy_profile(), toy_profile(), Link(rate, 10))["total_ms"] for rate in (rate_mbps, rate_mbps * factor))
    assert fast < slow


def test_a_mean_size_keeps_its_fraction_on_the_wire() -> None:
    assert mean_wire_bytes(100.25) == pytest.approx(152.25)
    assert mean_wire_bytes(1448) == 1500


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (replace(SPLIT, backbone_key="toy@3x32x32"), r"no toy@3x32x32, only toy@3x16x16; set .*measure --into"),
        (replace(SPLIT, cut="nowhere"), "no cut nowhere; it has input, stem, body, output"),
        (replace(SPLIT, block_macs={"stem": 1, "body": 1}), "block body is missing or too many"),
        (replace(DEVICE_ONLY, block_macs={"stem": 1}), "block body is missing or too many"),
        (replace(DEVICE_ONLY, kind="split"), r"no encoder for the feature at cut output \(10\)"),
        (replace(EDGE_ONLY, quality=None), "quality"),
    ],
)
def test_what_was_not_measured_is_not_guessed(costs: HalfCosts, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        predict(costs, toy_profile(), toy_profile(), LINK)
