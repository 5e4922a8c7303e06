from __future__ import annotations

from dataclasses import asdict
from typing import Any

from matplotlib.figure import Figure

from benchmarks.image_points import ImagePoint
from benchmarks.split_points import Point
from benchmarks.three_step_pictures import against_macs, fronts, over_links, over_noise
from benchmarks.three_step_points import CUTS, every_point

SIZES = {"payload_bits": {"mean": 100.0}, "uncoded_bits": 200}


def legend(figure: Figure) -> set[str]:
    return {text.get_text() for text in figure.legends[0].get_texts()}


def test_every_kind_of_point_is_shown_and_neurosurgeon_beside_them() -> None:
    points = list(every_point())
    rows: dict[str, Any] = {}
    for point in points:
        kind = point.codec.kind if isinstance(point, Point) else ""
        sizes = {"channel_uses": 256} if kind.startswith("jscc") else SIZES
        rows[point.name] = {"point": asdict(point), "head_macs": 1e6, "encoder_macs": 0.0, "validation": {"accuracy": 0.9, **sizes}}
    raw = {"points": rows, "references": {"resnet20": {"validation": 0.9}}}
    kinds = {point.codec.kind for point in points if isinstance(point, Point)}
    images = {f"{point.image_format}{', trained on it' if point.epochs else ''}" for point in points if isinstance(point, ImagePoint)}
    drawn = fronts(raw, "resnet20", CUTS["resnet20"])
    assert kinds - {"jscc-awgn"} <= {label.removesuffix(", uncoded") for label in legend(drawn)}, "analogue symbols are no bits"
    assert images <= legend(drawn)
    for axes, elements in zip(drawn.axes, (16_384, 8_192, 4_096), strict=True):
        raws = {line.get_label(): (*line.get_xdata(), *line.get_ydata()) for line in axes.lines if str(line.get_label()).startswith("raw")}
        assert raws == {f"raw feature, {bits} bit": (bits * elements, 0.9) for bits in (8, 32)}
    assert {f"resnet20, {kind}" for kind in kinds} <= set(against_macs(raw).axes[0].get_legend_handles_labels()[1])


def test_seeds_of_one_configuration_are_one_place() -> None:
    point = {"backbone": "resnet20", "cut": "layer1.2", "codec": {"kind": "rate"}}
    rows = {f"a, seed {seed}": {"point": point, "validation": {"accuracy": 0.88 + 0.01 * seed, "payload_bits": {"mean": 100.0 + seed}}} for seed in range(3)}
    front = fronts({"points": rows, "references": {}}, "resnet20", CUTS["resnet20"]).axes[0].lines[-1]
    assert [*front.get_xdata(), *front.get_ydata()] == [101, 0.89]


def test_a_pruned_device_half_is_drawn_apart_from_the_whole_one() -> None:
    point = {"backbone": "resnet56", "cut": "layer1.8", "codec": {"kind": "rate"}}
    found = {"accuracy": 0.88, "payload_bits": {"mean": 100.0}}
    rows = {name: {"point": point | {"prune_epochs": pruned}, "validation": found} for name, pruned in (("a, seed 0", 0), ("b, seed 0", 2))}
    labels = legend(fronts({"points": rows, "references": {}}, "resnet56", CUTS["resnet56"]))
    assert {"rate", "rate, device half pruned"} <= labels


def test_each_link_rate_is_shaded_by_who_is_faster_there() -> None:
    split, local, image = "resnet20 layer3.2 rate 8ch, seed 0", "resnet20 device-only", "resnet20 webp q60"
    rates = {0.1: (local, 9.0, local, 9.0), 1.0: (split, 6.0, local, 9.0), 4.0: (split, 5.0, image, 4.0), 10.0: (image, 3.0, image, 3.0)}
    places = [
        {
            "slowdown": 10.0,
            "rtt_ms": 2.0,
            "rate_mbps": rate,
            "pick": pick,
            "pick_ms": ms,
            "baseline": best,
            "baseline_ms": best_ms,
            "ratio": ms / best_ms,
            "cut": split,
            "cut_ms": 12.0,
        }
        for rate, (pick, ms, best, best_ms) in rates.items()
    ]
    figure = over_links({"grid": places})
    cuts = next(line for line in figure.axes[0].lines if line.get_label() == "best split")
    assert [*cuts.get_xdata()] == [*rates]
    assert {*cuts.get_ydata()} == {12.0}
    shaded = {patch.get_label(): patch for patch in figure.axes[0].patches}
    winners = ["device-only wins", "layer3.2 rate 8ch wins", "webp q60 wins"]
    assert set(winners) == set(shaded) <= legend(figure)
    assert len({patch.get_facecolor() for patch in shaded.values()}) == 3
    for rate, winner in zip(rates, [*winners, winners[-1]], strict=True):
        assert [str(patch.get_label()) for patch in figure.axes[0].patches if patch.get_x() <= rate <= patch.get_x() + patch.get_width()] == [winner]


def test_noise_is_drawn_from_little_to_much_whatever_the_order_in_the_file() -> None:
    levels = {"0": 0.7, "10": 0.88, "2.5": 0.8, "5": 0.85}
    found = {"channel_uses": 64, "analogue": levels, "pam 1": {**levels, "0": 0.6}, "pam 2": {**levels, "0": 0.65}}
    bits = {"0.05": 0.85, "0.4": 0.5, "0": 0.9}
    rows = {
        "a": {"point": {"codec": {"kind": "jscc-awgn"}}, "validation": found},
        "b": {"point": {"codec": {"kind": "jscc-bsc"}}, "validation": {"channel_uses": 8, "bits": bits}},
    }
    left, right = over_noise({"points": rows}).axes
    lines = [*left.lines, *right.lines]
    assert [list(line.get_xdata()) for line in lines] == [[0, 2.5, 5, 10], [0, 2.5, 5, 10], [0, 0.05, 0.4]]
    assert [line.get_ydata()[0] for line in lines] == [0.7, 0.65, 0.9], "of PAM the best at each level"
