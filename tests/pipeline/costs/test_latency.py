"""Predicted parts: the sums of METHODS 4, and what must not be predicted."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.codec import CodecSpec, UniformCodec
from models.cutting import split
from models.operations import chained, operations
from pipeline.costs.latency import HalfCosts, predict
from pipeline.costs.link import Link
from pipeline.errors import ProfileError
from tests.pipeline.costs.profiles import CALL_MS, kernel_ms, toy_profile, whole
from tests.tiny import tiny_backbone

LINK = Link(rate_mbps=0.1, rtt_ms=10)
UP_AND_DOWN_MS = 8 * 200 / 100 + 10 + 8 * 100 / 100
DEVICE_ONLY = HalfCosts("device-only", 16, device=whole())
EDGE_ONLY = HalfCosts("edge-only", 16, edge=whole(), frame_bytes=148, image=("webp", 60), reply_bytes=48)


def halves(cut: str, width: int = 4) -> HalfCosts:
    head, tail = split(tiny_backbone(10, 16).eval(), torch.zeros(1, 3, 16, 16), cut)
    before = operations(head, torch.zeros(1, 3, 16, 16))
    shape = before[-1].output[1:]
    codec = UniformCodec(CodecSpec("uniform", width, 2, 4), shape).eval()
    encoder = operations(nn.Sequential(codec.encode, codec.quantise), torch.zeros(1, *shape))
    decoder = operations(nn.Sequential(codec.dequantise, codec.decode), torch.zeros(1, *codec.code_shape, dtype=torch.uint8))
    edge = chained(decoder, operations(tail, torch.zeros(1, *shape)))
    return HalfCosts("split", 16, device=chained(before, encoder), edge=edge, symbols=100, frame_bytes=148, reply_bytes=48)


SPLIT = halves("block1")


def test_a_split_adds_its_parts_up() -> None:
    device, edge = toy_profile(), toy_profile()
    parts = predict(SPLIT, device, edge, LINK)
    assert parts["device_ms"] == pytest.approx(0.25 + device.half_ms(SPLIT.device))
    assert parts["encode_ms"] == pytest.approx(0.01 + 0.1)
    assert parts["link_ms"] == pytest.approx(UP_AND_DOWN_MS)
    assert parts["decode_ms"] == pytest.approx(0.02 + 0.2)
    assert parts["edge_ms"] == pytest.approx(edge.half_ms(SPLIT.edge))
    assert parts["total_ms"] == pytest.approx(sum(parts.values()) - parts["total_ms"])


def test_a_network_that_was_measured_takes_what_its_kernels_took() -> None:
    parts = predict(DEVICE_ONLY, toy_profile(), toy_profile(), LINK)
    known = toy_profile().runs[0]
    assert known.median_ms == pytest.approx(CALL_MS + sum(kernel_ms(call, 1.0) for call in known.calls))
    assert parts["device_ms"] == parts["total_ms"] == pytest.approx(0.25 + known.median_ms, rel=0.05)
    assert parts["link_ms"] == parts["edge_ms"] == parts["encode_ms"] == parts["decode_ms"] == 0


def test_edge_only_pays_for_the_image_and_the_link() -> None:
    parts = predict(EDGE_ONLY, toy_profile(), toy_profile(), LINK)
    assert parts["device_ms"] == 0
    assert parts["encode_ms"] == pytest.approx(1.3)
    assert parts["link_ms"] == pytest.approx(UP_AND_DOWN_MS)
    assert parts["decode_ms"] == pytest.approx(0.65)
    assert parts["edge_ms"] == pytest.approx(0.25 + toy_profile().half_ms(whole()))
    for image, expected in ((("webp", 100), 4), (("jpeg", 75), 0.3), (("png", 1), 2)):
        assert predict(replace(EDGE_ONLY, image=image), toy_profile(), toy_profile(), LINK)["encode_ms"] == pytest.approx(expected)


def test_a_slow_device_slows_only_what_the_device_does() -> None:
    plain, slow = (predict(SPLIT, device, toy_profile(), LINK) for device in (toy_profile(), toy_profile().slowed(20)))
    assert slow["device_ms"] == pytest.approx(20 * plain["device_ms"])
    assert slow["encode_ms"] == pytest.approx(20 * plain["encode_ms"])
    assert [slow[part] for part in ("link_ms", "decode_ms", "edge_ms")] == [plain[part] for part in ("link_ms", "decode_ms", "edge_ms")]


def test_more_work_takes_longer_and_a_device_of_another_speed_in_proportion() -> None:
    profile, fast = toy_profile(), toy_profile(0.1)
    by_cut = [profile.half_ms(halves(cut).device) for cut in ("stem.2", "block1", "down.2", "block2")]
    assert by_cut == sorted(by_cut)
    narrow, wide = (profile.half_ms(halves("block1", width).edge) for width in (1, 8))
    assert narrow <= wide * 1.02
    assert fast.half_ms(whole()) < 0.5 * profile.half_ms(whole())


def test_an_int8_half_is_predicted_as_its_own_kernels() -> None:
    fp32, int8 = (predict(replace(SPLIT, precision=precision), toy_profile(), toy_profile(), LINK) for precision in ("fp32", "int8"))
    assert int8["device_ms"] > 0.25
    assert int8["device_ms"] != fp32["device_ms"]
    assert int8["edge_ms"] == fp32["edge_ms"]


@given(st.floats(0.01, 100), st.floats(1.01, 10))
def test_a_faster_link_never_costs_more(rate_mbps: float, factor: float) -> None:
    profile = toy_profile()
    slow, fast = (predict(EDGE_ONLY, profile, profile, Link(rate, 10))["total_ms"] for rate in (rate_mbps, rate_mbps * factor))
    assert fast < slow


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (replace(EDGE_ONLY, image=None), r"edge-only costs with image None"),
        (replace(EDGE_ONLY, image=("jpeg-bare", 50)), r"no times of jpeg-bare images, only webp, jpeg, png"),
        (replace(EDGE_ONLY, edge=()), r"edge-only costs lack the operations of the edge half"),
        (replace(DEVICE_ONLY, edge=whole()), r"device-only costs have operations of the edge half"),
        (replace(SPLIT, image=("webp", 50)), r"split costs with image"),
        (replace(SPLIT, device=()), r"split costs lack the operations of the device half"),
    ],
)
def test_what_makes_no_sense_is_not_predicted(costs: HalfCosts, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        predict(costs, toy_profile(), toy_profile(), LINK)
