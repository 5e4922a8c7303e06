"""Optuna's samplers as searchers, by ask and tell. A study in memory is fed only trials that are finished; what was asked leaves no trace in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from pipeline.search.candidate import INPUT, Candidate
from pipeline.search.pareto import OBJECTIVES, Limits, Trial
from pipeline.search.simple import random_pick
from pipeline.search.space import Space

RANDOM_TRIALS = 5  # after the baselines, before TPE has enough to learn from
POPULATION = 16


class _Study:
    """A study in memory that remembers what the last trial told was."""

    def __init__(self, space: Space, limits: Limits, *, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.limits, self.seed = space, limits, seed
        self.study = optuna.create_study(directions=list(OBJECTIVES.values()))
        self._repeated = False

    def _stuck(self, trial: Trial) -> bool:
        """Note whether `trial` was proposed before; then the next proposal is a random one, for a sampler that repeats itself would do so again."""
        self._repeated = trial.duplicate_of is not None
        return self._repeated

    def _objectives(self, trial: Trial) -> tuple[list[float], dict[str, float]]:
        """Values and constraints of a measured `trial`."""
        assert trial.measurement is not None
        return [getattr(trial.measurement, name) for name in OBJECTIVES], self.limits.violations(trial.measurement)

    def _sampler_seed(self, number: int) -> int:
        return int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])


class TpeSearcher(_Study):
    """Tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), many-objective and constrained, a parameter at a time."""

    def ask(self, number: int) -> Candidate:
        if self._repeated:
            return self.space.suggest(random_pick(self.seed, number))
        startup = len(self.space.baselines()) + RANDOM_TRIALS
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=startup, seed=self._sampler_seed(number))
        trial = self.study.ask()

        def pick(name: str, choices: Sequence[Any]) -> Any:
            distribution = _categorical(choices)
            return choices[distribution.choices.index(trial.suggest_categorical(_name(name, choices), distribution.choices))]

        candidate = self.space.suggest(pick)
        self.study.tell(trial, state=TrialState.FAIL)
        return candidate

    def tell(self, trial: Trial) -> None:
        self._stuck(trial)
        if trial.measurement is None:
            return
        params: dict[str, Any] = {}
        distributions: dict[str, Any] = {}
        chosen = self.space.choices(trial.candidate)

        def pick(name: str, choices: Sequence[Any]) -> Any:
            distribution = distributions[_name(name, choices)] = _categorical(choices)
            params[_name(name, choices)] = distribution.choices[list(choices).index(chosen[name])]
            return chosen[name]

        self.space.suggest(pick)
        values, constraints = self._objectives(trial)
        self.study.add_trial(create_trial(values=values, params=params, distributions=distributions, constraints=constraints))


class NsgaSearcher(_Study):
    """NSGA-II (Deb et al., IEEE TEC 2002), constrained, by uniform crossover.

    An individual has a gene in [0, 1) for every parameter of the space, and what is asked picks the choice that the gene falls on: genes that one cut does
    not read stay with the individual, so that parents of different cuts can be crossed. A trial's genes are made from its candidate, those that it
    does not read from its number, and generations are counted in trials told; so evolution goes on the same way when a search is resumed, and
    whatever is in flight.
    """

    def __init__(self, space: Space, limits: Limits, *, seed: int) -> None:
        super().__init__(space, limits, seed=seed)
        names = {"cut": None, "image": None}  # a dict for its order
        for cut in space.cuts:
            names |= {f"keep {name}": None for name in (space.keep(cut) if cut != INPUT else ())}
        names |= dict.fromkeys(("code_channels", "stride", "bits", "rate_weight", "precision"))
        self._genes: dict[str, BaseDistribution] = {name: FloatDistribution(0, 1) for name in names}

    def ask(self, number: int) -> Candidate:
        if self._repeated:
            return self.space.suggest(random_pick(self.seed, number))
        trial = self._next(self._sampler_seed(number))
        self.study.tell(trial, state=TrialState.FAIL)
        return self.space.suggest(lambda name, choices: choices[min(int(trial.params[name] * len(choices)), len(choices) - 1)])

    def tell(self, trial: Trial) -> None:
        if self._stuck(trial) or trial.measurement is None:
            return
        unread = np.random.default_rng([self.seed, trial.number])
        genes = {name: float(unread.random()) for name in self._genes}
        chosen = self.space.choices(trial.candidate)

        def pick(name: str, choices: Sequence[Any]) -> Any:
            genes[name] = (list(choices).index(chosen[name]) + 0.5) / len(choices)
            return chosen[name]

        self.space.suggest(pick)
        self.study.enqueue_trial(genes)
        told = self._next(0)
        values, constraints = self._objectives(trial)
        for name, missed in constraints.items():
            told.set_constraint(name, missed)
        self.study.tell(told, values)

    def _next(self, sampler_seed: int) -> optuna.Trial:
        """The next trial of the study: one that is enqueued, else a child."""
        self.study.sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=sampler_seed)
        return self.study.ask(self._genes)


def _name(name: str, choices: Sequence[Any]) -> str:
    # Optuna wants one set of choices per name; with them in the name, cuts with equal choices learn from each other.
    return f"{name} {'|'.join(map(str, choices))}"


def _categorical(choices: Sequence[Any]) -> CategoricalDistribution:
    # Optuna takes numbers and words: an image's format and quality become one word.
    return CategoricalDistribution([choice if isinstance(choice, (int, float, str)) else " ".join(map(str, choice)) for choice in choices])
