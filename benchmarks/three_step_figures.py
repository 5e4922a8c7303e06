"""The figures of results/three_step.json, made from its raw rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import mean, median
from typing import Any

from benchmarks.end_to_end import INT8, SLOWDOWNS
from benchmarks.results_file import figure
from benchmarks.three_step_points import CUTS

PAM_BELOW_DB = 15
VL_VFE = "VL-VFE publishes 12 to 16 at 90.8 to 92.0 %, 20 to 23 at 91.8 to 92.1 %, on the original CIFAR-10 with 304 M device MACs"
MORE_LOST = 0.5  # points that a pruned half may lose beyond the unpruned one
LOSS = 0.010  # of accuracy, on validation
TEST_LOSS = 0.0125  # what a point may lose on test before its figure is null
TOLERANCE = 1e-9  # accuracies are floats

Raw = dict[str, Any]


def figures_of(raw: Raw) -> dict[str, Any]:
    """The issue's figures that can be had from what was run so far."""
    found: dict[str, Any] = {}
    rows = pooled(raw["points"])
    images = [row for row in rows if row["point"].get("image_format") == "webp"]
    if not any(row["point"]["epochs"] for row in images):
        images = []  # plain WebP alone would flatter us
    splits = [row for row in rows if "codec" in row["point"]]
    for backbone, cuts in CUTS.items():
        best = raw["references"].get(backbone)
        found[f"reference_accuracy.{backbone}"] = (
            figure(
                best["test"],
                "share",
                f"top-1 on test of the best on validation of the backbone as it came and at every stage of as many epochs as the splits get ({best['better']})",
            )
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


def pooled(points: Mapping[str, Raw]) -> list[Raw]:
    """A row for each configuration, its accuracies and sizes the means over its seeds, whose own rows are in `of_seeds`; `points` come by name."""
    found: dict[str, list[Raw]] = {}
    for name, row in points.items():
        found.setdefault(name.partition(", seed ")[0], []).append(row)
    return [_pooled(rows) for rows in found.values()]


def of_first_seeds(points: Mapping[str, Raw]) -> dict[str, Raw]:
    """The row of each configuration by the key of its first seed, which stands for it wherever only one is built."""
    return {row["of_seeds"][0]["key"]: row for row in pooled(points)}


def _pooled(rows: list[Raw]) -> Raw:
    """The mean on test only once every seed was judged there."""
    known = [data for data in ("validation", "test") if all(data in row for row in rows)]
    rest = {name: value for name, value in rows[0].items() if name not in ("validation", "test")}
    return rest | {data: _average([row[data] for row in rows]) for data in known} | {"of_seeds": rows}


def _average(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: _average([value[name] for value in values]) for name in values[0]}
    return mean(values) if isinstance(values[0], int | float) else values[0]


def _rate_saving(rows: list[Raw], best: Raw | None) -> dict[str, Any]:
    """The share of bits on test that `rate` saves on `uniform`, each at most half a point below the reference on validation: the median over cuts."""
    savings = {}
    for where, cut in CUTS["resnet20"].items():
        here = [row for row in rows if row["point"]["backbone"] == "resnet20" and row["point"]["cut"] == cut]
        kinds = ("rate", "uniform")
        rate, uniform = (_cheapest([row for row in here if row["point"]["codec"]["kind"] == kind], best, loss=LOSS / 2) for kind in kinds)
        ratio = _ratio(rate, uniform, best, "payload_bits", LOSS / 2 + TEST_LOSS - LOSS)["value"]
        if ratio is not None:
            savings[where] = 1 - ratio
    how = ", ".join(f"{where} {saving:.2f}" for where, saving in savings.items())
    if len(savings) < len(CUTS["resnet20"]):
        return figure(None, "share", f"not at every cut both kinds are within half a point on validation and three quarters on test: {how or 'nowhere'}")
    return figure(median(savings.values()), "share", f"median over cuts, payload bits: {how}", n=len(savings))


def noise_figures(rows: list[Raw], best: Raw | None = None) -> dict[str, Any]:
    """By how much analogue symbols beat the best PAM of the same network, the widest, at the level under 15 dB where that is least; and how few do."""
    analogue = sorted((row for row in rows if row["point"]["codec"]["kind"] == "jscc-awgn"), key=lambda row: row["validation"]["channel_uses"])
    if not analogue:
        return {name: figure(None, unit, "not run yet") for name, unit in (("jscc_minus_pam_points_min", "points"), ("jscc_symbols_at_1pt", "symbols"))}
    row, few = analogue[-1], next((row for row in analogue if best and near(row, best)), None)
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


def near(row: Any, best: Any, data: str = "validation", loss: float = LOSS) -> bool:
    return bool(best[data] - row[data]["accuracy"] <= loss + TOLERANCE)


def _cheapest(rows: list[Raw], best: Raw | None, size: str = "payload_bits", loss: float = LOSS) -> Raw | None:
    """Of the points at most `loss` below the reference on validation the one of fewest bits."""
    good = [row for row in rows if best and near(row, best, loss=loss)]
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
    if not near(point, best, "test", TEST_LOSS):
        return figure(None, unit, f"{label}, more than {100 * TEST_LOSS:g}")
    found = [_mean(row["test"][size]) for row in point["of_seeds"]]
    return figure(mean(found), unit, label, n=len(found), spread=(min(found), max(found)) if len(found) > 1 else None)


def _ratio(ours: Raw | None, theirs: Raw | None, best: Raw | None, size: str, loss: float = TEST_LOSS) -> dict[str, Any]:
    """Our payload bits over `size` of theirs, both on test."""
    if best is None or any(row is None or "test" not in row or not near(row, best, "test", loss) for row in (ours, theirs)):
        return figure(None, "ratio", "no point of ours or of theirs is near the reference on validation and test, or none judged yet")
    assert ours is not None
    assert theirs is not None
    seeds = min(len(row["of_seeds"]) for row in (ours, theirs))
    how = f"{_label(ours)} over {_label(theirs)}, {size.replace('_', ' ')}"
    return figure(_mean(ours["test"]["payload_bits"]) / _mean(theirs["test"][size]), "ratio", how, n=seeds)


def _label(row: Raw) -> str:
    point = row["point"]
    if "image_format" in point:
        return f"{point['image_format']} q{point['quality']}{', trained on it' if point['epochs'] else ''}"
    codec = point["codec"]
    rate = f" {codec['rate_weight']:g}" if codec["kind"] == "rate" else ""
    pruned = f", without {point['share']:.0%} of the MACs" if point.get("share") else ""
    return f"{codec['kind']}{rate} {codec['code_channels']}ch /{codec['stride']} {codec['bits']}bit{pruned}"


def pruned_pairs(rows: Iterable[Raw]) -> list[tuple[Raw, Raw]]:
    """ResNet-56's splits, whole and pruned with the same codec and seed."""
    same = ("cut", "codec", "seed")
    mine = [row for row in rows if row["point"]["backbone"] == "resnet56" and "codec" in row["point"]]
    whole, pruned = ([row for row in mine if bool(row["point"].get("prune_epochs")) == lost] for lost in (False, True))
    return [(row, less) for row in whole for less in pruned if all(row["point"].get(of) == less["point"].get(of) for of in same)]


def pruning_figures(raw: Raw) -> dict[str, Any]:
    """MACs and speed of ResNet-56's pruned device halves, where they lose at most half a point more than the unpruned ones."""
    found: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    lost: dict[str, float] = {}
    every = pruned_pairs(raw["points"].values())
    for where, cut in CUTS["resnet56"].items():
        found[f"device_speedup.{where}"] = figure(None, "ratio", "not run yet")
        pairs = [pair for pair in every if pair[0]["point"]["cut"] == cut]
        if not pairs:
            continue
        data = "test" if all("test" in row for pair in pairs for row in pair) else "validation"
        lost[where] = 100 * mean(whole[data]["accuracy"] - pruned[data]["accuracy"] for whole, pruned in pairs)
        ratios[where] = max((pruned["head_macs"] + pruned["encoder_macs"]) / (whole["head_macs"] + whole["encoder_macs"]) for whole, pruned in pairs)
        if times := raw.get("end_to_end", {}).get("pruned", {}).get(where):
            before, after = times.values()
            seeds = f", mean of {len(pairs)} seeds" if len(pairs) > 1 else ""
            more = f"{lost[where]:.2f} points more lost on {data}{seeds}, {MORE_LOST:g} allowed"
            how = f"median of the unpruned ResNet-56 half over that of the pruned one, encoder included; {more}"
            speedup = median(before) / median(after)
            found[f"device_speedup.{where}"] = figure(speedup if lost[where] <= MORE_LOST else None, "ratio", f"{speedup:.2f}, the {how}", n=len(after))
    if set(ratios) == set(CUTS["resnet56"]):
        worst = max(ratios, key=lambda where: ratios[where])
        more = f"at most {max(lost.values()):.2f} points more lost, {MORE_LOST:g} allowed"
        how = f"pruned over unpruned ResNet-56 half with encoder, the worst of three cuts ({worst}); {more}"
        found["device_macs_ratio"] = figure(ratios[worst] if max(lost.values()) <= MORE_LOST else None, "ratio", how, n=len(ratios))
    else:
        found["device_macs_ratio"] = figure(None, "ratio", "not run yet")
    return found


def coder_figures(found: Raw) -> dict[str, Any]:
    """What our splits' symbols cost beyond their cross-entropy, and how long an image's take."""
    streams = [row["bits"] / row["cross_entropy_bits"] for row in found["coder"]]
    times = [found["measured"][row["way"]]["encode_ms"] + found["measured"][row["way"]]["decode_ms"] for row in found["coder"]]
    if not streams:
        return {}
    over = f"bits over cross-entropy of streams of at least 4,096 symbols, median of {len(streams)} splits"
    spent = f"coding and decoding with frame, median of the same {len(times)} splits"
    return {
        "coder_over_cross_entropy": figure(median(streams), "ratio", over, n=len(streams), spread=(min(streams), max(streams))),
        "coder_ms_per_image": figure(median(times), "ms", spent, n=len(times), spread=(min(times), max(times))),
    }


def end_to_end_figures(found: Raw) -> dict[str, Any]:
    """The worst ratio over the grid, and the best speed-up at each slowdown of a real cut that holds on test."""
    worst = max(found["grid"], key=lambda place: place["ratio"])
    at = "{pick} against {baseline} at slowdown {slowdown:g}, {rtt_ms:g} ms, {rate_mbps:.3g} Mbit/s"
    profiled = sum(place["pick"] in found["by_profile"] for place in found["grid"])
    how = f"{at.format(**worst)}; the pick is predicted by the profile at {profiled} of {len(found['grid'])} places, at the others by an earlier timing"
    figures = {"end_to_end_worst_ratio": figure(worst["ratio"], "ratio", how, n=len(found["grid"]))}
    over = [median(times) / row["computed_ms"][name] for row in found["through_link"] for name, times in row["ms"].items()]
    if over:
        places = f"median over all ways at {len(found['through_link'])} places"
        how = f"what a way took through two processes and an emulated link over what was computed for it, {places}"
        figures["through_link_over_computed"] = figure(median(over), "ratio", how, n=len(over), spread=(min(over), max(over)))
    figures |= coder_figures(found)
    accuracies = {way["name"]: way["accuracy"] for way in found["ways"]}
    pairs = [(name, name + INT8) for name in accuracies if name + INT8 in accuracies]
    if pairs:
        speedups = [found["measured"][whole]["device_ms"] / found["measured"][int8]["device_ms"] for whole, int8 in pairs]
        lost = [100 * (accuracies[whole] - accuracies[int8]) for whole, int8 in pairs]
        how = "of {} device halves, int8 against float32, one ONNX Runtime thread"
        figures["int8_speedup"] = figure(median(speedups), "ratio", f"median {how.format(len(pairs))}", n=len(pairs), spread=(min(speedups), max(speedups)))
        figures["int8_points_lost"] = figure(
            median(lost), "points", f"on validation, median {how.format(len(pairs))}", n=len(pairs), spread=(min(lost), max(lost))
        )
    for slowdown in SLOWDOWNS:
        real = [place for place in found["grid"] if place["slowdown"] == slowdown and place["cut"]]
        name = f"end_to_end_best_speedup.x{slowdown:g}"
        if not real:
            figures[name] = figure(None, "ratio", f"no split of ours is within 1 point on validation and {100 * TEST_LOSS:g} on test")
            continue
        best = min(real, key=lambda place: place["cut_ms"] / place["baseline_ms"])
        ratio, parts = best["baseline_ms"] / best["cut_ms"], found["measured"][best["cut"]]
        how = (
            f"{best['baseline']} over {best['cut']} at slowdown {slowdown:g}, {best['rtt_ms']:g} ms, {best['rate_mbps']:.3g} Mbit/s: {ratio:.2f}; "
            f"{slowdown * (parts['device_ms'] + parts['encode_ms']):.1f} of the split's {best['cut_ms']:.1f} ms are the device's; "
            f"ours is picked at {sum(place['real_cut'] for place in real)} of {len(real)} places"
        )
        figures[name] = figure(ratio, "ratio", how, n=len(real))
    return figures
