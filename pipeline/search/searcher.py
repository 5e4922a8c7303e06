"""What every method of search is to the driver: something that is asked for candidates and told of trials."""

from __future__ import annotations

from typing import Protocol

from pipeline.params import Search
from pipeline.search.candidate import Candidate
from pipeline.search.ddpg import REWARD_WEIGHTS, DdpgSearcher, DdpgSettings
from pipeline.search.environment import Costing
from pipeline.search.limits import Limits
from pipeline.search.optuna import NsgaSearcher, TpeSearcher
from pipeline.search.pareto import Trial
from pipeline.search.simple import RandomSearcher, UniformSearcher
from pipeline.search.space import Space


class Searcher(Protocol):
    """Proposes candidates of one space.

    Nothing of a searcher is written to disk: a search that was killed goes on with a fresh one that is told the kept trials in their order.
    """

    def ask(self, number: int) -> Candidate:
        """The candidate of trial `number`: a pure function of the seed, `number` and the trials told so far, some earlier ones perhaps still in flight."""

    def tell(self, trial: Trial) -> None:
        """Take note of any trial, also one that was never asked for (a baseline, one kept from before a kill) or that failed."""


def build_searcher(settings: Search, space: Space, costing: Costing, limits: Limits, minimize: str, *, seed: int) -> Searcher:
    """The searcher that `search.method` names, for `objective.minimize`.

    Of them `ddpg` alone asks `costing`, and keeps a limit on latency at the device's own link by itself.

    Raises:
        CoinferError: `ddpg` is to search a cut that the space does not have, or none of whose candidates is within the limit on latency.
    """
    match settings.method:
        case "tpe":
            return TpeSearcher(space, limits, minimize, seed=seed)
        case "nsga2":
            return NsgaSearcher(space, limits, minimize, seed=seed)
        case "random":
            return RandomSearcher(space, seed=seed)
        case "uniform":
            return UniformSearcher(space, seed=seed)
        case "ddpg":
            chosen = settings.ddpg
            weights = chosen.reward_weights or (REWARD_WEIGHTS if chosen.reward == "linear" else REWARD_WEIGHTS[:1])
            agent = DdpgSettings(chosen.cut, chosen.reward, tuple(weights))
            return DdpgSearcher(space, costing, limits, agent, seed=seed, trials=settings.trials, budget_ms=limits.budget_ms)
