"""The methods of search on a trained network and on problems whose answer is known, and what they build on -> results/search.json.

Parts are run one at a time or all, see `benchmarks/parts.py`.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import evaluator_rank, fronts, predictor, search_ray
from benchmarks.parts import Part, Raw
from benchmarks.parts import run as run_parts
from benchmarks.results_file import figure
from benchmarks.surrogates import SEARCHERS, Problem, every_reward, gap, layered, run, small
from pipeline.search.candidate import OUTPUT
from pipeline.search.environment import Compression
from pipeline.search.pareto import Trial

NAME = "search"
SEEDS = (0, 1, 2, 3, 4)
EVALUATIONS, ORACLE_EVALUATIONS = 200, {"tpe": 30, "ddpg": 60}
REWARD_SHARE = 0.01  # of the reward's range, by which an oracle may be missed
EPISODES = 1_000
GROWTH, ASKED = (50, 500, 1_000, 2_000, 5_000), 10
ASKED_FOR = (  # by the issue; what is not run yet has no value
    *(f"hypervolume_ratio.{method}" for method in ("tpe", "nsga2", "ddpg")),
    "evaluations_to_random200",
    *(f"evaluator_{name}" for name in ("cost_ratio", "cost_ratio_shared", "spearman", "kendall")),
    *("predictor_mdape", "predictor_p90ape", "macs_model_mdape", "measurement_repeatability"),
    *("ray_overhead_ms_per_trial.w1", "ray_overhead_ms_per_trial.w64", "ray_speedup_2"),
)


def surrogates() -> Raw:
    """The problem whose optimum is known by water-filling, another instance for each seed, and the one of 75 points."""
    found: Raw = {"gaps": {}, "oracle": {}}
    for method in SEARCHERS:
        found["gaps"][method] = [round(gap(layered(seed), run(method, layered(seed), seed, EVALUATIONS)), 5) for seed in SEEDS]
    for method, evaluations in ORACLE_EVALUATIONS.items():
        rewards = [[small().reward(trial) for trial in run(method, small(), seed, evaluations)] for seed in SEEDS]
        found["oracle"][method] = {"evaluations": evaluations, "best": [round(max(row), 6) for row in rewards]}
    return found


def wall() -> Raw:
    """Episodes of random actions and of the agent's proposals, and how many of each exceed the budget."""
    problem = layered(0)
    assert problem.budget_ms is not None
    rng, environment = np.random.default_rng(0), Compression(problem.space, problem, [OUTPUT], problem.budget_ms)
    found = {"random": 0, "agent": 0}
    for _ in range(EPISODES):
        environment.reset(options={"cut": OUTPUT})
        over = False
        while not over:
            _, _, over, _, info = environment.step(rng.random(1).astype(np.float32))
        found["random"] += problem.bound_ms(info["candidate"]) > problem.budget_ms
    agent = SEARCHERS["ddpg"](problem, 0, EPISODES)
    for number in range(1, EPISODES + 1):
        candidate = agent.ask(number)
        found["agent"] += problem.bound_ms(candidate) > problem.budget_ms
        agent.tell(Trial(number, candidate, problem.measure(candidate)))
    return found | {"episodes": EPISODES, "budget_ms": problem.budget_ms}


def growth() -> Raw:
    """What a proposal costs the searcher itself after so many trials with a free evaluator, ms: one asked, one told."""
    problem = layered(0)
    return {method: _cost_ms(method, problem) for method in SEARCHERS}


def _cost_ms(method: str, problem: Problem) -> dict[str, list[float]]:
    """Trials that are not timed are random ones; of the agent only so many of them as it replays."""
    searcher, drawn, found = SEARCHERS[method](problem, 0, GROWTH[-1]), SEARCHERS["random"](problem, 1, 0), {}
    number = 1
    for count in GROWTH:
        while number < count:
            candidate = drawn.ask(number)
            searcher.tell(Trial(number, candidate, problem.measure(candidate)))
            number += 1
        taken = []
        for _ in range(ASKED):
            start = time.perf_counter()
            candidate = searcher.ask(number)
            between = time.perf_counter()
            trial = Trial(number, candidate, problem.measure(candidate))
            resumed = time.perf_counter()
            searcher.tell(trial)
            taken.append(1e3 * (between - start + time.perf_counter() - resumed))
            number += 1
        found[str(count)] = [round(ms, 3) for ms in taken]
    return found


def fronts_of_all() -> Raw:
    """Five seeds on ResNet-20; one on another backbone."""
    return {place.name: fronts.searched(place, seeds) for place, seeds in ((fronts.RESNET20, SEEDS), (fronts.RESNET8, SEEDS[:1]))}


def _of_surrogates(known: Raw) -> Raw:
    found: Raw = {}
    how = "(optimum - found) / (optimum - uniform) after 200 evaluations, 8 layers, optimum by water-filling; mean over seeds, each another problem"
    for method, gaps in known["gaps"].items():
        found[f"surrogate_gap.{method}"] = figure(statistics.mean(gaps), "", how, n=len(gaps), spread=(min(gaps), max(gaps)))
    problem = small()
    span = problem.best - min(every_reward(problem))
    for method, row in known["oracle"].items():
        tolerance = 1e-6 if method == "tpe" else REWARD_SHARE * span
        hits = sum(best >= problem.best - tolerance for best in row["best"])
        asked = "the best of 75 points" if method == "tpe" else "within 1 % of the reward's range of it"
        found[f"oracle_hits.{method}"] = figure(hits, "of 5 seeds", f"{asked} within {row['evaluations']} evaluations", n=len(row["best"]))
    return found


def _of_wall(known: Raw) -> Raw:
    how = f"of {known['episodes']} random and as many agent episodes, predicted to exceed the budget"
    return {"wall_violations": figure(known["random"] + known["agent"], "episodes", how, n=2 * known["episodes"])}


def _of_growth(known: Raw) -> Raw:
    found: Raw = {}
    for method, rows in known.items():
        how = f"one ask and one tell after 5,000 trials of a free evaluator; after 50: {statistics.median(rows['50']):.3g} ms; median"
        low, middle, high = np.percentile(rows[str(GROWTH[-1])], [25, 50, 75])
        found[f"searcher_ms_per_trial_at_5000.{method}"] = figure(float(middle), "ms", how, n=len(rows["5000"]), spread=(float(low), float(high)))
    return found


PARTS = {
    "surrogates": Part(surrogates, _of_surrogates),
    "wall": Part(wall, _of_wall),
    "growth": Part(growth, _of_growth),
    "fronts": Part(fronts_of_all, fronts.figures),
    "predictor": Part(predictor.measured, predictor.figures),
    "evaluator": Part(lambda: evaluator_rank.compared(fronts.RESNET20), evaluator_rank.figures),
    "ray": Part(search_ray.ray, search_ray.figures_of),
}

if __name__ == "__main__":
    run_parts(NAME, PARTS, ASKED_FOR, dataset="CIFAR-10 as JPEG, and problems of our own", seeds=SEEDS, description=__doc__)
