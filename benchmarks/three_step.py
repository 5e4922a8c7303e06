"""The three-step framework against its baselines on CIFAR-10 (JPEG) -> results/three_step.json.

Needs the data and weights that `make cifar10 DATA=... WEIGHTS=...` puts into examples/cifar10. Points that results/three_step.json holds already, with
the same parameters and code, are not trained again, and the file is written after each one: stop it whenever you like, `--minutes` does it for you.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.end_to_end import RATES_MBPS, SLOWDOWNS, Way, as_raw, grid, medians, through_link, time_parts
from benchmarks.image_points import FORMATS, QUALITIES, ImagePoint
from benchmarks.pruned_points import PrunedPoint
from benchmarks.results_file import RESULTS, ROOT, figure, write
from benchmarks.split_points import Point, costs_key, reference, reference_key, reference_weights
from benchmarks.three_step_ways import (
    device_only,
    device_only_in_int8,
    expected_ms,
    in_int8,
    of_image,
    of_pruned,
    of_split,
    raw_features,
    stream_cost,
)
from models.backbones import build_backbone
from models.codec import CodecSpec
from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.link import Link
from pipeline.data import load_card, load_split
from pipeline.inference import accuracy
from pipeline.runtime.images import Format

NAME = "three_step"
WEIGHTS = {"resnet20": "artifacts/backbone/weights.safetensors", "resnet56": "weights/resnet56-cifar10jpeg.safetensors"}
CUTS = {
    "resnet20": {"first": "layer1.2", "middle": "layer2.2", "last": "layer3.2"},
    "resnet56": {"first": "layer1.8", "middle": "layer2.8", "last": "layer3.8"},
}
EPOCHS = {"first": (6, 4), "middle": (12, 2), "last": (12, 0)}  # of a chain's first point: behind the frozen head, then all
FURTHER = {"first": (0, 2), "middle": (0, 2), "last": (4, 0)}  # of each point after it
LARGE = {"first": (4, 3), "middle": (4, 3), "last": (8, 3)}  # of ResNet-56, pruned or not
DROPPED, PRUNING = 0.55, 2  # share of the head's MACs that go at least, so that with the encoder half are left; epochs, of those of all, in which they go
DROPPED_SMALL, PRUNING_SMALL = 0.3, 1  # the same of ResNet-20
WHOLE_EPOCHS = 2  # of each step in which a network without a codec is pruned
IMAGES = (3, 2, 1, 1)  # epochs of the first image quality and of each after it
RATES = {"first": (2e-4, 5e-4, 1e-3), "middle": (4e-4, 1e-3, 2.5e-3), "last": (1e-3, 4e-3, 1e-2, 2e-2, 4e-2)}
SIZES = {  # (code channels, stride, bits): of `rate`, then of the points of `uniform`
    "first": ((16, 4, 4), ((16, 4, 3), (16, 4, 2), (8, 4, 2))),
    "middle": ((16, 4, 4), ((24, 4, 3), (16, 4, 2), (12, 4, 2))),
    "last": ((16, 4, 3), ((12, 4, 2), (8, 4, 2), (8, 4, 1))),
}
PAM_BELOW_DB = 15
VL_VFE = "VL-VFE publishes 12 to 16 at 90.8 to 92.0 %, 20 to 23 at 91.8 to 92.1 %, on the original CIFAR-10 with 304 M device MACs"
MORE_LOST = 0.5  # points that a pruned half may lose beyond the unpruned one
CHAINS = ("last", "middle", "first")  # what is cheapest to train comes first
LOSS = 0.010  # of accuracy, on validation
TEST_LOSS = 0.0125  # what a point may lose on test before its figure is null
TOLERANCE = 1e-9  # accuracies are floats
TIMED_IMAGES, ROUNDS = 20, 4
STREAM_IMAGES = 256
CHECKED = 2  # places a slowdown where splitting wins most, to be measured through the link

Raw = dict[str, Any]


def chains() -> Iterator[Sequence[Any]]:
    """Chains of points, each point starting from the one before it; what matters most comes first."""
    large = CUTS["resnet56"]
    plain: list[tuple[Format, int]] = [("png", 100), ("webp", 100), *itertools.product(FORMATS, QUALITIES)]
    for where in CHAINS:
        yield _chain(where, [CodecSpec("rate", *SIZES[where][0], rate_weight=weight) for weight in RATES[where]])
    yield [ImagePoint("resnet20", str(reference_weights("resnet20")), *sent) for sent in plain]
    yield _images("webp", (50, 30, 20, 10))
    for where in CHAINS:
        yield _chain(where, [CodecSpec("bottlenet++", width, SIZES[where][0][1], 8) for width in (8, 4, 2, 1)])
    for where in CHAINS:
        yield _chain(where, [CodecSpec("uniform", *size) for size in SIZES[where][1]])
    yield _chain("last", [CodecSpec("jscc-awgn", width, 4, 8, noise=(0.0562, 1.0)) for width in (16, 8, 4)])
    for where in CHAINS:
        frozen, together = LARGE[where]
        codec = CodecSpec("rate", *SIZES[where][0], rate_weight=RATES[where][0])
        point = Point("resnet56", WEIGHTS["resnet56"], large[where], codec, frozen, together)
        yield [point]
        yield [dataclasses.replace(point, epochs=together - PRUNING, share=DROPPED, prune_epochs=PRUNING)]
    yield _whole((0.9, 0.8, 0.7))
    yield _pruned_small()
    yield _images("jpeg", (30, 20, 10))
    for where in CHAINS:
        yield _chain(where, [CodecSpec("codebook", *SIZES[where][1][0])])
    yield from _two_step()
    yield _chain("middle", [CodecSpec("multi-rate", 16, 4, 8, points=((16, 4), (12, 3), (8, 2)))])
    yield _chain("last", [CodecSpec("jscc-bec", 8, 4, 8, noise=(0.01, 0.4))])
    yield _chain("last", [CodecSpec("jscc-bsc", 8, 4, 8, noise=(0.01, 0.2))])
    for where in CHAINS:
        yield _chain(where, [CodecSpec("public-code", 4, 1, 4)])


def _images(image_format: Format, qualities: Sequence[int]) -> list[ImagePoint]:
    points: list[ImagePoint] = []
    for quality, epochs in zip(qualities, IMAGES, strict=False):
        points.append(ImagePoint("resnet20", WEIGHTS["resnet20"], image_format, quality, epochs, points[-1] if points else None))
    return points


def _whole(shares: Sequence[float]) -> list[PrunedPoint]:
    """The network pruned to stay on the device, each from what the one before left; `shares` are of the whole network's channels."""
    points: list[PrunedPoint] = []
    for share, before in zip(shares, (1.0, *shares), strict=False):
        points.append(PrunedPoint("resnet20", WEIGHTS["resnet20"], round(share / before, 3), WHOLE_EPOCHS, before=points[-1] if points else None))
    return points


def _two_step() -> Iterator[list[PrunedPoint]]:
    """2-step pruning at each cut: all keep 0.8, then what crosses a half, then a half of that."""
    first = _whole((0.9, 0.8))[-1]
    for where in CHAINS:
        cut = CUTS["resnet20"][where]
        half = PrunedPoint("resnet20", WEIGHTS["resnet20"], 0.5, WHOLE_EPOCHS, cut, first)
        yield [half, PrunedPoint("resnet20", WEIGHTS["resnet20"], 0.5, WHOLE_EPOCHS, cut, half)]


def _pruned_small() -> list[Point]:
    """ResNet-20's middle half, unpruned, without its least needed blocks, and pruned evenly to as many MACs: the same codec and epochs for each."""
    frozen, together = EPOCHS["middle"]
    codec = CodecSpec("rate", *SIZES["middle"][0], rate_weight=RATES["middle"][0])
    point = Point("resnet20", WEIGHTS["resnet20"], CUTS["resnet20"]["middle"], codec, frozen, together)
    pruned = dataclasses.replace(point, epochs=together - PRUNING_SMALL, share=DROPPED_SMALL, prune_epochs=PRUNING_SMALL)
    return [pruned, dataclasses.replace(pruned, evenly=True)]


def _chain(where: str, codecs: list[CodecSpec]) -> list[Point]:
    points: list[Point] = []
    for codec in codecs:
        frozen, together = FURTHER[where] if points else EPOCHS[where]
        points.append(Point("resnet20", WEIGHTS["resnet20"], CUTS["resnet20"][where], codec, frozen, together, before=points[-1] if points else None))
    return points


def _longest(backbone: str) -> int:
    """For how many epochs at most the backbone of a split, or the edge's of an image format, is trained on."""
    sizes = {"resnet20": [EPOCHS, FURTHER, FURTHER, FURTHER], "resnet56": [LARGE]}[backbone]
    return max([sum(each[where][1] for each in sizes) for where in CHAINS] + [sum(IMAGES)] * (backbone == "resnet20"))


def figures_of(raw: Raw) -> dict[str, Any]:
    """The issue's figures that can be had from what was run so far."""
    found: dict[str, Any] = {}
    rows = list(raw["points"].values())
    images = [row for row in rows if row["point"].get("image_format") == "webp"]
    if not any(row["point"]["epochs"] for row in images):
        images = []  # plain WebP alone would flatter us
    splits = [row for row in rows if "codec" in row["point"]]
    for backbone, cuts in CUTS.items():
        best = raw["references"].get(backbone)
        found[f"reference_accuracy.{backbone}"] = (
            figure(best["test"], "share", "top-1 on test of the better on validation of the backbone as it came and after as many further epochs")
            if best
            else figure(None, "share", "not run yet")
        )
        for where, cut in cuts.items():
            here = [row for row in splits if row["point"]["backbone"] == backbone and row["point"]["cut"] == cut]
            point = _cheapest([row for row in here if row["point"]["codec"]["kind"] in ("uniform", "codebook", "rate")], best)
            found[f"bits_at_1pt.{backbone}.{where}"] = _bits(point, best, "payload_bits", "mean payload bits of the cheapest codec at most 1 point below")
            found[f"frame_bytes_at_1pt.{backbone}.{where}"] = _bits(point, best, "frame_bytes", "mean frame bytes of the same point")
            if backbone == "resnet20":
                others = [row for row in here if row["point"]["codec"]["kind"] == "bottlenet++"]
                found[f"bits_over_bottlenetpp.{where}"] = _ratio(point, _cheapest(others, best, "uncoded_bits"), best, "uncoded_bits")
                found[f"bits_over_bottlenetpp_coded.{where}"] = _ratio(point, _cheapest(others, best), best, "payload_bits")
                found[f"bits_over_webp.{where}"] = _ratio(point, _cheapest(images, best), best, "payload_bits")
    best = raw["references"].get("resnet20")
    found |= noise_figures(splits, best) | pruning_figures(raw) | {"rate_saving_at_half_pt": _rate_saving(splits, raw["references"].get("resnet20"))}
    if "end_to_end" in raw:
        found |= end_to_end_figures(raw["end_to_end"])
    found["webp_bits_at_1pt"] = _bits(_cheapest(images, best), best, "payload_bits", "mean bits without container of the cheapest WebP at most 1 point below")
    return found


def _rate_saving(rows: list[Raw], best: Raw | None) -> dict[str, Any]:
    """The share of bits that `rate` saves on `uniform`, each at most half a point below the reference on validation: the median over cuts."""
    savings = {}
    for where, cut in CUTS["resnet20"].items():
        here = [row for row in rows if row["point"]["backbone"] == "resnet20" and row["point"]["cut"] == cut]
        kinds = ("rate", "uniform")
        rate, uniform = (_cheapest([row for row in here if row["point"]["codec"]["kind"] == kind], best, loss=LOSS / 2) for kind in kinds)
        if rate and uniform:
            savings[where] = 1 - _mean(rate["validation"]["payload_bits"]) / _mean(uniform["validation"]["payload_bits"])
    if len(savings) < len(CUTS["resnet20"]):
        return figure(None, "share", f"no points of both kinds within half a point yet, other than at {', '.join(savings) or 'none'}")
    how = ", ".join(f"{where} {saving:.2f}" for where, saving in savings.items())
    return figure(median(savings.values()), "share", f"median over cuts, payload bits on validation: {how}", n=len(savings))


def noise_figures(rows: list[Raw], best: Raw | None = None) -> dict[str, Any]:
    """By how much analogue symbols beat the best PAM of the same network, the widest, at the level under 15 dB where that is least; and how few do."""
    analogue = sorted((row for row in rows if row["point"]["codec"]["kind"] == "jscc-awgn"), key=lambda row: row["validation"]["channel_uses"])
    if not analogue:
        return {name: figure(None, unit, "not run yet") for name, unit in (("jscc_minus_pam_points_min", "points"), ("jscc_symbols_at_1pt", "symbols"))}
    row, few = analogue[-1], next((row for row in analogue if best and _near(row, best)), None)
    found = row.get("test", row["validation"])
    most = {level: max(levels[level] for name, levels in found.items() if name.startswith("pam ")) for level in found["analogue"]}
    margins = {level: 100 * (found["analogue"][level] - most[level]) for level in most if float(level) < PAM_BELOW_DB}
    worst = min(margins, key=lambda level: margins[level])
    how = f"at {worst} dB, {found['channel_uses']} channel uses, against the best of 1 to 4 bit PAM there, on {'test' if 'test' in row else 'validation'}"
    found_few = (
        f"real symbols an image, at 25 dB {100 * few['validation']['accuracy']:.2f} % on validation" if few else "none within 1 point on validation at 25 dB"
    )
    return {
        "jscc_minus_pam_points_min": figure(margins[worst], "points", how, n=len(margins)),
        "jscc_symbols_at_1pt": figure(few["validation"]["channel_uses"] if few else None, "symbols", f"{found_few}; {VL_VFE}"),
    }


def _near(row: Any, best: Any, data: str = "validation", loss: float = LOSS) -> bool:
    return bool(best[data] - row[data]["accuracy"] <= loss + TOLERANCE)


def _cheapest(rows: list[Raw], best: Raw | None, size: str = "payload_bits", loss: float = LOSS) -> Raw | None:
    """Of the points at most `loss` below the reference on validation the one of fewest bits."""
    good = [row for row in rows if best and _near(row, best, loss=loss)]
    return min(good, key=lambda row: _mean(row["validation"][size]), default=None)


def _mean(size: Any) -> float:
    return float(size["mean"] if isinstance(size, dict) else size)


def _bits(point: Raw | None, best: Raw | None, size: str, how: str) -> dict[str, Any]:
    unit = "bytes" if size == "frame_bytes" else "bits"
    if point is None or best is None:
        return figure(None, unit, "no point that was run is within 1 point on validation")
    if "test" not in point:
        return figure(None, unit, "not judged on test yet")
    loss = best["test"] - point["test"]["accuracy"]
    label = f"{how}: {_label(point)}, loses {100 * loss:.2f} points on test, {100 * (best['validation'] - point['validation']['accuracy']):.2f} on validation"
    if not _near(point, best, "test", TEST_LOSS):
        return figure(None, unit, f"{label}, more than {100 * TEST_LOSS:g}")
    return figure(_mean(point["test"][size]), unit, label)


def _ratio(ours: Raw | None, theirs: Raw | None, best: Raw | None, size: str) -> dict[str, Any]:
    """Our payload bits over `size` of theirs, both on test."""
    if best is None or any(row is None or "test" not in row or not _near(row, best, "test", TEST_LOSS) for row in (ours, theirs)):
        return figure(None, "ratio", "no point of ours or of theirs is near the reference on validation and test, or none judged yet")
    assert ours is not None
    assert theirs is not None
    return figure(_mean(ours["test"]["payload_bits"]) / _mean(theirs["test"][size]), "ratio", f"{_label(ours)} over {_label(theirs)}, {size.replace('_', ' ')}")


def _label(row: Raw) -> str:
    point = row["point"]
    if "image_format" in point:
        return f"{point['image_format']} q{point['quality']}{', trained on it' if point['epochs'] else ''}"
    codec = point["codec"]
    rate = f" {codec['rate_weight']:g}" if codec["kind"] == "rate" else ""
    return f"{codec['kind']}{rate} {codec['code_channels']}ch /{codec['stride']} {codec['bits']}bit"


def run_end_to_end(raw: Raw) -> Raw:
    """Every way within 1 point on validation, timed; the grid; and the places where splitting wins most again, through processes and link.

    What the search could propose is predicted by the profile, as the search does; for the rest an earlier timing stands in.
    """
    best, points = raw["references"]["resnet20"], {point.name: point for chain in chains() for point in chain}
    train, validation = load_split("train"), load_split("validation")
    ways: list[Way] = []
    for name, row in raw["points"].items():
        found = row["validation"]
        if row["point"].get("codec", {}).get("kind") == "multi-rate":
            continue
        if row["point"]["backbone"] == "resnet20" and "accuracy" in found and _near(row, best):
            point = points[name]
            build = of_image if isinstance(point, ImagePoint) else of_pruned if isinstance(point, PrunedPoint) else of_split
            ways.append(build(point, found["accuracy"], found.get("frame_bytes", {"mean": 0.0})["mean"]))
    weights = str(reference_weights("resnet20"))
    network = build_backbone("resnet20", load_card().num_classes, 32, Path(weights)).eval()
    local = device_only(network, "resnet20 device-only", accuracy(network, validation), ours=False)
    ways += [*raw_features("resnet20", weights, train, validation), local, device_only_in_int8(local, train, validation)]
    ways += [in_int8(way, train, validation) for way in ways if way.sent == "symbols"]
    images = validation[0].numpy()
    predicted, measured = (
        {name: medians(parts) for name, parts in time_parts(ways, images[start : start + TIMED_IMAGES], ROUNDS).items()} for start in (0, TIMED_IMAGES)
    )
    profile = DeviceProfile.load(Path("profiles/xeon.json"))
    by_profile = {way.name: expected_ms(way, profile, network, points.get(way.name)) for way in ways}
    predicted |= {name: parts for name, parts in by_profile.items() if parts}
    floor, classes = best["validation"] - LOSS - TOLERANCE, load_card().num_classes
    places = grid(ways, predicted, measured, floor, classes)
    by_name = {way.name: way for way in ways}
    checked = []
    for slowdown in SLOWDOWNS:
        real = sorted((place for place in places if place.slowdown == slowdown and place.real_cut), key=lambda place: place.ratio)
        rest = [place for place in places if place.slowdown == slowdown and not place.real_cut][:: len(RATES_MBPS)]
        for place in [*real[:CHECKED], *rest[:1]]:
            pair = [by_name[name] for name in dict.fromkeys((place.pick, place.baseline))]
            link = Link(place.rate_mbps, place.rtt_ms)
            times = through_link(pair, images[: 2 * TIMED_IMAGES], place.slowdown, link)
            row = {"slowdown": slowdown, "rate_mbps": place.rate_mbps, "rtt_ms": place.rtt_ms, "pick": place.pick, "baseline": place.baseline}
            checked.append(row | {"ms": {name: [round(ms, 3) for ms in values] for name, values in times.items()}})
    facts = [{"name": way.name, "accuracy": way.accuracy, "frame_bytes": way.frame_bytes, "ours": way.ours, "real_cut": way.real_cut} for way in ways]
    pairs = {where: _pruned_pair(raw, points, cut) for where, cut in CUTS["resnet56"].items()}
    halves = {where: time_parts([way for _, way in pair], images[:TIMED_IMAGES], ROUNDS) for where, pair in pairs.items() if pair}
    pruned = {where: {name: parts["device_ms"] for name, parts in times.items()} for where, times in halves.items()}
    streams = [{"way": way.name, **stream_cost(way, validation[0][:STREAM_IMAGES])} for way in ways if way.ours]
    return {
        "ways": facts,
        "coder": streams,
        "predicted": predicted,
        "by_profile": sorted(name for name, parts in by_profile.items() if parts),
        "measured": measured,
        "grid": as_raw(places),
        "through_link": checked,
        "pruned": pruned,
    }


def _pruned_pair(raw: Raw, points: dict[str, Any], cut: str) -> list[tuple[Raw, Way]]:
    """The unpruned and the pruned split of ResNet-56 at `cut`, if both are trained."""
    rows = [row for name, row in raw["points"].items() if name in points and row["point"]["backbone"] == "resnet56" and row["point"].get("cut") == cut]
    pruned = next((row for row in rows if row["point"]["prune_epochs"]), None)
    whole = _unpruned(rows, pruned)
    if pruned is None or whole is None:
        return []
    named = {row["key"]: points[name] for name, row in raw["points"].items() if name in points}
    return [(row, of_split(named[row["key"]], row["validation"]["accuracy"], row["validation"]["frame_bytes"]["mean"])) for row in (whole, pruned)]


def _unpruned(rows: Iterable[Raw], pruned: Raw | None) -> Raw | None:
    """The split that `pruned` would be with all its channels."""
    same = ("backbone", "cut", "codec", "seed")
    if pruned is None:
        return None
    return next((row for row in rows if not row["point"].get("prune_epochs") and all(row["point"].get(of) == pruned["point"][of] for of in same)), None)


def pruning_figures(raw: Raw) -> dict[str, Any]:
    """MACs and speed of ResNet-56's pruned device halves, where they lose at most half a point more than the unpruned ones."""
    found: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    lost: dict[str, float] = {}
    rows = [row for row in raw["points"].values() if row["point"].get("prune_epochs") and row["point"]["backbone"] == "resnet56"]
    for where, cut in CUTS["resnet56"].items():
        pruned = next((row for row in rows if row["point"]["cut"] == cut), None)
        whole = _unpruned(raw["points"].values(), pruned)
        times = raw.get("end_to_end", {}).get("pruned", {}).get(where)
        found[f"device_speedup.{where}"] = figure(None, "ratio", "not run yet")
        if pruned is None or whole is None:
            continue
        data = "test" if "test" in pruned and "test" in whole else "validation"
        lost[where] = 100 * (whole[data]["accuracy"] - pruned[data]["accuracy"])
        ratios[where] = (pruned["head_macs"] + pruned["encoder_macs"]) / (whole["head_macs"] + whole["encoder_macs"])
        if times:
            before, after = times.values()
            how = f"median of the unpruned ResNet-56 half over that of the pruned one, encoder included; {lost[where]:.2f} points more lost on {data}"
            found[f"device_speedup.{where}"] = figure(median(before) / median(after), "ratio", how, n=len(after))
    if set(ratios) == set(CUTS["resnet56"]):
        worst = max(ratios, key=lambda where: ratios[where])
        how = f"pruned over unpruned ResNet-56 half with encoder, the worst of three cuts ({worst}); at most {max(lost.values()):.2f} points more lost"
        found["device_macs_ratio"] = figure(ratios[worst] if max(lost.values()) <= MORE_LOST else None, "ratio", how, n=len(ratios))
    else:
        found["device_macs_ratio"] = figure(None, "ratio", "not run yet")
    return found


def end_to_end_figures(found: Raw) -> dict[str, Any]:
    """The worst ratio over the grid, and the best speed-up of a real cut at each slowdown."""
    worst = max(found["grid"], key=lambda place: place["ratio"])
    at = "{pick} against {baseline} at slowdown {slowdown:g}, {rtt_ms:g} ms, {rate_mbps:.3g} Mbit/s"
    figures = {"end_to_end_worst_ratio": figure(worst["ratio"], "ratio", at.format(**worst), n=len(found["grid"]))}
    checks = [row for row in found["through_link"] if row["pick"] in row["ms"]]
    if checks:
        at_grid = {(place["slowdown"], place["rtt_ms"], place["rate_mbps"]): place for place in found["grid"]}
        over = [median(row["ms"][row["pick"]]) / at_grid[row["slowdown"], row["rtt_ms"], row["rate_mbps"]]["pick_ms"] for row in checks]
        how = "what a pick took through two processes and an emulated link over what was computed for it, median of the places tried"
        figures["through_link_over_computed"] = figure(median(over), "ratio", how, n=len(over), spread=(min(over), max(over)))
    accuracies = {way["name"]: way["accuracy"] for way in found["ways"]}
    pairs = [(name, f"{name}, int8") for name in accuracies if f"{name}, int8" in accuracies]
    if pairs:
        speedups = [found["measured"][whole]["device_ms"] / found["measured"][int8]["device_ms"] for whole, int8 in pairs]
        lost = [100 * (accuracies[whole] - accuracies[int8]) for whole, int8 in pairs]
        how = "of {} device halves, int8 against float32, one ONNX Runtime thread"
        figures["int8_speedup"] = figure(median(speedups), "ratio", f"median {how.format(len(pairs))}", n=len(pairs), spread=(min(speedups), max(speedups)))
        figures["int8_points_lost"] = figure(
            median(lost), "points", f"on validation, median {how.format(len(pairs))}", n=len(pairs), spread=(min(lost), max(lost))
        )
    for slowdown in SLOWDOWNS:
        real = [place for place in found["grid"] if place["slowdown"] == slowdown and place["real_cut"]]
        name = f"end_to_end_best_speedup.x{slowdown:g}"
        if real:
            best = min(real, key=lambda place: place["ratio"])
            figures[name] = figure(1 / best["ratio"], "ratio", at.format(**best), n=len(real))
        else:
            figures[name] = figure(None, "ratio", "no real cut is picked anywhere on the grid")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further point after this long")
    parser.add_argument("--only", default="", help="only points whose name holds this")
    parser.add_argument("--time", action="store_true", help="train nothing; time all that was trained, and the grid of devices and links")
    arguments = parser.parse_args()
    os.chdir(ROOT / "examples/cifar10")
    file, start = RESULTS / f"{NAME}.json", time.monotonic()
    raw: Raw = json.loads(file.read_text())["raw"] if file.exists() else {"points": {}, "references": {}}
    raw["points"] = current(raw)

    def save() -> None:
        write(NAME, dataset={"name": "CIFAR-10 (JPEG)", "hash": load_card().sha256}, seeds=[0], figures=figures_of(raw), raw=raw)

    if arguments.time:
        raw["end_to_end"] = run_end_to_end(raw)
        save()
        return

    def in_time() -> bool:
        return (time.monotonic() - start) / 60 < arguments.minutes

    def refer(backbone: str) -> None:
        key = reference_key(backbone, WEIGHTS[backbone], _longest(backbone))
        if in_time() and raw["references"].get(backbone, {}).get("key") != key:
            raw["references"][backbone] = reference(backbone, WEIGHTS[backbone], _longest(backbone))
            save()

    wanted = [point for chain in chains() for point in chain if arguments.only in point.name]
    for point in wanted:
        if not Path(point.weights).exists():
            refer(point.backbone)
        if (known := raw["points"].get(point.name)) and known["key"] == point.key():
            continue
        if not in_time():
            break
        began = time.perf_counter()
        fields = asdict(point) | {"before": point.before.key() if point.before else None}
        row = {"key": point.key(), "costs": costs_key(), "point": fields, **point.facts(), "validation": point.judged(load_split("validation"))}
        raw["points"][point.name] = row | {"seconds": round(time.perf_counter() - began, 1)}
        save()
    for backbone in dict.fromkeys(point.backbone for point in wanted):
        refer(backbone)
    for point in (point for chain in chains() for point in chain):
        row, best = raw["points"].get(point.name), raw["references"].get(point.backbone)
        if row and best and "test" not in row and _near(row, best):
            row["test"] = point.judged(load_split("test"))
    save()


def current(raw: Raw) -> Raw:
    """The rows of points that are still wanted and were trained and measured as they would be now."""
    wanted = {point.name: point.key() for chain in chains() for point in chain}
    return {name: row for name, row in raw["points"].items() if (row["key"], row["costs"]) == (wanted.get(name), costs_key())}


if __name__ == "__main__":
    main()
