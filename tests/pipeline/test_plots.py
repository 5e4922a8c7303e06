from __future__ import annotations

import io

import pytest
from matplotlib.figure import Figure

from pipeline.plots import latency_against_rate, latency_breakdown

PARTS = {
    "split": {"device_ms": 5.0, "encode_ms": 1.0, "link_ms": 20.0, "decode_ms": 0.5, "edge_ms": 2.0, "total_ms": 28.5},
    "device_only": {"device_ms": 40.0, "encode_ms": 0.0, "link_ms": 0.0, "decode_ms": 0.0, "edge_ms": 0.0, "total_ms": 40.0},
}


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def test_breakdown_stacks_every_part_of_every_mode_up_to_its_total() -> None:
    (axes,) = latency_breakdown(PARTS, "medians").axes
    ends = {row: max(bar.get_x() + bar.get_width() for bar in axes.patches if round(bar.get_y() + 0.3) == row) for row in (0, 1)}
    assert ends == pytest.approx({0: 28.5, 1: 40.0})
    assert [label.get_text() for label in axes.get_yticklabels()] == ["split", "device-only"]
    assert [text.get_text() for text in axes.texts] == ["28.5 ms", "40 ms"]


def test_latency_against_rate_has_a_line_a_mode_and_marks_the_configured_rate() -> None:
    rates = [0.1, 1.0, 10.0]
    (axes,) = latency_against_rate(rates, {"split": [9.0, 3.0, 2.0], "edge_only": [90.0, 9.0, 2.0]}, 1.0, "camera").axes
    assert [line.get_label() for line in axes.lines] == ["split", "edge-only", "1 Mbit/s"]
    assert list(axes.lines[0].get_xdata()) == rates
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_the_same_numbers_draw_the_same_bytes() -> None:
    assert png(latency_breakdown(PARTS, "medians")) == png(latency_breakdown(PARTS, "medians"))
