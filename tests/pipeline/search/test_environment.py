from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from pipeline.errors import CoinferError
from pipeline.search.candidate import Candidate
from pipeline.search.environment import Compression, steps_at
from pipeline.search.space import Space
from tests.pipeline.search import fakes
from tests.pipeline.search.costing import SPACE, NastyCosting

CUTS = ("early", "late", "output")
SEVERAL = replace(SPACE, codecs=("uniform", "rate", "multi-rate"), rate_weights=(1e-4, 1e-3), points=((1.0, 4), (0.5, 2)))


def play(environment, actions, cut):
    """The candidate, states and actions taken of an episode at `cut`."""
    states, taken = [environment.reset(options={"cut": cut})[0]], []
    for action in actions:
        state, _, over, _, info = environment.step(np.array([action], np.float32))
        states.append(state)
        taken.append(info["action"])
    assert over
    return info["candidate"], np.stack(states[:-1]), np.array(taken, np.float32)


several_codecs = pytest.mark.parametrize("space", [SPACE, SEVERAL], ids=["one codec", "several"])


@several_codecs
@pytest.mark.parametrize("budget_ms", [None, 8.0])
def test_gymnasium_finds_nothing_wrong(budget_ms, space):
    check_env(Compression(space, NastyCosting(1), CUTS, budget_ms), skip_render_check=True)


@several_codecs
@pytest.mark.parametrize("jolt", [0.0, 6.0])
@pytest.mark.parametrize("budget_ms", [4.5, 6.0, 9.0])
def test_no_random_episode_exceeds_the_budget(jolt, budget_ms, space):
    costing = NastyCosting(jolt)
    environment = Compression(space, costing, CUTS, budget_ms)
    rng = np.random.default_rng(0)
    seen, clipped = set(), 0
    for number in range(1000):
        cut = environment.cuts[number % len(environment.cuts)]
        actions = rng.random(len(environment.steps[cut]), np.float32)
        candidate, _, taken = play(environment, actions, cut)
        assert costing.bound_ms(candidate) <= budget_ms
        wanted = [step.positions[step.level(action)] for step, action in zip(environment.steps[cut], actions, strict=True)]
        clipped += not np.array_equal(wanted, taken)
        seen.add(candidate)
    assert clipped > 100, "the budget never bound, so the test showed nothing"
    assert len(seen) >= 5


def test_the_wall_clips_to_the_greatest_value_that_later_minima_leave_room_for():
    costing = NastyCosting()
    environment = Compression(SPACE, costing, ["output"], 6.0)
    candidate, _, _ = play(environment, [1.0] * 5, "output")
    kept: list[float] = []
    for place in range(5):
        fitting = [r for r in (0.25, 0.5, 0.75, 1.0) if sum((n + 1) * k for n, k in enumerate([*kept, r] + [0.25] * (4 - place))) <= 6.0]
        kept.append(max(fitting))
    assert candidate == Candidate("output", tuple(zip("abcde", kept, strict=True)))


def test_every_candidate_within_the_budget_can_be_made_and_no_other():
    costing = NastyCosting(6.0)
    environment = Compression(SPACE, costing, ["early"], 5.0)
    made = 0
    for values in itertools.product(*(step.values for step in environment.steps["early"])):
        chosen = dict(zip((step.name for step in environment.steps["early"]), values, strict=True))
        candidate = SPACE.suggest_at("early", lambda name, _, chosen=chosen: chosen[name])
        levels = environment.levels(candidate)
        assert (levels is not None) == (costing.bound_ms(candidate) <= 5.0)
        if levels is not None:
            made += 1
            assert environment.candidate("early", levels) == candidate
    assert made > 20


@pytest.mark.parametrize(
    ("space", "costing"),
    [(SPACE, NastyCosting(3.0)), (SEVERAL, NastyCosting(3.0)), (fakes.SEVERAL, fakes.Costs(fakes.SEVERAL))],
    ids=["one codec", "several", "blocks to drop too"],
)
def test_a_kept_candidate_walks_through_the_states_of_the_episode_that_made_it(space, costing):
    environment = Compression(space, costing, CUTS, 7.0 if space is not fakes.SEVERAL else None)
    rng = np.random.default_rng(1)
    for cut in environment.cuts * 10:
        candidate, states, taken = play(environment, rng.random(len(environment.steps[cut])), cut)
        levels = environment.levels(candidate)
        assert levels is not None
        again, actions = environment.walk(cut, levels)
        np.testing.assert_array_equal(again, states)
        np.testing.assert_array_equal(actions, taken)


def test_candidates_of_another_kind_or_value_belong_to_no_episode():
    environment = Compression(SPACE, NastyCosting(), ["late"], None)
    split = {"code_channels": 4, "stride": 2, "bits": 2}
    assert environment.levels(Candidate("late", **split)) is not None
    assert environment.levels(Candidate("early", **split)) is None
    assert environment.levels(Candidate("input", quality=100)) is None
    assert environment.levels(Candidate("late", (("a", 0.33),), **split)) is None
    assert environment.levels(Candidate("late", **split | {"bits": 3})) is None
    assert environment.levels(Candidate("late", (("e", 0.5),), **split)) is None, "a group behind the cut"
    assert environment.levels(Candidate("late", codec="codebook", **split)) is None


def test_actions_mean_the_nearest_legal_value():
    keep, *_, width, stride, bits = steps_at(SPACE, NastyCosting(), "late")
    assert [keep.values[keep.level(action)] for action in (0.01, 0.4, 0.6, 0.9)] == [0.25, 0.5, 0.5, 1.0]
    assert [width.values[width.level(action)] for action in (0.01, 0.3, 0.6, 1.0)] == [2, 4, 8, 16]
    assert [stride.values[stride.level(action)] for action in (0.1, 0.6, 0.9)] == [2, 2, 1]
    assert [bits.values[bits.level(action)] for action in (0.0, 0.2, 0.5, 1.0)] == [1, 2, 4, 8]


def test_further_choices_of_the_space_are_steps_too():
    space = Space(SPACE.codes, SPACE.bits, SPACE.images, SPACE.keep, codecs=("rate",), rate_weights=(1e-4, 1e-3), precisions=("fp32", "int8"))
    environment = Compression(space, NastyCosting(), ["early"], None)
    names = [step.name for step in environment.steps["early"]]
    assert names[2:] == ["code_channels", "stride", "bits", "rate_weight", "precision"]
    most, _, _ = play(environment, [1.0] * 7, "early")
    assert (most.keep, most.code_channels, most.stride, most.bits, most.rate_weight, most.precision) == ((), 8, 1, 8, 1e-4, "fp32")
    least, _, _ = play(environment, [0.0] * 7, "early")
    assert (least.code_channels, least.stride, least.bits, least.rate_weight, least.precision) == (2, 4, 1, 1e-3, "int8")


def test_the_kind_of_codec_is_a_step_and_what_the_kind_does_not_have_changes_nothing():
    environment = Compression(SEVERAL, NastyCosting(), ["early"], None)
    codec, *rest = environment.steps["early"][2:]
    assert [step.name for step in rest] == ["code_channels", "stride", "bits", "rate_weight"]
    made = {}
    for kind, bits, weight in itertools.product(SEVERAL.codecs, (0.0, 1.0), (0.0, 1.0)):
        place = float(codec.positions[codec.values.index(kind)])
        made[kind, bits, weight] = play(environment, [1.0, 1.0, place, 1.0, 1.0, bits, weight], "early")[0]
    assert {kind: len({made[key] for key in made if key[0] == kind}) for kind in SEVERAL.codecs} == {"uniform": 2, "rate": 4, "multi-rate": 1}
    assert all(candidate.codec == key[0] for key, candidate in made.items())


def test_cuts_that_cannot_meet_the_budget_are_not_offered():
    assert Compression(SPACE, NastyCosting(), CUTS, 3.0).cuts == ("early",)
    assert Compression(SPACE, NastyCosting(), CUTS, None).cuts == CUTS


def test_a_budget_nothing_meets_names_itself_and_the_cheapest():
    with pytest.raises(
        CoinferError, match=r"budget of 1 ms, its code taken as large as uncoded; the cheapest found is early 2ch /4 1bit keep 0\.25 with 1\.77 ms"
    ):
        Compression(SPACE, NastyCosting(), CUTS, 1.0)


def test_the_cheapest_is_found_where_the_lowest_values_are_not_it():
    class Blocked(NastyCosting):
        def bound_ms(self, candidate):
            return super().bound_ms(candidate) + 5 * (dict(candidate.keep).get("a") == 0.25) + 5 * (candidate.stride == 4)

    environment = Compression(SPACE, Blocked(), ["early"], 2.4)
    assert environment.cuts == ("early",)
    candidate, _, _ = play(environment, [0.0] * 5, "early")
    assert Blocked().bound_ms(candidate) <= 2.4


def test_nothing_to_choose_is_said():
    bare = Space(codes={}, bits=(8,), images=(), keep=lambda cut: {})
    with pytest.raises(CoinferError, match="nothing to choose"):
        Compression(bare, NastyCosting(), ["output"], None)


def test_states_tell_what_was_pruned_where():
    environment = Compression(SPACE, NastyCosting(), ["late"], None)
    _, first, _ = play(environment, [0.25, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], "late")
    _, second, _ = play(environment, [1.0, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0], "late")
    assert not np.array_equal(first[4], second[4])
    assert environment.observation_space.contains(first[3])
