from __future__ import annotations

import itertools
from typing import Any

import pytest

from pipeline.costs.link import Link, link_ms, reply_frame_bytes
from pipeline.errors import CoinferError, ParamsError
from pipeline.params import parse_params
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.limits import LatencyLimit, Limits, binding
from pipeline.search.pareto import Trial, choose
from tests.pipeline.search.fake_measures import measurement

RATES, REPLY = (0.1, 1.0, 10.0), reply_frame_bytes(10)
LINKS = tuple(Link(rate, 10) for rate in RATES)


def sent(frame_bytes: float = 200.0, own_ms: float = 5.0, at: Link = LINKS[1]) -> Measurement:
    """A split predicted for the link `at`."""
    over_link = link_ms(frame_bytes, REPLY, at)
    fields = measurement(0.9, own_ms + over_link, frame_bytes).to_dict() | {"device_ms": own_ms, "link_ms": over_link}
    return Measurement(**fields)


def test_a_limit_at_the_rate_predicted_for_is_the_prediction() -> None:
    for link in LINKS:
        assert LatencyLimit(1, (link,), REPLY).of(sent(at=link)) == pytest.approx(sent(at=link).total_ms)
        assert LatencyLimit(1, (link,), REPLY).of(sent(at=LINKS[0])) == pytest.approx(sent(at=link).total_ms), "whatever it was predicted for"


def test_of_several_rates_the_slowest_counts_and_of_a_distribution_the_share() -> None:
    at = [sent(at=link).total_ms for link in LINKS]
    assert LatencyLimit(1, LINKS, REPLY).of(sent()) == pytest.approx(at[0])
    shares = {0.5: at[2], 0.6: at[1], 0.9: at[1], 0.95: at[0], 1.0: at[0]}
    for share, expected in shares.items():
        assert LatencyLimit(1, LINKS, REPLY, (0.1, 0.4, 0.5), share).of(sent()) == pytest.approx(expected)


def test_what_sends_nothing_takes_as_long_over_any_link() -> None:
    local = measurement(0.9, 7.0, 0.0)
    assert LatencyLimit(1, LINKS, REPLY).of(local) == 7.0


@pytest.mark.parametrize(("name", "limit"), [("latency", LatencyLimit(30, LINKS[1:], REPLY)), ("energy_mj", 20.0), ("bundle_mb", 1.5), ("memory_mb", 0.9)])
def test_each_limit_keeps_out_what_misses_it_and_is_named(name: str, limit: Any) -> None:
    limits = Limits(**({"floor": 0.5, "memory_mb": 5.0} | {name: limit}))
    slow = Measurement(**(sent(4000.0).to_dict() | {"energy_mj": 21.0, "bundle_mb": 1.6, "device_memory_mb": 1.0}))
    good = Measurement(**(sent(40.0).to_dict() | {"energy_mj": 20.0, "bundle_mb": 1.5, "device_memory_mb": 0.9}))
    assert limits.allow(good)
    assert not limits.allow(slow)
    parameter = {"latency": "objective.max_latency_ms", "memory_mb": "memory_mb"}.get(name, f"objective.max_{name}")
    trial = Trial(0, Candidate("cut", (), 2, 1, 2), slow)
    with pytest.raises(CoinferError, match=rf"none of 1 candidates is within the limits: none keeps the limit on {name.split('_')[0]}; nearest .*{parameter}"):
        choose([trial], limits, "latency_ms")


def test_limits_that_exclude_each_other_are_both_named() -> None:
    limits = Limits(floor=0.8, memory_mb=2)
    accurate, small = measurement(0.9, 1, 1, memory_mb=3), measurement(0.7, 1, 1, memory_mb=1)
    assert binding([accurate, accurate, small], limits) == "1 would do without the limit on accuracy and 2 would do without the limit on memory"
    strict = Limits(floor=0.8, memory_mb=2, energy_mj=0.5)
    assert binding([accurate, small], strict) == "none keeps the limit on energy"
    mixed = Limits(floor=0.8, memory_mb=2, energy_mj=1)
    rows = [measurement(0.9, 2, 1, memory_mb=3), measurement(0.7, 2, 1, memory_mb=1), measurement(0.7, 1, 1, memory_mb=3)]
    assert binding(rows, mixed).endswith("none leaves out fewer than two of accuracy, energy, memory")


def test_params_say_where_latency_must_hold(digits_fields: dict[str, Any]) -> None:
    device = next(iter(digits_fields["devices"]))

    def limits(**objective: Any) -> Limits:
        return Limits.of(parse_params(digits_fields | {"objective": digits_fields["objective"] | objective}), device, 0.95, 10)

    assert limits().latency is None
    assert limits(max_latency_ms=50).latency == LatencyLimit(50, (Link(10, 1),), REPLY, (), 0.95, own=True)
    assert limits(max_latency_ms=50).budget_ms == 50
    found = limits(max_latency_ms=50, latency_rates_mbps=[0.1, 1], latency_probabilities=[0.2, 0.8], latency_share=0.9).latency
    assert limits(max_latency_ms=50, latency_rates_mbps=[1]).budget_ms is None, "what is predicted is for another rate"
    assert found == LatencyLimit(50, (Link(0.1, 1), Link(1, 1)), REPLY, (0.2, 0.8), 0.9)
    assert (limits(max_energy_mj=3).energy_mj, limits(max_bundle_mb=2).bundle_mb) == (3, 2)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"latency_rates_mbps": [1]}, "objective: latency_rates_mbps says where max_latency_ms must hold, and that is not set"),
        ({"max_latency_ms": 9, "latency_rates_mbps": [1], "latency_probabilities": [0.5, 0.5]}, "has 1 values and latency_probabilities 2; give one for each"),
        ({"max_latency_ms": 9, "latency_rates_mbps": [1, 2], "latency_probabilities": [0.5, 0.4]}, "latency_probabilities sum to 0.9; they must sum to 1"),
        ({"max_latency_ms": 9, "latency_rates_mbps": [-1]}, r"objective\.latency_rates_mbps\.0 is -1: input should be greater than 0"),
    ],
)
def test_rates_that_say_nothing_are_refused(digits_fields: dict[str, Any], objective: dict[str, Any], words: str) -> None:
    with pytest.raises(ParamsError, match=words):
        parse_params(digits_fields | {"objective": digits_fields["objective"] | objective})


def test_a_looser_limit_never_allows_less() -> None:
    rows = [measurement(a, t, b, m) for a, t, b, m in itertools.product((0.6, 0.9), (5.0, 50.0), (0.0, 300.0), (1.0, 4.0))]
    tight, loose = (Limits(0.7 - d, 2 + d, LatencyLimit(20 + 40 * d, LINKS[:1], REPLY), 10 + 50 * d, 3 + 6 * d) for d in (0, 1))
    assert {id(row) for row in rows if tight.allow(row)} < {id(row) for row in rows if loose.allow(row)}
