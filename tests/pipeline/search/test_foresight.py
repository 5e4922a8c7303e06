"""What is refused before the first trial, and that nothing is which an evaluation would find within the limits."""

import itertools

import pytest
import torch

from models.cutting import cut_points
from pipeline.costs.link import Link, reply_frame_bytes
from pipeline.errors import CoinferError
from pipeline.params import Codec
from pipeline.search.candidate import Candidate
from pipeline.search.evaluator import Evaluator
from pipeline.search.foresight import refuse_the_impossible
from pipeline.search.limits import LatencyLimit, Limits
from pipeline.search.problem import Problem
from pipeline.search.simple import random_pick
from tests.pipeline.search.fake_measures import measurement
from tests.pipeline.search.fakes import SPACE
from tests.pipeline.search.toy import deployment, pictures

BOUNDED = ("total_ms", "energy_mj", "device_memory_mb", "bundle_mb")


@pytest.fixture
def make(tiny_backbone, digits_params):
    def build(kind="uniform", **changes):
        changes = {"codecs": [kind], "codec_steps": 1, "code_channels": [2, 8], "strides": [1, 2], "bits": [1, 4], "keep": [0.0, 0.25, 0.5, 1.0]} | changes
        cuts = cut_points(tiny_backbone, torch.zeros(1, 3, 16, 16))
        problem = Problem(tiny_backbone, cuts, digits_params.search.model_copy(update=changes), Codec(), channel_block=1)
        return Evaluator(problem, pictures(64, 0), pictures(20, 1), deployment(), 0)

    return build


@pytest.mark.parametrize(("kind", "changes"), [("uniform", {}), ("codebook", {"keep": [1.0]}), ("raw-fp32", {}), ("rate", {"precision": ["int8"]})])
def test_no_candidate_is_measured_below_what_was_foreseen(make, kind, changes):
    evaluator = make(kind, **changes)
    space, measured = evaluator.problem.space(), 0
    for number, cut in itertools.product(range(3), space.cuts):
        candidate = space.suggest_at(cut, random_pick(number))
        code = space.choices(candidate)
        narrowest = space.suggest_at(cut, lambda name, choices, code=code: choices[0] if name.startswith("keep ") else code[name])
        least = evaluator.costing.least(narrowest)
        try:
            found = evaluator.measure(candidate, 0)
        except CoinferError:  # a code wider than what is left to code, or int8 that it does not bear
            continue
        measured += 1
        assert all(getattr(least, name) <= getattr(found, name) for name in BOUNDED), candidate.label()
    assert measured >= 4


@pytest.mark.parametrize("candidate", [Candidate("output"), Candidate("input", quality=30)])
def test_of_what_pruning_does_not_reach_all_but_what_is_sent_is_foreseen(make, candidate):
    evaluator = make()
    least, found = evaluator.costing.least(candidate), evaluator.measure(candidate, 0)
    assert [getattr(least, name) for name in BOUNDED[2:]] == [getattr(found, name) for name in BOUNDED[2:]]
    assert least.total_ms - least.link_ms == pytest.approx(found.total_ms - found.link_ms)


def limits(**changes):
    return Limits(**{"floor": 0.9, "memory_mb": 64.0} | changes)


IMPOSSIBLE = {
    "latency": {"latency": LatencyLimit(0.05, (Link(1, 1),), reply_frame_bytes(10), own=True)},
    "latency at other rates": {"latency": LatencyLimit(0.05, (Link(0.1, 1), Link(100, 1)), reply_frame_bytes(10))},
    "memory": {"memory_mb": 1e-6},
    "energy": {"energy_mj": 1e-3},
    "bundle": {"bundle_mb": 1e-6},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_nothing_can_keep_is_refused_with_what_binds_and_what_comes_nearest(make, name):
    evaluator = make()
    words = rf"even with the least that is foreseen of each: none keeps the limit on {name.split()[0]}; nearest are .*: its? .*; .*\. Loosen"
    with pytest.raises(CoinferError, match=words):
        refuse_the_impossible(evaluator.problem.space(), evaluator.costing, limits(**IMPOSSIBLE[name]))


def test_limits_that_each_can_be_kept_but_not_together_are_refused(make):
    """The image takes no memory of the device but a link of seconds; whatever computes there needs memory."""
    evaluator = make(keep=[1.0])
    slow = LatencyLimit(1000.0, (Link(0.0001, 1),), reply_frame_bytes(10))
    refuse_the_impossible(evaluator.problem.space(), evaluator.costing, limits(latency=slow))
    refuse_the_impossible(evaluator.problem.space(), evaluator.costing, limits(memory_mb=0.004))
    with pytest.raises(CoinferError, match=r"limit on latency .*limit on memory|latency or on memory"):
        refuse_the_impossible(evaluator.problem.space(), evaluator.costing, limits(latency=slow, memory_mb=0.004))


def test_every_code_is_looked_at_behind_the_narrowest_half():
    seen = []

    class Costing:
        """Of something that never fits."""

        def least(self, candidate):
            seen.append(candidate)
            return measurement(1.0, 10.0, 0.0, memory_mb=99)

    with pytest.raises(CoinferError, match="none keeps the limit on memory"):
        refuse_the_impossible(SPACE, Costing(), limits())
    narrow = {"early": (), "late": (("stem", 0.5), ("block1", 0.0)), "output": (("stem", 0.5), ("block1", 0.0), ("block2.conv1", 0.5))}
    codes = {Candidate(cut, narrow[cut], *code) for cut, sizes in SPACE.codes.items() for code in itertools.product(*sizes, SPACE.bits)}
    assert len(seen) == len(set(seen))
    assert set(seen) == {*SPACE.baselines(), Candidate("output", narrow["output"])} | codes
