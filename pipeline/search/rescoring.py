"""Successive fidelity: the best of what a supernet estimated is trained a little and measured again before the choice (METHODS 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import CoinferError
from pipeline.files import atomic_write_json, read_json
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.executor import Executor, Job
from pipeline.search.limits import Limits
from pipeline.search.pareto import MEASURED, Trial, choose, feasible, non_dominated

PATIENCE = 2  # times the number of candidates to rescore, until one is within the limits


def rescored(
    trials: Sequence[Trial], limits: Limits, minimize: str, count: int, executor: Executor, is_estimate: Callable[[Candidate], bool], *, seed: int, kept: Path
) -> Iterator[Trial]:
    """Measure the best estimates among `trials` again; yield them as further trials, each with `rescores`.

    They are the feasible Pareto set from its cheapest point on, up to the first point that is no estimate, which stands already; where no estimate is
    feasible, those that miss the limits by least. There are `count`, and up to `PATIENCE` times as many while none of them is within the limits; which,
    and in which order, does not depend on the number of workers. `kept` is a file that remembers them, so that an interrupted search does not measure
    them twice.

    Raises:
        CoinferError: `kept` cannot be read or written, or no trial can be evaluated, as when memory ran out.
    """
    known = read_json(kept, "the rescored trials") if kept.exists() else {}
    best = _best(trials, limits, minimize, is_estimate)[: PATIENCE * count]
    found: list[Trial] = []
    flying: dict[int, Trial] = {}
    started = 0
    while len(found) < len(best) and not (len(found) >= count and feasible(found, limits)):
        # what comes after the first `count` is needed only if none of these is good enough
        wanted = min(count, len(best)) if len(found) < count else len(best)
        while started < wanted and len(flying) < executor.workers:
            trial, number = best[started], len(trials) + started
            if trial.candidate.to_json() not in known:
                trial_seed = int(np.random.SeedSequence([seed, trial.number, 1]).generate_state(1)[0])
                executor.submit(Job(number, trial.candidate, trial_seed, rescores=True))
                flying[number] = trial
            started += 1
        trial = best[len(found)]
        row = known.get(trial.candidate.to_json())
        if row is None:
            outcome = executor.next()
            measured = None if outcome.measurement is None else outcome.measurement.to_dict()
            known[flying.pop(outcome.number).candidate.to_json()] = {"measurement": measured, "failure": outcome.failure}
            atomic_write_json(kept, known)
            continue
        again = None if row["measurement"] is None else Measurement(**row["measurement"])
        found.append(Trial(len(trials) + len(found), trial.candidate, again, failure=row["failure"], rescores=trial.number))
        yield found[-1]


def choose_settled(trials: Sequence[Trial], limits: Limits, minimize: str, is_estimate: Callable[[Candidate], bool]) -> Trial:
    """`choose` among what is settled: rescored trials, and those that never were estimates.

    Where none of these is within the limits, the rescored trial that misses the accuracy floor by least, if that is all it misses: fine-tuning is still to
    come. Where nothing was rescored, all trials count.

    Raises:
        CoinferError: there is none of these either; names the binding limit and the nearest candidate.
    """
    again = [trial for trial in trials if trial.rescores is not None and trial.measurement is not None]
    settled = [trial for trial in trials if trial.rescores is not None or not is_estimate(trial.candidate)] if again else list(trials)
    try:
        return choose(settled, limits, minimize)
    except CoinferError:
        near = [(trial, limits.violations(trial.measurement)) for trial in again if trial.measurement is not None]
        short = [(missed["accuracy"], trial.number, trial) for trial, missed in near if all(value <= 0 for name, value in missed.items() if name != "accuracy")]
        if not short or not feasible([trial for trial in trials if trial.rescores is None and is_estimate(trial.candidate)], limits):
            raise
        return min(short)[2]


def _best(trials: Sequence[Trial], limits: Limits, minimize: str, is_estimate: Callable[[Candidate], bool]) -> list[Trial]:
    """What to rescore, the most promising first."""
    front = sorted(non_dominated(feasible(trials, limits), minimize), key=lambda trial: (getattr(trial.measurement, MEASURED[minimize]), trial.number))
    settled = [place for place, trial in enumerate(front) if not is_estimate(trial.candidate)]
    if good := front[: settled[0]] if settled else front:
        return good
    if settled:
        return []

    def missed(trial: Trial) -> float:
        assert trial.measurement is not None
        return sum(max(0.0, value) for value in limits.violations(trial.measurement).values())

    guesses = [trial for trial in trials if trial.measurement is not None and trial.duplicate_of is None and is_estimate(trial.candidate)]
    return sorted(guesses, key=lambda trial: (missed(trial), trial.number))
