"""Two synthetic problems whose best answer is known (METHODS 5.1), to compare searchers on in seconds.

Both are device-only searches over a few groups and nothing else, so that every searcher proposes from the same points. They are surrogates: the real cost
of a layer goes with the product of two kept ratios, a_{t-1} * a_t, not with their sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.search.candidate import OUTPUT, Candidate, Measurement
from pipeline.search.ddpg import DdpgSearcher, DdpgSettings
from pipeline.search.layer import Layer
from pipeline.search.limits import Limits
from pipeline.search.optuna import NsgaSearcher, TpeSearcher
from pipeline.search.pareto import Trial
from pipeline.search.searcher import Searcher
from pipeline.search.simple import RandomSearcher
from pipeline.search.space import Space

LIMITS = Limits(floor=0.0, memory_mb=1.0)
LAYERS = 8
GRID = 50  # kept ratios 1/50, 2/50, ..., 1 stand for continuous ones
LEAST_KEPT = 0.1
BUDGET = 0.5  # of what the whole takes
PROPOSALS_PER_EVALUATION = 3


@dataclass(frozen=True)
class Problem:
    """Maximise `reward` over `keep` (group -> kept ratios) within `budget_ms`; `best` is the greatest that can be had.

    `accuracy` and `total_ms` take the kept ratios in the order of the groups. The reward is accuracy - weight * ms / ms of the whole.
    """

    name: str
    keep: Mapping[str, Sequence[float]]
    accuracy: Callable[[Sequence[float]], float]
    total_ms: Callable[[Sequence[float]], float]
    budget_ms: float | None
    weight: float
    best: float

    @property
    def space(self) -> Space:
        return Space(codes={}, bits=(8,), images=(), keep=lambda cut: self.keep)

    def kept(self, candidate: Candidate) -> list[float]:
        ratios = dict(candidate.keep)
        return [ratios.get(group, 1.0) for group in self.keep]

    def measure(self, candidate: Candidate) -> Measurement:
        kept = self.kept(candidate)
        nothing = dict.fromkeys(("encode_ms", "link_ms", "decode_ms", "edge_ms", "payload_bits", "frame_bytes", "wire_bytes", "energy_mj"), 0.0)
        sizes = {"device_macs": 1, "device_params": 1, "device_memory_mb": 0.5, "bundle_mb": 0.5}
        return Measurement(accuracy=self.accuracy(kept), device_ms=self.bound_ms(candidate), total_ms=self.bound_ms(candidate), **nothing, **sizes)

    def reward(self, trial: Trial) -> float:
        """Of a measured trial; -inf beyond the budget."""
        assert trial.measurement is not None
        if self.budget_ms is not None and trial.measurement.total_ms > self.budget_ms:
            return -np.inf
        return trial.measurement.accuracy - self.weight * trial.measurement.total_ms / self.total_ms([1.0] * len(self.keep))

    # What the environment asks for (`Costing`).

    def layers(self, cut: str) -> list[Layer]:
        """Layers told apart by their MACs alone, which are their costs."""
        alone = np.eye(len(self.keep))
        return [Layer(group, "conv", 16, 16, 1, 3, 2304, int(1e6 * self.total_ms(row))) for group, row in zip(self.keep, alone.tolist(), strict=True)]

    def feature_shape(self, cut: str) -> tuple[int, ...]:
        return (10,)

    def bound_ms(self, candidate: Candidate) -> float:
        return self.total_ms(self.kept(candidate))


def water_filling(weights: NDArray[np.float64], curves: NDArray[np.float64], costs: NDArray[np.float64], budget: float) -> NDArray[np.float64]:
    """The kept ratios in [LEAST_KEPT, 1] that maximise sum weights * log(1 + curves * a) / log(1 + curves) where costs @ a = budget.

    At the optimum every layer not at an end has the same slope per cost: a = weights / (log(1 + curves) * level * costs) - 1 / curves.
    """

    def filled(level: float) -> NDArray[np.float64]:
        return np.clip(weights / (np.log1p(curves) * level * costs) - 1 / curves, LEAST_KEPT, 1)

    low, high = 1e-9, 1e9
    for _ in range(200):
        level = (low * high) ** 0.5
        low, high = (level, high) if costs @ filled(level) > budget else (low, level)
    return filled(high)


def layered(instance: int = 0) -> Problem:
    """A separable concave accuracy and a cost linear in the kept ratios of 8 layers, half the whole's cost allowed; the best by water-filling."""
    rng = np.random.default_rng(instance)
    weights, curves, costs = rng.dirichlet(np.ones(LAYERS) * 2), rng.uniform(1, 20, LAYERS), rng.dirichlet(np.ones(LAYERS) * 2)

    def accuracy(kept: Sequence[float]) -> float:
        return float(weights @ (np.log1p(curves * np.asarray(kept)) / np.log1p(curves)))

    def total_ms(kept: Sequence[float]) -> float:
        return float(costs @ np.asarray(kept))

    ratios = [number / GRID for number in range(1, GRID + 1) if number / GRID >= LEAST_KEPT]
    budget = total_ms([BUDGET] * LAYERS)
    best = accuracy(water_filling(weights, curves, costs, budget).tolist())
    return Problem(f"layered-{instance}", {f"layer{n}": ratios for n in range(LAYERS)}, accuracy, total_ms, budget, 0.0, best)


def small() -> Problem:
    """Two layers of five levels and three ratios: 75 points, the best found by trying all. No budget, latency costs reward; the layers interact."""
    levels, ratios = (0.2, 0.4, 0.6, 0.8, 1.0), (0.25, 0.5, 1.0)

    def total_ms(kept: Sequence[float]) -> float:
        first, second, code = kept
        return 2 * first + 3 * first * second + 4 * second * code

    def accuracy(kept: Sequence[float]) -> float:
        first, second, code = kept
        return 0.95 - 0.25 * (1 - first) ** 2 - 0.3 * (1 - second) ** 3 - 0.15 * (1 - code) ** 2 * (0.5 + second) - 0.1 * abs(first - second)

    problem = Problem("small", {"layer0": levels, "layer1": levels, "code": ratios}, accuracy, total_ms, None, 0.3, 0.0)
    return Problem(**{**problem.__dict__, "best": max(every_reward(problem))})


def every_reward(problem: Problem) -> list[float]:
    """The reward of every point of the space, most quickly varied last."""
    points = (Candidate(OUTPUT, tuple(zip(problem.keep, kept, strict=True))) for kept in itertools.product(*problem.keep.values()))
    return [problem.reward(Trial(0, point, problem.measure(point))) for point in points]


def uniform(problem: Problem) -> float:
    """The best reward that one ratio for all groups gives within the budget."""
    shared = set.intersection(*(set(ratios) for ratios in problem.keep.values()))
    points = [Candidate(OUTPUT, tuple((group, ratio) for group in problem.keep)) for ratio in shared]
    return max(problem.reward(Trial(0, point, problem.measure(point))) for point in points)


def gap(problem: Problem, trials: Sequence[Trial]) -> float:
    """(optimum - found) / (optimum - uniform) of METHODS 5.1: 0 is perfect, 1 as good as one ratio for all."""
    return (problem.best - max(map(problem.reward, trials))) / (problem.best - uniform(problem))


def _ddpg(problem: Problem, seed: int, evaluations: int) -> Searcher:
    settings = DdpgSettings(reward_weights=(problem.weight,))
    return DdpgSearcher(problem.space, problem, LIMITS, settings, seed=seed, trials=evaluations, budget_ms=problem.budget_ms)


SEARCHERS: Mapping[str, Callable[[Problem, int, int], Searcher]] = {
    "ddpg": _ddpg,
    "tpe": lambda problem, seed, evaluations: TpeSearcher(problem.space, LIMITS, "latency_ms", seed=seed),
    "nsga2": lambda problem, seed, evaluations: NsgaSearcher(problem.space, LIMITS, "latency_ms", seed=seed),
    "random": lambda problem, seed, evaluations: RandomSearcher(problem.space, seed=seed),
}


def _for_reward(problem: Problem, trial: Trial) -> Trial:
    """`trial` as one of several objectives sees it of which only the first, the reward, differs; the budget is a limit like that on memory."""
    assert trial.measurement is not None
    measured = trial.measurement
    reward = measured.accuracy - problem.weight * measured.total_ms / problem.total_ms([1.0] * len(problem.keep))
    share = measured.total_ms / problem.budget_ms if problem.budget_ms is not None else 0.0
    return replace(trial, measurement=replace(measured, accuracy=reward, total_ms=1.0, device_memory_mb=share * LIMITS.memory_mb))


def run(searcher_name: str, problem: Problem, seed: int, evaluations: int) -> list[Trial]:
    """Let the searcher have `evaluations` of `problem`, the baselines not counted nor given; a candidate proposed again is no evaluation."""
    searcher = SEARCHERS[searcher_name](problem, seed, evaluations)

    def told(trial: Trial) -> Trial:
        return trial if searcher_name == "ddpg" else _for_reward(problem, trial)  # the agent makes the reward itself

    baselines = problem.space.baselines()
    for number, candidate in enumerate(baselines):
        searcher.tell(told(Trial(number, candidate, problem.measure(candidate))))
    trials: list[Trial] = []
    seen: dict[Candidate, int] = {}
    for number in range(len(baselines), len(baselines) + PROPOSALS_PER_EVALUATION * evaluations):
        candidate = searcher.ask(number)
        trial = Trial(number, candidate, problem.measure(candidate), duplicate_of=seen.get(candidate))
        seen.setdefault(candidate, number)
        searcher.tell(told(trial))
        if trial.duplicate_of is None:
            trials.append(trial)
        if len(trials) == evaluations:
            break
    return trials
