from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from benchmarks.end_to_end import RATES_MBPS, RTTS_MS, SLOWDOWNS, Way, frame_size, grid, medians, through_link, time_parts, total_ms
from models.codec import CodecSpec
from models.coinference import build_split
from pipeline.costs.link import Link
from pipeline.onnx_export import export_onnx
from pipeline.runtime.coder import build_tables
from tests.tiny import tiny_backbone

IMAGE = Way("image", 0.9, 300, ours=False, real_cut=False, sent="image", image_size=16)
LOCAL = Way("device-only", 0.9, 0, ours=False, real_cut=False, sent="nothing", image_size=16)
SPLIT = Way("split", 0.895, 40, ours=True, real_cut=True, sent="symbols", image_size=16)
TIMES = {
    "image": {"device_ms": 0.0, "encode_ms": 0.2, "decode_ms": 0.2, "edge_ms": 1.0},
    "device-only": {"device_ms": 1.0, "encode_ms": 0.0, "decode_ms": 0.0, "edge_ms": 0.0},
    "split": {"device_ms": 0.4, "encode_ms": 0.0, "decode_ms": 0.0, "edge_ms": 0.7},
}


def test_the_pick_is_the_least_predicted_and_is_judged_by_what_it_took() -> None:
    optimistic = TIMES | {"split": {part: ms / 1.3 for part, ms in TIMES["split"].items()}}
    places = grid([IMAGE, LOCAL, SPLIT], optimistic, TIMES, 0.89, 10)
    assert len(places) == len(SLOWDOWNS) * len(RTTS_MS) * len(RATES_MBPS)
    for place in places:
        link = Link(place.rate_mbps, place.rtt_ms)
        took = {way.name: total_ms(way, TIMES[way.name], place.slowdown, link, 10) for way in (IMAGE, LOCAL, SPLIT)}
        assert place.pick_ms == took[place.pick]
        assert (place.baseline, place.baseline_ms) == min(((name, took[name]) for name in ("image", "device-only")), key=lambda pair: pair[1])
        assert (place.cut, place.cut_ms) == ("split", took["split"])
    assert {place.pick for place in places} == {"image", "device-only", "split"}
    assert max(place.ratio for place in places) > 1, "a prediction too good sometimes picks wrong"
    assert min(place.ratio for place in places if place.real_cut) < 1


def test_what_is_below_the_floor_is_neither_picked_nor_a_baseline() -> None:
    places = grid([IMAGE, replace(LOCAL, accuracy=0.8), SPLIT], TIMES, TIMES, 0.89, 10)
    assert {place.baseline for place in places} == {"image"}
    without = grid([IMAGE, LOCAL, replace(SPLIT, accuracy=0.88)], TIMES, TIMES, 0.89, 10)
    assert {place.pick for place in without} == {"image", "device-only"}
    assert {place.cut for place in without} == {None}


def test_the_best_split_is_the_fastest_measured_of_ours_whatever_was_predicted() -> None:
    slower, theirs = replace(SPLIT, name="slower"), replace(SPLIT, name="theirs", ours=False)
    times = TIMES | {"slower": TIMES["split"] | {"encode_ms": 0.1}, "theirs": TIMES["split"] | {"device_ms": 0.1}}
    faster = replace(SPLIT, name="loses on test", holds=False)
    times |= {faster.name: TIMES["split"] | {"device_ms": 0.1}}
    for place in grid([IMAGE, LOCAL, slower, SPLIT, theirs, faster], times | {"slower": dict.fromkeys(TIMES["split"], 0.0)}, times, 0.89, 10):
        assert place.cut == "split"


def test_every_way_runs_in_process_and_through_the_link() -> None:
    torch.manual_seed(0)
    network, example = tiny_backbone(3, 16).eval(), torch.randn(2, 3, 16, 16)
    whole = export_onnx(network, example, input_name="image", output_name="logits")
    coded = build_split(network, example, "block1", CodecSpec("uniform", 4, 2, 3)).eval()
    with torch.no_grad():
        symbols = coded.device_half()(example)
    halves = {
        "device": export_onnx(coded.device_half(), example, input_name="image", output_name="symbols"),
        "edge": export_onnx(coded.edge_half(), symbols, input_name="symbols", output_name="logits"),
    }
    split = replace(SPLIT, tables=build_tables(symbols.numpy(), 3), shape=coded.codec.code_shape, **halves)
    ways = [replace(IMAGE, edge=whole), replace(IMAGE, name="jpeg", image_format="jpeg-bare", quality=60, edge=whole), replace(LOCAL, device=whole), split]
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), np.uint8)
    found = {name: medians(parts) for name, parts in time_parts(ways, images, 2).items()}
    assert [name for name, parts in found.items() if parts["device_ms"] == 0] == ["image", "jpeg"]
    assert [name for name, parts in found.items() if parts["edge_ms"] == 0] == ["device-only"]
    times = through_link(ways, images, 1.0, Link(0.1, 30.0))
    assert {name: len(values) for name, values in times.items()} == {way.name: 4 for way in ways}
    assert min(times["split"]) > 30 + 8 * 52 * 2 / 100
    assert frame_size([27, 29]) == 41
