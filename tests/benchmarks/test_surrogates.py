from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from benchmarks.surrogates import LAYERS, LEAST_KEPT, gap, layered, small, uniform
from pipeline.search.candidate import OUTPUT, Candidate
from pipeline.search.pareto import Trial


@pytest.mark.parametrize("instance", range(3))
def test_water_filling_finds_what_a_general_solver_finds(instance: int) -> None:
    problem = layered(instance)
    assert problem.budget_ms is not None
    found = minimize(
        lambda kept: -problem.accuracy(kept),
        np.full(LAYERS, 0.3),
        method="SLSQP",
        bounds=[(LEAST_KEPT, 1)] * LAYERS,
        constraints={"type": "ineq", "fun": lambda kept: problem.budget_ms - problem.total_ms(kept)},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert found.success
    assert problem.best == pytest.approx(-found.fun, abs=1e-6)


def test_one_ratio_for_all_that_fits_the_budget_has_gap_one() -> None:
    problem = layered()
    half = Candidate(OUTPUT, tuple((group, 0.5) for group in problem.keep))
    trial = Trial(0, half, problem.measure(half))
    assert problem.reward(trial) == uniform(problem)
    assert gap(problem, [trial]) == 1


def test_beyond_the_budget_nothing_is_found() -> None:
    problem = layered()
    whole = Candidate(OUTPUT)
    assert problem.reward(Trial(0, whole, problem.measure(whole))) == -np.inf


def test_the_small_problem_is_not_solved_by_one_ratio_for_all() -> None:
    problem = small()
    assert uniform(problem) < problem.best
