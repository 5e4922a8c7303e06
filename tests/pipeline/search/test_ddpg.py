from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from benchmarks.surrogates import every_reward, gap, layered, run, small
from pipeline.errors import ParamsError
from pipeline.search.candidate import Candidate
from pipeline.search.ddpg import DdpgSearcher, DdpgSettings, truncated_normal
from pipeline.search.limits import Limits
from pipeline.search.pareto import Trial
from tests.pipeline.search.costing import SPACE, NastyCosting, measurement

LIMITS = Limits(floor=0.0, memory_mb=5)
FAST = {"hidden": 16, "proposals": 2, "updates": 1}
COSTING = NastyCosting()


def searcher(*, space=SPACE, costing=COSTING, limits=LIMITS, seed=0, trials=40, budget_ms=None, **settings):
    return DdpgSearcher(space, costing, limits, DdpgSettings(**FAST | settings), seed=seed, trials=trials, budget_ms=budget_ms)


def search(agent, trials, costing=COSTING, fails=lambda candidate: False):
    """Ask and tell `trials` times, baselines first."""
    told = []
    for number, baseline in enumerate(SPACE.baselines()):
        told.append(Trial(number, baseline, measurement(baseline, costing)))
        agent.tell(told[-1])
    for number in range(len(told), len(told) + trials):
        candidate = agent.ask(number)
        told.append(Trial(number, candidate, None, failure="bad luck") if fails(candidate) else Trial(number, candidate, measurement(candidate, costing)))
        agent.tell(told[-1])
    return told


def test_no_episode_of_the_agent_exceeds_the_budget():
    costing = NastyCosting(6.0)
    agent = searcher(costing=costing, trials=1000, budget_ms=9.0, proposals=1, replay_episodes=20)
    told = search(agent, 1000, costing)[len(SPACE.baselines()) :]
    assert len(told) == 1000
    assert all(costing.bound_ms(trial.candidate) <= 9.0 for trial in told)


def test_asking_changes_nothing():
    asked, silent = searcher(), searcher()
    told = search(asked, 12)
    for trial in told:
        silent.tell(trial)
        silent.ask(99)
    assert [asked.ask(number) for number in (30, 31, 30)] == [silent.ask(number) for number in (30, 31, 30)]
    assert asked.ask(30) == asked.ask(30)


def test_a_search_that_was_killed_goes_on_alike():
    whole = search(searcher(), 24)
    resumed = searcher()
    for trial in whole[:15]:
        resumed.tell(trial)
    for trial in whole[15:]:
        assert resumed.ask(trial.number) == trial.candidate
        resumed.tell(trial)


def test_trials_may_be_told_in_any_order():
    agent, told = searcher(), search(searcher(), 20)
    for trial in reversed(told):
        agent.tell(trial)
    assert agent.environment.levels(agent.ask(len(told))) is not None
    assert sorted(row["number"] for row in agent.history) == [trial.number for trial in told if trial.candidate.kind != "edge-only"]


def test_seeds_search_differently():
    assert [trial.candidate for trial in search(searcher(seed=1), 8)] != [trial.candidate for trial in search(searcher(seed=2), 8)]


def test_what_no_episode_makes_or_was_measured_before_teaches_nothing():
    agent = searcher()
    image, whole = Candidate("input", quality=100), Candidate("output")
    agent.tell(Trial(0, image, measurement(image, COSTING)))
    agent.tell(Trial(1, whole, measurement(whole, COSTING), duplicate_of=0))
    assert agent.history == []


def test_no_candidate_is_proposed_twice_while_others_are_left():
    problem = small()
    agent = DdpgSearcher(problem.space, problem, LIMITS, DdpgSettings(**FAST | {"proposals": 8}), seed=0, trials=60, budget_ms=None)
    seen = set()
    for number in range(1, 61):
        candidate = agent.ask(number)
        assert candidate not in seen
        seen.add(candidate)
        agent.tell(Trial(number, candidate, problem.measure(candidate)))


def test_failures_are_learned_from_as_the_worst_and_never_stop_the_search():
    search(searcher(), 12, fails=lambda candidate: True)
    agent = searcher(trials=60, cut="late", hidden=64, proposals=4, updates=8)
    told = search(agent, 60, fails=lambda candidate: candidate.bits in (4, 8))
    early, late = told[2:14], told[-24:]
    share = [sum(trial.measurement is None for trial in part) / len(part) for part in (early, late)]
    assert share[1] < share[0]
    assert [row["reward"] is None for row in agent.history] == [trial.measurement is None for trial in told if trial.candidate.cut == "late"]


def test_one_cut_may_be_searched_alone():
    told = search(searcher(cut="early"), 10)
    assert {trial.candidate.cut for trial in told[len(SPACE.baselines()) :]} == {"early"}


def test_cuts_get_equal_shares_at_first_and_the_best_the_rest():
    agent = searcher(trials=60, reward_weights=(1.0,))
    told = search(agent, 60)[len(SPACE.baselines()) :]
    cuts = [trial.candidate.cut for trial in told]
    assert {cut: cuts[:18].count(cut) for cut in agent.environment.cuts} == {"early": 6, "late": 6, "output": 6}
    best = max(agent.history, key=lambda row: row["reward"])["cut"]
    assert set(cuts[-15:]) == {best}


def test_several_weights_are_taken_in_turn_and_trace_a_front():
    agent = searcher(trials=90, reward_weights=(0.0, 3.0), hidden=64, updates=4)
    told = search(agent, 90)
    late = agent.history[-45:]
    assert {row["weight"] for row in late[:12]} == {0.0, 3.0}
    ms = {trial.number: trial.measurement.total_ms for trial in told}
    mean = {weight: sum(ms[row["number"]] for row in late if row["weight"] == weight) / sum(row["weight"] == weight for row in late) for weight in (0.0, 3.0)}
    assert mean[3.0] < mean[0.0]


def test_history_is_the_learning_curve():
    agent = searcher(trials=40, cut="late")
    search(agent, 40)
    numbers, sigmas = ([row[key] for row in agent.history] for key in ("number", "sigma"))
    assert numbers == list(range(len(SPACE.baselines()), len(SPACE.baselines()) + 40))
    assert sigmas[:4] == [None] * 4
    assert sigmas[4] == pytest.approx(0.5)
    assert all(later < sooner for sooner, later in itertools.pairwise(sigmas[4:]))


def test_rewards_are_those_of_the_methods():
    candidate = Candidate("late", (("a", 0.5),), code_channels=4, stride=2, bits=4)
    result = measurement(candidate, COSTING)
    relative = result.total_ms / COSTING.bound_ms(Candidate("output"))
    assert searcher().reward(result, 0.3) == pytest.approx(result.accuracy - 0.3 * relative)
    assert searcher(reward="log").reward(result, 0.3) == pytest.approx(-(1 - result.accuracy) * math.log(1 + relative))
    strict = searcher(limits=Limits(floor=result.accuracy + 0.1, memory_mb=0.5))
    assert strict.reward(result, 0.0) == pytest.approx(result.accuracy - 0.1 - 1.0)


def test_noise_stays_within_the_actions():
    rng = np.random.default_rng(0)
    draws = np.array([truncated_normal(1.0, 0.5, rng) for _ in range(2000)])
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert draws.mean() == pytest.approx(1 - 0.5 * (2 / np.pi) ** 0.5 * (1 - np.exp(-2)) / 0.9545, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"), [({"reward_weights": ()}, "one weight or more"), ({"reward": "log", "reward_weights": (0.1, 0.2)}, "no weight")]
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ParamsError, match=message):
        DdpgSettings(**settings)


def test_a_cut_the_space_lacks_is_refused():
    with pytest.raises(ParamsError, match=r"search\.ddpg\.cut is nowhere, which the space does not have; it has early, late, output"):
        searcher(cut="nowhere")


def test_the_agent_comes_within_a_hundredth_of_the_best_of_75_points():
    problem = small()
    rewards = every_reward(problem)
    assert len(rewards) == 75
    found = max(map(problem.reward, run("ddpg", problem, 0, 60)))
    assert problem.best == max(rewards) >= found
    assert found >= problem.best - 0.01 * (problem.best - min(rewards))


def test_the_agent_beats_one_ratio_for_all_by_most_of_what_can_be_had():
    problem = layered()
    trials = run("ddpg", problem, 0, 100)
    assert gap(problem, trials) <= 0.3
    assert all(problem.bound_ms(trial.candidate) <= problem.budget_ms for trial in trials)
