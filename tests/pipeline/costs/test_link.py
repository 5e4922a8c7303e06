"""The link's arithmetic: bytes on the wire and the serialising rule, on an injected clock."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.costs.link import Link, Serialiser, link_ms, mean_wire_bytes, wire_bytes
from pipeline.errors import ParamsError


def test_every_tcp_segment_costs_one_header() -> None:
    assert wire_bytes(100) == 152
    assert wire_bytes(1448) == 1500
    assert wire_bytes(1449) == 1449 + 2 * 52


def test_a_mean_size_keeps_its_fraction_on_the_wire() -> None:
    assert mean_wire_bytes(100.25) == pytest.approx(152.25)
    assert mean_wire_bytes(1448) == 1500


def test_a_request_pays_both_ways_and_one_round_trip() -> None:
    assert link_ms(148, 48, Link(rate_mbps=0.1, rtt_ms=10)) == pytest.approx(8 * 200 / 100 + 10 + 8 * 100 / 100)


def test_a_lone_frame_waits_for_nothing_but_its_own_bits() -> None:
    """Issue 2: a lone 100-byte frame at 0.1 Mbit/s takes exactly 8 * wire_bytes / rate."""
    clock_ms = 12_345.0
    arrival_ms = Serialiser(Link(rate_mbps=0.1, rtt_ms=0)).arrival_ms(clock_ms, wire_bytes(100))
    assert arrival_ms - clock_ms == pytest.approx(8 * 152 / 0.1e3, rel=1e-12)
    assert arrival_ms - clock_ms == pytest.approx(12.16, rel=1e-9)


def test_a_second_frame_queues_behind_the_first_and_an_idle_link_forgets() -> None:
    link = Serialiser(Link(rate_mbps=1, rtt_ms=10))
    assert link.arrival_ms(0, 1250) == pytest.approx(10 + 5)
    assert link.arrival_ms(2, 1250) == pytest.approx(20 + 5)
    assert link.arrival_ms(100, 1250) == pytest.approx(110 + 5)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5000)), min_size=1, max_size=20))
def test_the_link_never_sends_faster_than_its_rate(requests: list[tuple[float, int]]) -> None:
    link = Link(rate_mbps=0.5, rtt_ms=4)
    serialiser, now_ms, sent = Serialiser(link), 0.0, 0
    for gap_ms, n_bytes in requests:
        now_ms += gap_ms
        sent += n_bytes
        arrival_ms = serialiser.arrival_ms(now_ms, n_bytes)
        assert arrival_ms >= now_ms + link.transmit_ms(n_bytes) + 2 - 1e-9
        assert arrival_ms >= link.transmit_ms(sent) + 2 - 1e-6


@pytest.mark.parametrize(
    ("rate_mbps", "rtt_ms", "named"), [(0, 1, "rate_mbps"), (math.inf, 1, "rate_mbps"), (math.nan, 1, "rate_mbps"), (1, -1, "rtt_ms"), (1, math.nan, "rtt_ms")]
)
def test_a_link_that_cannot_exist_is_refused(rate_mbps: float, rtt_ms: float, named: str) -> None:
    with pytest.raises(ParamsError, match=f"link.{named}"):
        Link(rate_mbps, rtt_ms)
