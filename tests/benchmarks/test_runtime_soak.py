"""Some seconds of a soak with real parts: device, relay and server in processes of their own."""

import json

from benchmarks.runtime_soak import figures, soak
from benchmarks.runtime_start import pictures
from benchmarks.soak_account import DRAIN, KILL, RESET
from tests.pipeline.runtime.conftest import bundle_in


def test_every_picture_is_answered_once_whatever_happens_to_link_and_server(tmp_path) -> None:
    raw = json.loads(json.dumps(soak(bundle_in(tmp_path), pictures(20), 6.0, 300, cuts=1, kills=1, seed=0)))
    assert raw["records"] == {"asked": 300, "answered": 300, "lost": 0, "doubled": 0, "wrong": 0}
    assert sorted(outage["kind"] for outage in raw["outages"]) == sorted((DRAIN, KILL, RESET))
    assert [life["end"] for life in raw["lives"]] == [each["kind"] for each in raw["outages"] if each["kind"] != RESET] + ["end"]
    assert raw["split"] > 0, raw["why"]
    assert raw["split"] < 300
    assert sum(raw["why"].values()) == 300 - raw["split"]
    assert raw["memory"]["device_kib"]
    found = figures(raw)
    assert (found["soak_lost"]["value"], found["soak_doubled"]["value"], found["soak_kills"]["value"], found["soak_cuts"]["value"]) == (0, 0, 1, 1)
    assert -2 * len(raw["lives"]) <= found["soak_edge_unused"]["value"] <= 10
