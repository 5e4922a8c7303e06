"""Optuna's samplers as searchers, by ask and tell. A study in memory is fed only trials that are finished; they learn nothing of what was asked."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from pipeline.search.candidate import Candidate
from pipeline.search.limits import Limits
from pipeline.search.pareto import Trial, objectives
from pipeline.search.simple import random_pick
from pipeline.search.space import Space

RANDOM_TRIALS = 10  # after the device-only baseline, before TPE has enough to learn from
EI_CANDIDATES = 100  # Optuna's 24 leave more of the surrogates' gap: .23 against .18, on ten instances that no figure is of
POPULATION = 10
TRIES, NEIGHBOURS, NEIGHBOURS_EACH = 3, 100, 10  # to find a candidate not told of: by the sampler, then near what it proposes, so many with each distance


class _Study:
    """A study in memory, and a way out for a sampler that proposes what was told already: ask it again, in the end take a neighbour."""

    def __init__(self, space: Space, limits: Limits, minimize: str, *, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space, self.limits, self.seed = space, limits, seed
        self.objectives = objectives(minimize)
        self.study = optuna.create_study(directions=list(self.objectives.values()))
        self._told: set[Candidate] = set()

    def ask(self, number: int) -> Candidate:
        sampler_seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        self.study.sampler = self._sampler(sampler_seed)
        for _ in range(TRIES):
            trial, candidate = self._propose()
            self.study.tell(trial, state=TrialState.FAIL)
            if candidate not in self._told:
                return candidate
        return self._neighbour(candidate, number)

    def tell(self, trial: Trial) -> None:
        self._told.add(trial.candidate)
        if trial.duplicate_of is None and trial.measurement is not None and trial.candidate.cut in self.space.cuts:
            constraints = self.limits.violations(trial.measurement)
            self._add(trial, [getattr(trial.measurement, name) for name in self.objectives], constraints)

    def _neighbour(self, candidate: Candidate, number: int) -> Candidate:
        """One that was not told, by drawing parameters of `candidate` at random: first one, then ever more; if there is none, the last that was drawn."""
        chosen, draw = self.space.choices(candidate), random_pick(self.seed, number)
        for tried in range(NEIGHBOURS):
            kept = chosen.keys() - {draw("parameter", list(chosen)) for _ in range(1 + tried // NEIGHBOURS_EACH)}

            def pick(name: str, choices: Sequence[Any], kept: Collection[str] = kept) -> Any:
                return chosen[name] if name in kept and chosen[name] in choices else draw(name, choices)

            candidate = self.space.suggest(pick)
            if candidate not in self._told:
                break
        return candidate

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        raise NotImplementedError

    def _propose(self) -> tuple[optuna.Trial, Candidate]:
        raise NotImplementedError

    def _add(self, trial: Trial, values: list[float], constraints: dict[str, float]) -> None:
        raise NotImplementedError


class TpeSearcher(_Study):
    """Tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), many-objective and constrained; what is asked for together is modelled jointly."""

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `group`
            return optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS + 1, n_ei_candidates=EI_CANDIDATES, multivariate=True, group=True, seed=seed)

    def _propose(self) -> tuple[optuna.Trial, Candidate]:
        trial = self.study.ask()

        def pick(name: str, choices: Sequence[Any]) -> Any:
            place = _name(name, choices)
            distribution = _distribution(choices)
            if isinstance(distribution, IntDistribution):
                return choices[trial.suggest_int(place, distribution.low, distribution.high)]
            return choices[int(trial.suggest_categorical(place, range(len(choices))))]

        return trial, self.space.suggest(pick)

    def _add(self, trial: Trial, values: list[float], constraints: dict[str, float]) -> None:
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        chosen = self.space.choices(trial.candidate)

        def pick(name: str, choices: Sequence[Any]) -> Any:
            distributions[_name(name, choices)] = _distribution(choices)
            params[_name(name, choices)] = list(choices).index(chosen[name])
            return chosen[name]

        self.space.suggest(pick)
        self.study.add_trial(create_trial(values=values, params=params, distributions=distributions, constraints=constraints))


class NsgaSearcher(_Study):
    """NSGA-II (Deb et al., IEEE TEC 2002), constrained, by uniform crossover.

    An individual has a gene in [0, 1) for every parameter of the space, and what is asked picks the choice that the gene falls on: genes that one cut does
    not read stay with the individual, so that parents of different cuts can be crossed. A trial's genes are made from its candidate, those that it
    does not read from its number, and generations are counted in trials told; so evolution goes on the same way when a search is resumed, and
    whatever is in flight.
    """

    def __init__(self, space: Space, limits: Limits, minimize: str, *, seed: int) -> None:
        super().__init__(space, limits, minimize, seed=seed)
        names = {"cut": None}  # a dict for its order
        for cut in space.cuts:
            names |= {f"keep {name}": None for name in space.keep(cut)}
        names |= dict.fromkeys((*["codec"] * (len(space.codecs) > 1), "code_channels", "stride", "bits", "rate_weight", "precision"))
        self._measured = 0
        self._counter = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
        self._genes: dict[str, BaseDistribution] = {name: FloatDistribution(0, 1) for name in names}

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)

    def _propose(self) -> tuple[optuna.Trial, Candidate]:
        trial = self.study.ask(self._genes)
        return trial, self.space.suggest(lambda name, choices: choices[min(int(trial.params[name] * len(choices)), len(choices) - 1)])

    def _add(self, trial: Trial, values: list[float], constraints: dict[str, float]) -> None:
        unread = np.random.default_rng([self.seed, trial.number])
        genes = {name: float(unread.random()) for name in self._genes}
        chosen = self.space.choices(trial.candidate)

        def pick(name: str, choices: Sequence[Any]) -> Any:
            genes[name] = (list(choices).index(chosen[name]) + 0.5) / len(choices)
            return chosen[name]

        self.space.suggest(pick)
        self.study.sampler = self._counter
        self.study.enqueue_trial(genes)
        told = self.study.ask(self._genes)
        (running,) = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self._counter.get_trial_generation(self.study, running)  # writes it down; Optuna does so only where it draws something
        for name, missed in constraints.items():
            told.set_constraint(name, missed)
        self.study.tell(told, values)
        self._measured += 1
        if self._measured % POPULATION == 0:  # Optuna remembers parents in another order than it first draws from, so it may draw once for nothing
            self.study.tell(self.study.ask(self._genes), state=TrialState.FAIL)


def _name(name: str, choices: Sequence[Any]) -> str:
    # Optuna wants one set of choices per name; with them in the name, cuts with equal choices learn from each other.
    return f"{name} {'|'.join(map(str, choices))}"


def _distribution(choices: Sequence[Any]) -> CategoricalDistribution | IntDistribution:
    """Of the place among `choices`: an ordered one where these are numbers."""
    if len(choices) > 1 and all(isinstance(choice, (int, float)) for choice in choices):
        return IntDistribution(0, len(choices) - 1)
    return CategoricalDistribution(range(len(choices)))
