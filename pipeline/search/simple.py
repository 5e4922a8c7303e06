"""Searchers that learn nothing: what the others have to beat at as many evaluations (METHODS 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.search.candidate import Candidate
from pipeline.search.pareto import Trial
from pipeline.search.space import Pick, Space


def random_pick(*seeds: int) -> Pick:
    """Picks every choice with the same probability, the same ones for the same `seeds`."""
    rng = np.random.default_rng(seeds)
    return lambda name, choices: choices[int(rng.integers(len(choices)))]


class RandomSearcher:
    """Every parameter drawn with equal probability from its choices; proposals depend on seed and number alone."""

    def __init__(self, space: Space, *, seed: int) -> None:
        self.space, self.seed = space, seed

    def ask(self, number: int) -> Candidate:
        return self.space.suggest(random_pick(self.seed, number))

    def tell(self, trial: Trial) -> None:
        """Nothing is learnt."""


class UniformSearcher(RandomSearcher):
    """As `RandomSearcher`, but one kept fraction goes for all groups of channels, each taking the nearest it has, and no block is dropped."""

    def ask(self, number: int) -> Candidate:
        draw = random_pick(self.seed, number)
        cut = draw("cut", self.space.cuts)
        offered = {name: ratios for name, ratios in self.space.keep(cut).items() if 0 not in ratios}
        ratio = draw("keep", sorted({ratio for ratios in offered.values() for ratio in ratios} or {1.0}))

        def pick(name: str, choices: Sequence[Any]) -> Any:
            if not name.startswith("keep "):
                return draw(name, choices)
            return 1.0 if 0 in choices else min(choices, key=lambda choice: abs(choice - ratio))

        return self.space.suggest_at(cut, pick)
