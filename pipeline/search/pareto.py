"""Which candidates are worth having: limits, the Pareto set, the choice, and the files that say so."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pipeline.errors import CoinferError
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.limits import TOLERANCE, Limits, binding

OBJECTIVES: Mapping[str, Literal["maximize", "minimize"]] = {"accuracy": "maximize", "total_ms": "minimize", "wire_bytes": "minimize"}
MEASURED = {"latency_ms": "total_ms", "wire_bytes": "wire_bytes", "energy_mj": "energy_mj"}  # objective.minimize -> field
NEAREST = 3  # candidates named where none is within the limits


@dataclass(frozen=True)
class Trial:
    """One row of the search: a candidate with its measurement, or with the reason there is none.

    `duplicate_of` is the number of the trial whose measurement (or failure) was reused; `rescores` that of the trial whose candidate was measured again
    after more training, which that trial no longer speaks for.
    """

    number: int
    candidate: Candidate
    measurement: Measurement | None
    duplicate_of: int | None = None
    failure: str | None = None
    rescores: int | None = None


def objectives(minimize: str) -> Mapping[str, Literal["maximize", "minimize"]]:
    """What candidates are compared by: `OBJECTIVES`, and what `objective.minimize` names if it is none of these."""
    return {**OBJECTIVES, MEASURED[minimize]: "minimize"}


def costs(measurement: Measurement, axes: Mapping[str, Literal["maximize", "minimize"]] = OBJECTIVES) -> tuple[float, ...]:
    """The objectives as numbers to make small: error up to a constant, ms, bytes."""
    return tuple(-getattr(measurement, name) if direction == "maximize" else getattr(measurement, name) for name, direction in axes.items())


def feasible(trials: Sequence[Trial], limits: Limits) -> list[Trial]:
    """The trials measured and within `limits`, each candidate once, by its last measurement, in order."""
    outdated = {trial.rescores for trial in trials}
    return [t for t in trials if t.duplicate_of is None and t.number not in outdated and t.measurement is not None and limits.allow(t.measurement)]


def non_dominated(trials: Sequence[Trial], minimize: str = "latency_ms") -> list[Trial]:
    """Those of the measured `trials` that no other beats on one objective without losing on another; of equals the first stays.

    The objectives are `objectives(minimize)`.
    """
    axes = objectives(minimize)
    points = [(trial, costs(trial.measurement, axes)) for trial in trials if trial.measurement is not None]
    kept = []
    for trial, mine in points:
        beaten = (all(a <= b for a, b in zip(other, mine, strict=True)) and (other != mine or rival.number < trial.number) for rival, other in points)
        if not any(beaten):
            kept.append(trial)
    return kept


def cheapest(trials: Sequence[Trial], minimize: str) -> Trial:
    """The trial with least of `minimize` (a value of objective.minimize); ties go to accuracy, latency, bytes, then the earlier one."""

    def key(trial: Trial) -> tuple[float, ...]:
        assert trial.measurement is not None
        return (getattr(trial.measurement, MEASURED[minimize]), *costs(trial.measurement), trial.number)

    return min(trials, key=key)


def choose(trials: Sequence[Trial], limits: Limits, minimize: str) -> Trial:
    """The cheapest point of the feasible Pareto set.

    Raises:
        CoinferError: nothing is feasible; names the binding limits and the nearest candidates.
    """
    pareto = non_dominated(feasible(trials, limits), minimize)
    if pareto:
        return cheapest(pareto, minimize)
    measured = [trial for trial in trials if trial.measurement is not None]
    if not measured:
        raise CoinferError(f"every trial of the search failed, the first with: {trials[0].failure if trials else 'no trials'}")

    own = [trial for trial in measured if trial.duplicate_of is None]
    raise CoinferError(f"none of {len(own)} candidates is within the limits: {unmet(own, limits)}. Loosen a limit, or give the search more trials.")


def unmet(trials: Sequence[Trial], limits: Limits) -> str:
    """Which limits keep the measured `trials` out, all of them, and what the nearest miss."""
    measured = [(trial, trial.measurement) for trial in trials if trial.measurement is not None]

    def missed(measurement: Measurement) -> dict[str, float]:
        return {name: value for name, value in limits.violations(measurement).items() if value > 0}

    nearest = sorted(measured, key=lambda pair: (sum(missed(pair[1]).values()), pair[0].number))[:NEAREST]
    described = (f"{trial.candidate.label()}: {' and '.join(limits.described(name, found) for name in missed(found))}" for trial, found in nearest)
    return f"{binding([found for _, found in measured], limits)}; nearest are {'; '.join(described)}"


def trials_csv(trials: Sequence[Trial], limits: Limits) -> str:
    """One row a trial; empty cells where there is no value, `keep` as JSON."""
    pareto = {trial.number for trial in non_dominated(feasible(trials, limits))}
    described, measured = [f.name for f in fields(Candidate)], [f.name for f in fields(Measurement)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["number", "label", "state", "duplicate_of", "rescores", "failure", "feasible", "pareto", *described, *measured])
    for trial in trials:
        m = trial.measurement
        state = "failed" if m is None else "reused" if trial.duplicate_of is not None else "rescored" if trial.rescores is not None else "measured"
        flags = [trial.duplicate_of, trial.rescores, trial.failure, int(m is not None and limits.allow(m)), int(trial.number in pareto)]
        candidate = trial.candidate.to_dict() | {"keep": json.dumps(dict(trial.candidate.keep), sort_keys=True)}
        values = [None] * len(measured) if m is None else [asdict(m)[name] for name in measured]
        writer.writerow([trial.number, trial.candidate.label(), state, *flags, *(candidate[name] for name in described), *values])
    return text.getvalue()


def point(trial: Trial, limits: Limits) -> dict[str, Any]:
    """A measured trial as JSON: number, label, whether it is within the limits, candidate and measurement."""
    assert trial.measurement is not None
    return {
        "number": trial.number,
        "label": trial.candidate.label(),
        "feasible": limits.allow(trial.measurement),
        "candidate": trial.candidate.to_dict(),
        "measurement": trial.measurement.to_dict(),
    }


def baselines(trials: Sequence[Trial], limits: Limits, minimize: str) -> tuple[Trial, Trial]:
    """(device-only, edge-only): the whole backbone on the device, and the cheapest WebP quality on or above the floor.

    Where no quality reaches the floor the most accurate one stands for edge-only, and `point` calls it infeasible.

    Raises:
        CoinferError: a baseline could not be measured, with its reason.
    """

    def measured(kind: str) -> list[Trial]:
        found = [trial for trial in trials if trial.candidate.kind == kind and not trial.candidate.keep and trial.duplicate_of is None]
        good = [trial for trial in found if trial.measurement is not None]
        if not good:
            reason = found[0].failure if found else "it was not tried"
            raise CoinferError(f"the {kind} baseline has no measurement: {reason}")
        return good

    images = measured("edge-only")
    accuracy = {trial.number: trial.measurement.accuracy for trial in images if trial.measurement is not None}
    enough = [t for t in images if accuracy[t.number] >= limits.floor - TOLERANCE] or [t for t in images if accuracy[t.number] == max(accuracy.values())]
    return measured("device-only")[0], cheapest(enough, minimize)


def not_finite(measurement: Measurement) -> list[str]:
    """Names of the fields that are NaN or infinite."""
    return [name for name, value in asdict(measurement).items() if not math.isfinite(value)]
