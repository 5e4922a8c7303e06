"""Which parameters of a search mattered: Optuna's evaluator over the splits that were measured, whichever method proposed them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, create_trial

from pipeline.search.candidate import Candidate
from pipeline.search.pareto import Trial
from pipeline.search.space import Space

LEAST_SPLITS = 10  # fewer say nothing
TARGETS = ("accuracy", "total_ms")
TREES = 64

Importances = dict[str, dict[str, float]]  # what is explained -> parameter -> share of its variance


def importances(trials: Sequence[Trial], space: Space, seed: int) -> Importances:
    """fANOVA (Hutter, Hoos and Leyton-Brown, ICML 2014) of accuracy and of the logarithm of latency over cut, mean kept fraction, codec, code and precision.

    Parameters that never varied are left out; nothing is said of fewer than ten splits.
    """
    splits = [trial for trial in trials if trial.candidate.kind == "split" and trial.measurement is not None and trial.duplicate_of is None]
    rows = [_parameters(trial.candidate, space) for trial in splits]
    if len(rows) < LEAST_SPLITS:
        return {}
    distributions: dict[str, BaseDistribution] = {}
    for name in rows[0]:
        values = sorted({row[name] for row in rows}, key=str)
        if len(values) > 1:
            numbers = [value for value in values if isinstance(value, float)]
            distributions[name] = FloatDistribution(min(numbers), max(numbers)) if numbers else CategoricalDistribution(values)
    if not distributions:
        return {}
    study = optuna.create_study(directions=["maximize", "minimize"])
    for trial, row in zip(splits, rows, strict=True):
        assert trial.measurement is not None
        values_of = [trial.measurement.accuracy, math.log(trial.measurement.total_ms)]
        study.add_trial(create_trial(values=values_of, params={name: row[name] for name in distributions}, distributions=distributions))

    def explain(place: int) -> dict[str, float]:
        def target(trial: FrozenTrial) -> float:
            return float(trial.values[place])

        if len({target(trial) for trial in study.trials}) == 1:
            return dict.fromkeys(distributions, 0.0)
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(n_trees=TREES, seed=seed), target=target)
        return {name: float(share) for name, share in found.items()}

    return {name: explain(place) for place, name in enumerate(TARGETS)}


def importances_csv(found: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each parameter and what it explains."""
    rows = [f"{name},{target},{share:.4f}\n" for target, shares in found.items() for name, share in sorted(shares.items(), key=lambda item: -item[1])]
    return "".join(["parameter,explains,importance\n", *rows])


def _parameters(candidate: Candidate, space: Space) -> dict[str, float | str]:
    """The parameters that every split has; numbers as floats, sizes by their logarithm as they act."""
    groups, keep = space.keep(candidate.cut), dict(candidate.keep)
    assert candidate.codec is not None
    assert candidate.code_channels is not None
    assert candidate.stride is not None
    assert candidate.bits is not None
    return {
        "cut": candidate.cut,
        "codec": candidate.codec,
        "mean kept fraction": sum(keep.get(name, 1.0) for name in groups) / len(groups) if groups else 1.0,
        "code_channels": math.log2(candidate.code_channels),
        "stride": math.log2(candidate.stride),
        "bits": float(candidate.bits),
        "rate_weight": candidate.rate_weight or 0.0,
        "precision": candidate.precision,
    }
