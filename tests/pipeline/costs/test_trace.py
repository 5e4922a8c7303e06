"""Rates over time: what a trace lets pass, and which files are none."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.costs.link import Link, Serialiser
from pipeline.costs.trace import Trace
from pipeline.errors import ParamsError


def passed_bits(trace: Trace, start_ms: float, end_ms: float) -> float:
    """By adding up sample after sample."""
    edges_ms = [1e3 * (time - trace.times_s[0]) for time in (*trace.times_s, trace.end_s)]
    bits, round_ms = 0.0, start_ms // edges_ms[-1] * edges_ms[-1]
    while round_ms < end_ms:
        for first, last, rate in zip(edges_ms, edges_ms[1:], trace.rates_mbps, strict=False):
            bits += 1e3 * rate * max(0.0, min(end_ms, round_ms + last) - max(start_ms, round_ms + first))
        round_ms += edges_ms[-1]
    return bits


RATES = st.lists(st.sampled_from([0.0, 0.1, 1.0, 7.5]), min_size=2, max_size=6).filter(any)


@given(RATES, st.floats(0, 20_000), st.integers(1, 10**6))
def test_bytes_are_through_as_soon_as_the_rates_add_up_to_them(rates: list[float], start_ms: float, n_bytes: int) -> None:
    trace = Trace(tuple(5.0 + 0.5 * index for index in range(len(rates))), tuple(rates), 5.0 + 0.5 * len(rates))
    done_ms = trace.done_ms(start_ms, n_bytes)
    assert passed_bits(trace, start_ms, done_ms) == pytest.approx(8 * n_bytes, rel=1e-6, abs=1e-3)
    assert passed_bits(trace, start_ms, done_ms - 0.01) < 8 * n_bytes, "not a moment later than needed"


def test_a_stall_holds_everything_back_until_it_is_over() -> None:
    trace = Trace.stalling(1.0, every_s=10, for_s=2)
    assert trace.done_ms(0, 125) == pytest.approx(1)
    assert trace.done_ms(8_500, 125) == pytest.approx(10_001)
    assert trace.done_ms(7_999.5, 125) == pytest.approx(10_000.5)
    assert trace.mean_mbps == pytest.approx(0.8)


def test_a_serialiser_follows_the_trace() -> None:
    line = Serialiser(Link(1, rtt_ms=10), Trace((0, 1), (1, 2), 2))
    assert line.arrival_ms(0, 12_500) == pytest.approx(100 + 5)
    assert line.arrival_ms(50, 12_500) == pytest.approx(200 + 5), "behind the first"
    assert line.arrival_ms(1_000, 12_500) == pytest.approx(1_050 + 5)


@pytest.mark.parametrize(
    "text",
    [
        "0,1\n1,0\n2,3\n",
        "time_s,rate_mbps\n10,1\n11,0\n12,3\n",
        "# LTE, on a bus\n\n0 1 # home\n1\t0\n2;3",
        "Zeit Mbit/s\n0.0  1.0\n1.0  0\n2e0 3\n",
        "\ufeff0,1\n1,0\n2,3\n",
    ],
)
def test_published_forms_are_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "bus.csv").write_text(text)
    trace = Trace.load(tmp_path / "bus.csv")
    assert trace.rates_mbps == (1, 0, 3)
    assert trace.end_s - trace.times_s[0] == 3
    assert trace.done_ms(0, 125_000) == pytest.approx(1_000)
    assert trace.done_ms(0, 125_125) == pytest.approx(2_000 + 1 / 3)
    assert trace.done_ms(3_000, 125_000) == pytest.approx(4_000), "and from the start again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds 0 samples"),
        ("0,1\n", "holds 1 samples"),
        ("0,1\n1,-2\n2,1\n", r"line 2: a rate of -2 Mbit/s; none can be negative"),
        ("0,1\n1,nan\n2,1\n", "line 2: '1,nan' is not a time in seconds and a rate"),
        ("0,1\n1\n2,1\n", "line 2: '1' is not a time"),
        ("0,1\n1,1,1\n", "line 2: '1,1,1' is not a time"),
        ("0,1\n2,1\n1,1\n", "line 3: 1 s comes after 2 s; sort"),
        ("0,1\n0,1\n", "line 2: 0 s comes after 0 s"),
        ("0,1\n1,1\n2,1\n60,1\n61,1\n", "line 4: 58 s are missing before it, where samples are 1 s apart; fill the gap"),
        ("0,1\n1,1\n5,1\n6,1\n7,1\n", "line 3: 4 s are missing"),
        ("O,9\n1,1\n2,1\n", "line 1: 'O,9' is not a time"),
        ("time,rate\nnan,nan\n1,1\n2,1\n", "line 2: 'nan,nan' is not a time"),
        ("0,0\n1,0\n", "not all 0"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ParamsError, match=rf"bad\.csv.*{message}"):
        Trace.load(tmp_path / "bad.csv")


def test_a_trace_that_is_no_text_or_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\0")
    for path in (tmp_path / "bytes.csv", tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(ParamsError, match="cannot be read as a trace"):
            Trace.load(path)


@pytest.mark.parametrize(("every_s", "for_s"), [(2, 2), (1, 2), (2, 0), (2, -1), (float("nan"), 1), (float("inf"), 1)])
def test_a_stall_that_leaves_no_time_is_refused(every_s: float, for_s: float) -> None:
    with pytest.raises(ParamsError, match="a stall of"):
        Trace.stalling(1, every_s, for_s)
