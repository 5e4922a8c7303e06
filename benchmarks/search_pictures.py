"""The pictures of results/search.json: fronts of all methods, hypervolume against evaluations, foreseen against measured times, trials against fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evaluator_rank import WITHIN
from benchmarks.fronts import EVALUATIONS, METHODS, courses

Raw = Mapping[str, Any]
COLOURS = dict(zip(METHODS, ("black", "grey", "tab:blue", "tab:green", "tab:red"), strict=True))


def fronts(place: Raw, name: str) -> Figure:
    """What no other candidate of the same method beats, all seeds together, on the whole validation split: accuracy against time, and against bytes."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    floor, device_only_ms, _ = place["references"][1]
    for method in METHODS:
        rows = np.array([row[1:] for run in place["runs"] if run["method"] == method for row in run["front"]], dtype=float).reshape(-1, 3)
        rows = rows[rows[:, 0] >= floor]
        for axis, column in zip(axes, (1, 2), strict=True):
            places = np.maximum(rows[:, column], 1)
            axis.plot(*_staircase(places, rows[:, 0]), color=COLOURS[method], drawstyle="steps-post", label=method)
    axes[0].axvline(device_only_ms, linestyle=":", color="black", linewidth=1)
    axes[0].set_xlabel("predicted ms, end to end (dotted: device-only)")
    axes[1].set_xlabel("bytes on the wire (1: nothing is sent)")
    axes[0].set_ylabel("top-1 accuracy, validation")
    for axis in axes:
        axis.set_xscale("log")
    axes[1].legend()
    figure.suptitle(f"{name}: best of each method after {EVALUATIONS} evaluations, all seeds", fontsize="medium")
    return figure


def _staircase(costs: np.ndarray, accuracies: np.ndarray) -> tuple[list[float], list[float]]:
    """The best accuracy for at most each cost."""
    found: list[tuple[float, float]] = []
    for index in np.lexsort((-accuracies, costs)):
        if not found or accuracies[index] > found[-1][1]:
            found.append((float(costs[index]), float(accuracies[index])))
    return [cost for cost, _ in found], [accuracy for _, accuracy in found]


def progress(place: Raw, name: str) -> Figure:
    """The hypervolume after each evaluation: mean, least and most of the seeds."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for method, rows in courses(place).items():
        counts = np.arange(1, rows.shape[1] + 1)
        axis.plot(counts, rows.mean(0), color=COLOURS[method], label=method)
        axis.fill_between(counts, rows.min(0), rows.max(0), color=COLOURS[method], alpha=0.15, linewidth=0)
    axis.set_xlabel("evaluations")
    axis.set_ylabel("hypervolume, of the union of all")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right")
    seeds = len({run["seed"] for run in place["runs"]})
    axis.set_title(f"{name}: mean of {seeds} seed{'s' * (seeds > 1)}{', least and most' * (seeds > 1)}", fontsize="medium")
    return figure


def predicted(raw: Raw) -> Figure:
    """Each unseen half: foreseen against measured."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axis = figure.subplots()
    rows = raw["halves"]
    for backbone, marker in zip(dict.fromkeys(row["backbone"] for row in rows), "osv^", strict=False):
        for precision, colour in (("fp32", "tab:blue"), ("int8", "tab:orange")):
            own = [row for row in rows if (row["backbone"], row["precision"]) == (backbone, precision)]
            took, foreseen = [np.median(row["visits_ms"]) for row in own], [row["predicted_ms"] for row in own]
            axis.scatter(took, foreseen, s=14, marker=marker, color=colour, label=f"{backbone} {precision}")
    ends = [min(row["predicted_ms"] for row in rows) * 0.8, max(row["predicted_ms"] for row in rows) * 1.25]
    axis.plot(ends, ends, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="measured ms", ylabel="predicted ms")
    axis.legend(fontsize="small")
    axis.set_title("pruned device halves that the profile was not measured with", fontsize="medium")
    return figure


def ranked(raw: Raw) -> Figure:
    """Each candidate: what its trial said against what full fine-tuning gave."""
    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axis = figure.subplots()
    rows = raw["judged"]
    for kind, colour in (("device-only", "tab:red"), ("split", "tab:blue")):
        own = [row for row in rows if (row["candidate"]["cut"] == "output") == (kind == "device-only")]
        axis.scatter([row["estimated"] for row in own], [row["finetuned"] for row in own], s=18, color=colour, label=kind)
    axis.set(xlabel="accuracy of the trial", ylabel="accuracy after fine-tuning")
    axis.legend()
    axis.set_title(f"candidates within {100 * WITHIN:g} points of the best", fontsize="medium")
    return figure
