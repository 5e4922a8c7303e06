"""Pictures of results/three_step.json."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from benchmarks.three_step_figures import pooled
from models.backbones import build_backbone
from models.cutting import cut_points

# Okabe and Ito's palette, and shades of it: told apart with any colour vision; codecs of a family share a hue.
COLOURS = {
    "rate": "#0072B2",
    "uniform": "#56B4E9",
    "codebook": "#009E73",
    "multi-rate": "#E69F00",
    "bottlenet++": "#D55E00",
    "public-code": "#CC79A7",
    "public-code-vector": "#7A3B63",
    "jscc-awgn": "#D5C711",
    "jscc-bec": "#A39800",
    "jscc-bsc": "#5C5600",
}
IMAGE_STYLES = {"webp": ("0.3", "."), "jpeg-bare": ("0.5", "+"), "jpeg": ("0.65", "x"), "png": ("0.3", "D")}
RAW_STYLES = {8: "v", 32: "^"}
WORST = 0.78  # accuracy, below which nobody would go

Raw = dict[str, Any]


def fronts(raw: Raw, backbone: str, cuts: dict[str, str]) -> Figure:
    """Accuracy on validation against payload bits, a panel for each cut: every codec, image formats plain and trained on, and the feature as it is."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    panels = figure.subplots(1, len(cuts), sharex=True, sharey=True)
    reference = raw["references"].get(backbone, {}).get("validation")
    elements = {cut.name: cut.elements for cut in cut_points(build_backbone(backbone, 10, 32), torch.zeros(2, 3, 32, 32))}
    for axes, (where, cut) in zip(panels, cuts.items(), strict=True):
        for kind, colour in COLOURS.items():
            mine = [row for row in _splits(raw, backbone) if row["point"]["cut"] == cut and row["point"]["codec"]["kind"] == kind]
            whole, pruned = ([row for row in mine if bool(row["point"].get("prune_epochs")) == less] for less in (False, True))
            rows = [{"validation": found} for row in whole for found in row["validation"].get("points", [row["validation"]])]
            _line(axes, _places(rows, "payload_bits"), color=colour, marker="o", label=kind)
            _line(axes, _places(pruned, "payload_bits"), color=colour, marker="s", linestyle=":", label=f"{kind}, device half pruned")
            if kind == "bottlenet++":
                _line(axes, _places(rows, "uncoded_bits"), color=colour, marker="x", linestyle="--", label=f"{kind}, uncoded")
            elif kind in ("jscc-bec", "jscc-bsc"):
                _line(axes, _places(rows, "channel_uses"), color=colour, marker="x", linestyle="--", label=f"{kind}, uncoded")
        rows = [row for row in _pruned_alone(raw, backbone) if row["point"]["cut"] == cut]
        _line(axes, _places(rows, "payload_bits"), color="black", marker="s", label="2-step pruning, 8 bit")
        for (image_format, (colour, marker)), tuned in itertools.product(IMAGE_STYLES.items(), (False, True)):
            images = [row for row in raw["points"].values() if (row["point"].get("image_format"), row["point"]["backbone"]) == (image_format, backbone)]
            rows = [row for row in images if bool(row["point"]["epochs"]) == tuned]
            style = {"color": colour, "marker": marker, "linestyle": "-" if tuned else ":"}
            _line(axes, _places(rows, "payload_bits"), label=f"{image_format}{', trained on it' if tuned else ''}", **style)
        if reference:
            for bits, marker in RAW_STYLES.items():
                axes.plot(bits * elements[cut], reference, color="black", marker=marker, markersize=5, linestyle="none", label=f"raw feature, {bits} bit")
            axes.axhline(reference, color="black", linewidth=0.8)
            axes.axhline(reference - 0.01, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{where} ({cut})", fontsize="medium")
        axes.set_xlabel("payload bits per image")
        axes.grid(which="major", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(bottom=max(WORST, panels[0].get_ylim()[0]))
    panels[0].set_ylabel("top-1 on validation")
    _legend(figure, 5)
    figure.suptitle(f"{backbone}: accuracy against payload; the level lines are the unsplit network and 1 point less", fontsize="medium")
    return figure


def against_macs(raw: Raw) -> Figure:
    """Accuracy on validation against what the device computes, of every split and of networks pruned to stay on the device."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for backbone, marker in (("resnet20", "o"), ("resnet56", "s")):
        for kind, colour in COLOURS.items():
            rows = [row for row in _splits(raw, backbone) if row["point"]["codec"]["kind"] == kind and row["validation"]["accuracy"] > WORST]
            macs = [(row["head_macs"] + row["encoder_macs"]) / 1e6 for row in rows]
            if rows:
                accuracies = [row["validation"]["accuracy"] for row in rows]
                axes.scatter(macs, accuracies, color=colour, marker=marker, s=28, alpha=0.8, label=f"{backbone}, {kind}")
        rows = [row for row in _pruned_alone(raw, backbone) if row["point"]["cut"] is None]
        if rows:
            macs, accuracies = zip(*((row["head_macs"] / 1e6, row["validation"]["accuracy"]) for row in rows), strict=True)
            axes.scatter(macs, accuracies, color="black", marker=marker, s=28, alpha=0.8, label=f"{backbone}, pruned whole")
        if backbone in raw["references"]:
            axes.axhline(raw["references"][backbone]["validation"], color="black", linewidth=0.8, linestyle="-" if marker == "o" else "--", label=backbone)
    axes.set_xlabel("device MACs per image, millions (head and encoder)")
    axes.set_ylabel("top-1 on validation")
    axes.set_axisbelow(True)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small", ncols=2)
    return figure


def over_noise(raw: Raw) -> Figure:
    """Accuracy against the channel's quality: analogue symbols beside PAM, and what erased and flipped bits leave."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row in pooled(raw["points"]):
        codec, found = row["point"].get("codec", {}), row["validation"]
        uses = f"{found.get('channel_uses')} channel uses"
        if codec.get("kind") == "jscc-awgn":
            best = {level: max(levels[level] for name, levels in found.items() if name.startswith("pam ")) for level in found["analogue"]}
            drawn = _over(left, found["analogue"], linewidth=2, label=f"jscc-awgn, {uses}")
            _over(left, best, color=drawn.get_color(), linestyle="--", linewidth=1, label=f"best of 1 to 4 bit PAM, {uses}")
        elif codec.get("kind") in ("jscc-bec", "jscc-bsc"):
            _over(right, found["bits"], marker="o", label=f"{codec['kind']}, {uses}")
    left.set_xlabel("PSNR of the channel, dB")
    right.set_xlabel("probability that a bit is lost (bec) or flipped (bsc)")
    left.set_ylabel("top-1 on validation")
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
    return figure


def over_links(found: Raw) -> Figure:
    """Latency against link rate: the pick, the best baseline and our best split, a panel for each device and round trip, shaded by who wins."""
    slowdowns = sorted({place["slowdown"] for place in found["grid"]})
    rtts = sorted({place["rtt_ms"] for place in found["grid"]})
    winners = dict.fromkeys(_winner(place) for place in found["grid"])
    shades = dict(zip(winners, itertools.cycle(colormaps["tab20"].colors[1::2]), strict=False))
    figure = Figure(figsize=(4 * len(slowdowns), 3 * len(rtts)), layout="constrained")
    for row, rtt in zip(figure.subplots(len(rtts), len(slowdowns), sharex=True, squeeze=False), rtts, strict=True):
        for axes, slowdown in zip(row, slowdowns, strict=True):
            places = [place for place in found["grid"] if (place["slowdown"], place["rtt_ms"]) == (slowdown, rtt)]
            rates = [place["rate_mbps"] for place in places]
            axes.loglog(rates, [place["baseline_ms"] for place in places], color="#D55E00", label="best baseline")
            axes.loglog(rates, [place["pick_ms"] for place in places], color="#0072B2", linestyle="--", label="picked")
            cuts = [(place["rate_mbps"], place["cut_ms"]) for place in places if place["cut"]]
            if cuts:
                axes.loglog(*zip(*cuts, strict=True), color="black", linestyle=":", label="best split")
            shown = [place[way] for place in places for way in ("baseline_ms", "pick_ms", "cut_ms") if place[way]]
            axes.set_ylim(min(shown) / 1.5, max(shown) * 1.5)
            edges = [rates[0], *(math.sqrt(low * high) for low, high in itertools.pairwise(rates)), rates[-1]]
            for place, (low, high) in zip(places, itertools.pairwise(edges), strict=True):
                axes.axvspan(low, high, color=shades[_winner(place)], alpha=0.6, linewidth=0, label=f"{_winner(place)} wins")
            axes.set_title(f"device {slowdown:g}x slower, round trip {rtt:g} ms", fontsize="small")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.grid(which="major", color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("latency per image, ms")
    for axes in figure.axes[-len(slowdowns) :]:
        axes.set_xlabel("link rate, Mbit/s")
    _legend(figure, 3)
    return figure


def _winner(place: Raw) -> str:
    """Of pick and best baseline the faster."""
    return short_name(place["pick"] if place["ratio"] < 1 else place["baseline"])


def short_name(name: str) -> str:
    return name.removeprefix("resnet20 ").replace(", seed 0", "")


def _legend(figure: Figure, columns: int) -> None:
    """Of all panels, below them."""
    panels = reversed(figure.axes)  # most is shown in the last
    names = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(names.values(), names.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def _splits(raw: Raw, backbone: str) -> Iterable[Raw]:
    return (row for row in pooled(raw["points"]) if "codec" in row["point"] and row["point"]["backbone"] == backbone)


def _pruned_alone(raw: Raw, backbone: str) -> Iterable[Raw]:
    """Networks pruned without a learned codec."""
    return (row for row in raw["points"].values() if "keep" in row["point"] and row["point"]["backbone"] == backbone)


def _places(rows: Iterable[Raw], size: str) -> list[tuple[float, float]]:
    """(bits, accuracy) in the order of bits."""
    sized = ((row["validation"].get(size), row["validation"]["accuracy"]) for row in rows)
    return sorted((bits["mean"] if isinstance(bits, dict) else bits, share) for bits, share in sized if bits)


def _line(axes: Axes, places: list[tuple[float, float]], **style: Any) -> None:
    """Through the places that none of fewer bits is as good as; markers, if any, at all."""
    if not places:
        return
    if marker := style.pop("marker", None):
        axes.plot(*zip(*places, strict=True), color=style["color"], marker=marker, markersize=4, linestyle="none", alpha=0.5)
    best = [place for number, place in enumerate(places) if place[1] > max((share for _, share in places[:number]), default=0.0)]
    axes.plot(*zip(*best, strict=True), marker=marker, markersize=4, linewidth=1.3, **style)


def _over(axes: Axes, levels: dict[str, float], **style: Any) -> Line2D:
    """Values against the levels that name them, in order, which they lose in JSON."""
    line: Line2D = axes.plot(*zip(*sorted((float(level), value) for level, value in levels.items()), strict=True), **style)[0]
    return line
