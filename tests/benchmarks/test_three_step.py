"""Which point becomes a figure, and when none does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.end_to_end import Place, Way
from benchmarks.image_points import ImagePoint
from benchmarks.noise import pam, sigma
from benchmarks.split_points import Point, epochs_of_all
from benchmarks.three_step import cheapest_alike, places_of, to_be_judged, worth_checking
from benchmarks.three_step_figures import coder_figures, end_to_end_figures, figures_of, pruning_figures
from benchmarks.three_step_points import CUTS, EARLY_RATE, RATE_EPOCHS, VECTOR, every_point, uncoded
from models.backbones import build_backbone
from models.codecs import build_codec
from models.cutting import cut_points

FIRST = CUTS["resnet20"]["first"]
REFERENCES = {"resnet20": {"validation": 0.9, "test": 0.88, "better": "further"}}


def sizes(bits: float) -> dict[str, Any]:
    return {"payload_bits": {"mean": bits, "p95": bits}, "frame_bytes": {"mean": bits / 8 + 13, "p95": bits / 8 + 13}, "uncoded_bits": 4 * bits}


def split(kind: str, bits: float, validation: float, test: float | None) -> dict[str, Any]:
    codec = {"kind": kind, "code_channels": 8, "stride": 4, "bits": 4, "rate_weight": 0.001}
    row = {"point": {"backbone": "resnet20", "cut": FIRST, "codec": codec}, "validation": {"accuracy": validation, **sizes(bits)}}
    return row | ({"test": {"accuracy": test, **sizes(bits)}} if test is not None else {})


def webp(bits: float, validation: float, test: float, epochs: int = 0) -> dict[str, Any]:
    point = {"backbone": "resnet20", "image_format": "webp", "quality": 50, "epochs": epochs}
    return {"point": point, "validation": {"accuracy": validation, **sizes(bits)}, "test": {"accuracy": test, **sizes(bits)}}


def figures(*rows: dict[str, Any]) -> dict[str, Any]:
    return figures_of({"points": {str(number): row for number, row in enumerate(rows)}, "references": REFERENCES})


def test_the_cheapest_point_within_a_point_on_validation_is_the_figure() -> None:
    rows = split("rate", 300, 0.891, 0.871), split("uniform", 200, 0.890, 0.8676), split("rate", 100, 0.889, 0.88), split("bottlenet++", 10, 0.9, 0.9)
    assert figures(*rows, webp(800, 0.895, 0.875))["bits_over_webp.first"]["value"] is None, "not before WebP that was trained on is there too"
    found = figures(*rows, webp(800, 0.895, 0.875), webp(900, 0.895, 0.875, epochs=3))
    assert found["bits_at_1pt.resnet20.first"]["value"] == 200
    assert "uniform" in found["bits_at_1pt.resnet20.first"]["how"]
    assert found["frame_bytes_at_1pt.resnet20.first"]["value"] == 38
    assert found["bits_over_bottlenetpp.first"]["value"] == 5
    assert found["bits_over_bottlenetpp_coded.first"]["value"] == 20
    assert found["bits_over_webp.first"]["value"] == 0.25
    assert found["webp_bits_at_1pt"]["value"] == 800
    assert found["bits_at_1pt.resnet20.last"]["value"] is None


def test_a_point_that_loses_more_on_test_is_none_and_no_dearer_one_takes_its_place() -> None:
    found = figures(split("rate", 300, 0.9, 0.88), split("rate", 100, 0.891, 0.867))
    assert found["bits_at_1pt.resnet20.first"]["value"] is None
    assert "1.30 points on test" in found["bits_at_1pt.resnet20.first"]["how"]


def test_a_configuration_is_judged_by_the_mean_of_its_seeds() -> None:
    rows = {f"a, seed {seed}": split("rate", 90 + 10 * seed, 0.889 + 0.001 * seed, 0.8665 + 0.002 * seed) for seed in range(3)}
    lucky = {"b, seed 0": split("rate", 50, 0.8895, 0.88), "c": split("rate", 300, 0.895, 0.88)}
    found = figures_of({"points": rows | lucky, "references": REFERENCES})["bits_at_1pt.resnet20.first"]
    assert (found["value"], found["n"], found["spread"]) == (100, 3, [90, 110])
    del rows["a, seed 2"]["test"]
    assert figures_of({"points": rows, "references": REFERENCES})["bits_at_1pt.resnet20.first"]["value"] is None


def test_nothing_is_claimed_before_a_test_reading() -> None:
    found = figures(split("rate", 100, 0.895, None))
    assert found["bits_at_1pt.resnet20.first"]["value"] is None
    assert found["bits_at_1pt.resnet20.first"]["how"] == "not judged on test yet"


def test_what_rate_saves_is_the_median_over_cuts_of_points_half_a_point_below() -> None:
    rows = []
    for number, cut in enumerate(CUTS["resnet20"].values(), start=1):
        for kind, bits, accuracy in (("rate", 100 * number, 0.896), ("rate", 50, 0.894), ("uniform", 400, 0.896), ("uniform", 150, 0.894)):
            row = split(kind, bits, accuracy, accuracy - 0.02)
            rows.append({**row, "point": {**row["point"], "cut": cut}})
    assert figures(*rows)["rate_saving_at_half_pt"]["value"] == pytest.approx(0.5)
    assert figures(*rows[:4])["rate_saving_at_half_pt"]["value"] is None
    rows[0]["test"]["accuracy"] = 0.872
    assert figures(*rows)["rate_saving_at_half_pt"]["value"] is None, "three quarters of a point on test are too much"


def test_symbols_over_noise_are_judged_where_pam_is_nearest() -> None:
    row = split("jscc-awgn", 0, 0.89, None)
    row["validation"] = {
        "accuracy": 0.89,
        "channel_uses": 64,
        "analogue": {"5": 0.7, "10": 0.8, "20": 0.89},
        "pam 1": {"5": 0.6, "10": 0.7, "20": 0.8},
        "pam 2": {"5": 0.5, "10": 0.77, "20": 0.9},
    }
    few = {**row, "validation": {**row["validation"], "accuracy": 0.895, "channel_uses": 16, "pam 1": {"5": 0.69, "10": 0.79, "20": 0.88}}}
    fewer = {**row, "validation": {**row["validation"], "accuracy": 0.8, "channel_uses": 8}}
    assert figures(row, few, fewer)["jscc_symbols_at_1pt"]["value"] == 16
    assert figures(fewer)["jscc_symbols_at_1pt"]["value"] is None
    found = figures(row, few)["jscc_minus_pam_points_min"]
    assert found["value"] == pytest.approx(3)
    assert found["how"].startswith("at 10 dB, 64 channel uses")


def test_every_point_of_a_sweep_has_a_name_of_its_own_and_a_codec_that_fits_its_cut() -> None:
    points = list(every_point())
    assert len({point.name for point in points}) == len(points)
    for backbone, cuts in CUTS.items():
        network = build_backbone(backbone, 10, 32)
        shapes = {cut.name: cut.shape for cut in cut_points(network, torch.zeros(2, 3, 32, 32), "all")}
        mine = [uncoded(backbone), *(point for point in points if isinstance(point, Point) and point.backbone == backbone)]
        assert {point.cut for point in mine} - {VECTOR, *EARLY_RATE} == set(cuts.values())
        assert epochs_of_all(uncoded(backbone)) == max(epochs_of_all(point) for point in mine), "the reference gets as many"
        for codec, cut in {(point.codec, point.cut) for point in mine}:
            build_codec(codec, shapes[cut])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pam_is_exact_without_noise_and_wrong_as_often_as_theory_says(bits: int) -> None:
    torch.manual_seed(0)
    levels = torch.arange(2**bits) / (2**bits - 1)
    u = levels[torch.randint(2**bits, (200_000,))]
    assert torch.equal(pam(u, bits, 1e-6), u)
    noise = sigma(20)
    reach = 0.5 / (2**bits - 1) / noise
    tail = 0.5 * torch.erfc(torch.tensor(reach / 2**0.5)).item()
    assert (pam(u, bits, noise) != u).float().mean() == pytest.approx(2 * (1 - 2**-bits) * tail, abs=0.003)


def test_a_pruned_half_is_compared_with_the_same_split_unpruned_in_the_mean_over_seeds() -> None:
    def row(cut: str, codec: dict[str, Any], prune_epochs: int, macs: float, accuracy: float, seed: int = 0) -> dict[str, Any]:
        point = {"backbone": "resnet56", "cut": cut, "codec": codec, "seed": seed, "prune_epochs": prune_epochs}
        return {"key": "", "point": point, "head_macs": macs, "encoder_macs": 10, "validation": {"accuracy": accuracy}}

    codec = {"kind": "rate", "bits": 4}
    rows = [row(cut, codec, 0, 90, 0.9) for cut in CUTS["resnet56"].values()] + [row(cut, codec, 2, 30, 0.897) for cut in CUTS["resnet56"].values()]
    others = [row(cut, codec | {"bits": 1}, 0, 1000, 0.1) for cut in CUTS["resnet56"].values()]
    ratio = pruning_figures({"points": {str(number): each for number, each in enumerate([*others, *rows])}})["device_macs_ratio"]
    assert ratio["value"] == pytest.approx(0.4)
    rows[-1]["validation"]["accuracy"] = 0.894
    timed = {"end_to_end": {"pruned": {where: {"whole": [3.0, 3.0], "pruned": [2.0, 2.0]} for where in CUTS["resnet56"]}}}
    found = pruning_figures(timed | {"points": {str(number): each for number, each in enumerate(rows)}})
    assert found["device_macs_ratio"]["value"] is None
    assert [found[f"device_speedup.{where}"]["value"] for where in CUTS["resnet56"]] == [1.5, 1.5, None]
    last = CUTS["resnet56"]["last"]
    rows += [row(last, codec, 2, 30, 0.899, 1)]  # without its like unpruned it says nothing
    assert pruning_figures({"points": {str(number): each for number, each in enumerate(rows)}})["device_macs_ratio"]["value"] is None
    rows += [row(last, codec, 0, 90, 0.9, 1)]
    assert pruning_figures({"points": {str(number): each for number, each in enumerate(rows)}})["device_macs_ratio"]["value"] == pytest.approx(0.4)


def test_what_could_not_win_is_not_timed() -> None:
    def named(rows: dict[str, dict[str, Any]], **point: Any) -> dict[str, dict[str, Any]]:
        return {name: row | {"key": name, "point": row["point"] | {"share": 0.0, "evenly": False} | point} for name, row in rows.items()}

    rows = named({f"rate {bits}": split("rate", bits, accuracy, None) for bits, accuracy in ((300, 0.9), (200, 0.891), (100, 0.889))})
    rows |= named({"uniform": split("uniform", 400, 0.9, None), "jscc": split("jscc-awgn", 1, 0.9, None)})
    rows |= named({"webp q60": webp(900, 0.9, 0.9), "webp q50": webp(800, 0.9, 0.9), "webp lossless": webp(5000, 0.9, 0.9)})
    left = {"rate 200", "uniform", "webp q50", "webp lossless"}
    assert set(cheapest_alike(rows, REFERENCES["resnet20"])) == left
    pruned = named({"pruned": split("rate", 200, 0.891, None)}, share=0.3)
    assert set(cheapest_alike(rows | pruned, REFERENCES["resnet20"])) == {*left, "pruned"}, "its device half is another"
    vector = named({"vector": split("rate", 20, 0.9, None)}, cut=VECTOR)
    assert set(cheapest_alike(rows | vector, REFERENCES["resnet20"])) == left, "the device has classified: that is no real cut"
    lucky = named({f"rate 50, seed {seed}": split("rate", 50, accuracy, None) for seed, accuracy in ((0, 0.891), (1, 0.88))})
    assert set(cheapest_alike(rows | lucky, REFERENCES["resnet20"])) == left, "the mean over its seeds is below the floor"


def test_the_best_split_is_reported_with_what_limits_it_whether_it_wins_or_not() -> None:
    def place(rate_mbps: float, cut_ms: float | None) -> dict[str, Any]:
        at = {"slowdown": 40.0, "rtt_ms": 2.0, "rate_mbps": rate_mbps, "cut": "layer1.0, int8" if cut_ms else None, "cut_ms": cut_ms}
        return at | {"pick": "jpeg", "pick_ms": 50.0, "baseline": "jpeg", "baseline_ms": 50.0, "ratio": 1.0, "real_cut": False}

    def raw(*places: dict[str, Any]) -> dict[str, Any]:
        computed, took = {"jpeg": 50.0, "layer1.0, int8": 60.0}, {"jpeg": [55.0, 55.0], "layer1.0, int8": [66.0, 66.0]}
        measured = {"layer1.0, int8": {"device_ms": 0.5, "encode_ms": 0.25}}
        checked = [{"computed_ms": computed, "ms": took}]
        return {"grid": places, "through_link": checked, "coder": [], "measured": measured, "ways": [], "by_profile": ["jpeg"]}

    found = end_to_end_figures(raw(place(1.0, 60.0), place(2.0, 80.0)))
    best = found["end_to_end_best_speedup.x40"]
    assert best["value"] == pytest.approx(50 / 60)
    assert "jpeg over layer1.0, int8 at slowdown 40, 2 ms, 1 Mbit/s: 0.83; 30.0 of the split's 60.0 ms are the device's" in best["how"]
    assert best["how"].endswith("ours is picked at 0 of 2 places")
    assert found["end_to_end_best_speedup.x10"]["value"] is None
    assert "predicted by the profile at 2 of 2 places" in found["end_to_end_worst_ratio"]["how"]
    assert found["through_link_over_computed"]["spread"] == pytest.approx([1.1, 1.1])
    assert end_to_end_figures(raw(place(1.0, None)))["end_to_end_best_speedup.x40"]["value"] is None, "none holds on test"


def test_a_split_is_no_longer_the_best_one_once_a_further_seed_shows_that_it_does_not_hold_on_test() -> None:
    name = "split, seed 0"
    parts = {"device_ms": 0.4, "encode_ms": 0.0, "decode_ms": 0.0, "edge_ms": 0.7}
    times = {name: parts, f"{name}, int8": parts | {"device_ms": 0.2}, "local": parts | {"device_ms": 1.0}}
    cut = {"accuracy": 0.9, "frame_bytes": 40, "ours": True, "real_cut": True, "sent": "symbols", "image_size": 32}
    local = cut | {"name": "local", "frame_bytes": 0, "ours": False, "real_cut": False, "sent": "nothing"}
    timed = {"classes": 10, "ways": [cut | {"name": name}, cut | {"name": f"{name}, int8"}, local], "predicted": times, "measured": times}

    def best_cuts(*on_test: float | None) -> set[str | None]:
        rows = {f"split, seed {seed}": split("rate", 100, 0.9, test) | {"key": str(seed)} for seed, test in enumerate(on_test)}
        return {place.cut for place in places_of({"points": rows, "references": REFERENCES, "end_to_end": timed})}

    assert best_cuts(0.87) == {f"{name}, int8"}
    assert best_cuts(0.87, 0.85) == {None}
    assert best_cuts(None) == {None}, "not judged yet"


def test_the_coder_is_judged_on_whole_streams_and_timed_on_single_images() -> None:
    streams = [{"way": name, "bits": bits, "cross_entropy_bits": 1000} for name, bits in (("a", 1002), ("b", 1010), ("c", 1004))]
    times = {name: {"encode_ms": 0.1 * number, "decode_ms": 0.2 * number} for number, name in enumerate("abc", start=1)}
    found = coder_figures({"coder": streams, "measured": times | {"webp": {"encode_ms": 9, "decode_ms": 9}}})
    assert found["coder_over_cross_entropy"]["value"] == pytest.approx(1.004)
    assert found["coder_over_cross_entropy"]["spread"] == pytest.approx([1.002, 1.010])
    assert found["coder_ms_per_image"]["value"] == pytest.approx(0.6)
    assert coder_figures({"coder": [], "measured": times}) == {}


def test_what_is_checked_through_the_link_is_where_a_split_does_best_and_a_place_where_the_pick_sends() -> None:
    ways = {
        name: Way(name, 0.9, 30.0, ours=False, real_cut=name == "split", sent=sent, image_size=32)
        for name, sent in (("local", "nothing"), ("jpeg", "image"), ("split", "symbols"))
    }
    picks = {0.1: ("local", 4.0), 0.2: ("local", 3.0), 0.4: ("jpeg", 2.5), 0.8: ("jpeg", 1.5), 1.6: ("jpeg", 1.2)}
    places = [Place(10.0, 2.0, rate, pick, 10.0, 10.0, pick, 10.0, False, "split", 10.0 * over) for rate, (pick, over) in picks.items()]
    assert [place.rate_mbps for place in worth_checking(places, ways)] == [1.6, 0.8, 0.4]
    assert [place.rate_mbps for place in worth_checking(places[:3], ways)] == [0.4, 0.2, 0.1], "none of the others sends"


def test_points_within_a_point_on_validation_and_both_halves_of_a_pruned_pair_are_judged_on_test() -> None:
    rows = {
        "dear, seed 0": split("rate", 300, 0.895, None),
        "judged, seed 0": split("rate", 200, 0.895, 0.88),
        "bad, seed 0": split("rate", 100, 0.8899, None),
        "lucky, seed 0": split("uniform", 90, 0.891, None),
        "lucky, seed 1": split("uniform", 90, 0.88, None),
    }
    for name, pruned in (("whole, seed 0", 0), ("pruned, seed 0", 2)):
        row = split("rate", 100, 0.8, None)
        rows[name] = row | {"point": row["point"] | {"backbone": "resnet56", "seed": 0, "prune_epochs": pruned}}
    references = REFERENCES | {"resnet56": REFERENCES["resnet20"]}
    raw = {"points": {name: row | {"key": name} for name, row in rows.items()}, "references": references}
    assert to_be_judged(raw) == ["dear, seed 0", "whole, seed 0", "pruned, seed 0"]


def test_baselines_that_are_trained_get_as_many_epochs_as_our_splits() -> None:
    def frozen(point: Point) -> int:
        return point.frozen_epochs + (frozen(point.before) if point.before else 0)

    def of(point: ImagePoint) -> int:
        return point.epochs + (of(point.before) if point.before else 0)

    points = [point for point in every_point() if getattr(point, "seed", 0) == 0]
    for where in ("first", "middle"):
        here = [point for point in points if isinstance(point, Point) and (point.backbone, point.cut) == ("resnet20", CUTS["resnet20"][where])]
        ours, theirs = (
            {(frozen(point), epochs_of_all(point)) for point in here if point.codec.kind == kind and not point.prune_epochs} for kind in ("rate", "bottlenet++")
        )
        assert theirs == ours
    images = [point for point in points if isinstance(point, ImagePoint) and point.epochs]
    assert min(of(point) for point in images) >= RATE_EPOCHS["first"][1], "from the reference, which had as many as the code that `rate` goes on from"
