"""The tables of results/search.json: what each method finds and costs, how far trials and predicted times are to be trusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.evaluator_rank import CANDIDATES
from benchmarks.fronts import EVALUATIONS, METHODS
from benchmarks.predictor import BACKBONES, HALVES, MODELS

Figures = Mapping[str, Mapping[str, Any]]


def search_tables(results: Mapping[str, Any]) -> str:
    """All of them, each with a sentence on how it was had; what is not run yet is a dash."""
    figures, machine = results["figures"], results["machine"]
    parts = [methods_table(figures), *evaluator_lines(figures), *predictor_table(figures), *ray_lines(figures)]
    parts.append(f"On {machine['cores']} cores of {machine['cpu']} (commit {results['commit'][:8]}, {results['date']}).")
    return "\n\n".join(parts)


def _cell(figures: Figures, key: str, form: str, *, spread: bool = False) -> str:
    figure = figures.get(key, {})
    value = figure.get("value")
    if value is None:
        return "-"
    ends = figure["spread"]
    return f"{value:{form}}" + (f" ({ends[0]:{form}} to {ends[1]:{form}})" if spread and ends and figure["n"] > 1 else "")


def methods_table(figures: Figures) -> str:
    rows = []
    for method in METHODS:
        ratio = "1" if method == "random" else _cell(figures, f"hypervolume_ratio.{method}", ".3f", spread=True)
        cells = (ratio, _cell(figures, f"surrogate_gap.{method}", ".3f", spread=True), _cell(figures, f"searcher_ms_per_trial_at_5000.{method}", ".3g"))
        rows.append(f"| {method} | {' | '.join(cells)} |")
    needed = _cell(figures, "evaluations_to_random200", ".0f", spread=True)
    return "\n".join(
        [
            f"| method | hypervolume over random's, {EVALUATIONS} evaluations | gap to a known optimum | own ms a trial, after 5,000 |",
            "|---|---:|---:|---:|",
            *rows,
            "",
            "Hypervolume: ResNet-20, CIFAR-10 as JPEG; accuracy, log latency and log bytes, between accuracy floor, device-only and raw image, and the best of "
            f"all fronts; mean (least to most) over seeds. The best method needs {needed} evaluations for what random has after {EVALUATIONS}. "
            "Gap: (optimum - found) / (optimum - best single ratio), eight layers within a latency budget.",
        ]
    )


def evaluator_lines(figures: Figures) -> list[str]:
    if figures["evaluator_spearman"]["value"] is None:
        return []
    rank = " and ".join(f"{name} {_cell(figures, f'evaluator_{key}', '.2f')}" for name, key in (("Spearman", "spearman"), ("Kendall", "kendall")))
    cost, shared = (1 / figures[key]["value"] for key in ("evaluator_cost_ratio", "evaluator_cost_ratio_shared"))
    return [
        f"Trials against fine-tuning, {CANDIDATES} random candidates within 5 points of the best: {rank}; a trial takes 1/{cost:.0f} of the processor's time, "
        f"with its share of the supernet's training 1/{shared:.0f}."
    ]


def predictor_table(figures: Figures) -> list[str]:
    """Median absolute error, and the error that nine tenths stay below, in per cent."""
    if figures["predictor_mdape"]["value"] is None:
        return []
    kinds = [(name, precision) for name, _ in BACKBONES for precision, _ in HALVES]

    def row(key: str, how: str) -> str:
        cells = [f"{figures[f'{key}_mdape']['value']:.1f} / {figures[f'{key}_p90ape']['value']:.1f}"]
        for name, precision in kinds:
            own = figures[f"{key}_mdape.{name}.{precision}"]
            cells.append(f"{own['value']:.1f} / {own['spread'][1]:.1f}")
        return f"| {how} | {' | '.join(cells)} |"

    return [
        "\n".join(
            [
                f"| error, %: median / nine tenths below | all {figures['predictor_mdape']['n']} | {' | '.join(map(' '.join, kinds))} |",
                f"|---|{'---:|' * (1 + len(kinds))}",
                *(row(key, how) for key, how in MODELS.values()),
                "",
                "Latency of random pruned device halves that the profile was not measured with, one thread.",
            ]
        )
    ]


def ray_lines(figures: Figures) -> list[str]:
    if figures["ray_speedup_2"]["value"] is None:
        return []
    overhead = {int(key.rpartition(".w")[2]): figure["value"] for key, figure in figures.items() if key.startswith("ray_overhead_ms_per_trial.w")}
    each = ", ".join(f"{value:.3g} with {workers}" for workers, value in sorted(overhead.items()) if value is not None)
    return [f"Ray: {_cell(figures, 'ray_speedup_2', '.2f')} times as fast with two workers as with one; the driver's own ms a trial: {each}."]
