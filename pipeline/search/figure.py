"""The pictures of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from pipeline.search.limits import Limits
from pipeline.search.pareto import Trial, feasible, non_dominated
from pipeline.search.progress import Point


def pareto_figure(trials: Sequence[Trial], limits: Limits, chosen: Trial, baselines: Sequence[Trial], device: str) -> Figure:
    """Accuracy against latency, coloured by bytes on the wire; dots are within the limits, crosses are not, the accuracies allowed are shaded.

    `chosen` and `baselines` (device-only, edge-only) are measured trials and get marks of their own.
    """
    figure = Figure(figsize=(7.5, 5.6), layout="constrained")
    axes = figure.subplots()
    measured = [(trial, trial.measurement) for trial in trials if trial.measurement is not None and trial.duplicate_of is None]
    allowed = {trial.number for trial in feasible(trials, limits)}
    scale = PowerNorm(0.5, 0.0, max(m.wire_bytes for _, m in measured))  # a lossless image would leave all else one colour
    for marker, inside in (("o", True), ("x", False)):
        shown = [m for trial, m in measured if (trial.number in allowed) == inside]
        if not shown:
            continue
        label = "within the limits" if inside else "beyond a limit"
        across, up = [m.total_ms for m in shown], [100 * m.accuracy for m in shown]
        dots = axes.scatter(across, up, c=[m.wire_bytes for m in shown], norm=scale, marker=marker, label=label)
        if inside:
            figure.colorbar(dots, label="bytes on the wire per image")  # `chosen` is one of these
    front = sorted((trial.measurement.total_ms, 100 * trial.measurement.accuracy) for trial in non_dominated(feasible(trials, limits)) if trial.measurement)
    axes.scatter(
        [ms for ms, _ in front],
        [percent for _, percent in front],
        s=110,
        facecolors="none",
        edgecolors="black",
        linewidths=0.8,
        label="Pareto set (with bytes)",
    )
    axes.axhspan(100 * limits.floor, 100, color="0.94", zorder=0)
    axes.axhline(100 * limits.floor, color="0.5", linestyle=":", label="accuracy floor")
    for trial, marker, name in ((chosen, "*", "chosen"), *zip(baselines, ("s", "D"), ("device-only", "edge-only"), strict=True)):
        assert trial.measurement is not None
        across, up = [trial.measurement.total_ms], [100 * trial.measurement.accuracy]
        axes.scatter(across, up, s=120, marker=marker, facecolors="none", edgecolors="#D55E00", linewidths=1.6, label=f"{name}: {trial.candidate.label()}")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("predicted latency per image, ms")
    axes.set_ylabel("top-1 accuracy on validation, %")
    axes.set_title(f"{device}: {len(measured)} candidates measured", fontsize="medium")
    figure.legend(fontsize="small", loc="outside lower center", ncols=2, frameon=False)
    return figure


def hypervolume_figure(points: Sequence[Point], device: str, method: str) -> Figure:
    """Hypervolume against evaluations beyond the baselines."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    axes.step([point.evaluations for point in points], [point.hypervolume for point in points], where="post", color="#0072B2", linewidth=2)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("hypervolume")
    axes.set_ylim(bottom=0)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{device}: {method}", fontsize="medium")
    return figure


def learning_figure(history: Sequence[Mapping[str, Any]], device: str) -> Figure:
    """Reward of each trial that an agent learned from, coloured by the latency's weight in it, with the noise it explored with below."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for weight in sorted({row["weight"] for row in history}):
        rows = [row for row in history if row["weight"] == weight and row["reward"] is not None]
        above.plot([row["number"] for row in rows], [row["reward"] for row in rows], ".", label=f"latency's weight {weight:g}")
    above.set_ylabel("reward")
    above.legend()
    below.plot([row["number"] for row in history], [float("nan") if row["sigma"] is None else row["sigma"] for row in history], color="black")
    below.set_ylabel("sigma")
    below.set_xlabel("trial")
    above.set_title(f"{device}: ddpg", fontsize="medium")
    return figure


def importance_figure(found: Mapping[str, Mapping[str, float]], device: str) -> Figure:
    """How much of the variance of accuracy and of latency each parameter explains, a bar each."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    for axes, (target, shares) in zip(figure.subplots(1, len(found), sharex=True, squeeze=False)[0], found.items(), strict=True):
        ascending = sorted(shares.items(), key=lambda item: item[1])
        axes.barh([name for name, _ in ascending], [share for _, share in ascending], color="#0072B2")
        axes.set_xlabel("share of variance (fANOVA)")
        axes.set_title(f"{device}: {target}", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    return figure
