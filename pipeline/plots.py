"""Plots: pictures of what latency is made of and how it moves with the link rate, and tables for `dvc plots`."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's palette: told apart with any colour vision.
PART_COLOURS = {"device_ms": "#0072B2", "encode_ms": "#56B4E9", "link_ms": "#D55E00", "decode_ms": "#F0E442", "edge_ms": "#009E73"}
MODE_COLOURS = {"split": "#0072B2", "device_only": "#009E73", "edge_only": "#D55E00"}


def latency_breakdown(parts: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """One bar a mode (`split`, `device_only`, `edge_only`), stacked from its parts in ms; the total stands at its end.

    `parts` maps each mode to `device_ms encode_ms link_ms decode_ms edge_ms`.
    """
    figure = Figure(figsize=(7.5, 1.2 + 0.6 * len(parts)), layout="constrained")
    axes = figure.subplots()
    modes = list(parts)
    left = [0.0] * len(modes)
    for part, colour in PART_COLOURS.items():
        widths = [parts[mode][part] for mode in modes]
        axes.barh(modes, widths, left=left, height=0.6, color=colour, edgecolor="white", linewidth=0.5, label=part.removesuffix("_ms"))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, total in enumerate(left):
        axes.annotate(f"{total:.3g} ms", (total, row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(modes)), [_name(mode) for mode in modes])
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xlabel("latency per image, ms")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    figure.legend(loc="outside lower center", ncols=len(PART_COLOURS), frameon=False, fontsize="small")
    return figure


def latency_against_rate(rates_mbps: Sequence[float], total_ms: Mapping[str, Sequence[float]], at_mbps: float, title: str) -> Figure:
    """One line a mode: total latency in ms over the link rate in Mbit/s, both logarithmic; `at_mbps` is marked."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    for mode, values in total_ms.items():
        axes.loglog(rates_mbps, values, color=MODE_COLOURS[mode], linewidth=2, label=_name(mode))
    axes.axvline(at_mbps, color="0.5", linestyle=":", linewidth=1.5, label=f"{at_mbps:g} Mbit/s")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("link rate, Mbit/s")
    axes.set_ylabel("latency per image, ms")
    axes.grid(which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(title, fontsize="medium")
    return figure


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write `rows` under `header`; floats keep six digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)


def _name(mode: str) -> str:
    return mode.replace("_", "-")


def histograms(counts: Mapping[str, tuple[Sequence[float], Sequence[int]]], xlabel: str, title: str) -> Figure:
    """One panel a name: what share of all values lies up to each bound, and above the last (`bounds`, `counts` of one more)."""
    figure = Figure(figsize=(7.5, 0.6 + 1.6 * len(counts)), layout="constrained")
    for axes, (name, (bounds, values)) in zip(figure.subplots(len(counts), squeeze=False)[:, 0], counts.items(), strict=True):
        labels = [*(f"{bound:g}" for bound in bounds), f"> {bounds[-1]:g}"][: len(values) if values[-1] else -1]
        axes.bar(labels, [value / max(1, sum(values)) for value in values][: len(labels)], color=MODE_COLOURS["split"], width=0.9)
        axes.set_title(name, fontsize="small", loc="left")
        axes.set_ylabel("share")
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(xlabel)
    figure.suptitle(title, fontsize="medium")
    return figure
