"""The comparison of trials with full fine-tuning, on a tiny backbone."""

import copy

import pytest
import torch

from benchmarks.evaluator_rank import Estimate, Judged, candidates_near_the_best, judged, summary
from models.cutting import cut_points
from pipeline.errors import CoinferError
from pipeline.params import Codec
from pipeline.search.candidate import Candidate
from pipeline.search.evaluator import Evaluator
from pipeline.search.problem import Problem
from pipeline.search.supernet import SplitSupernet, Supernet
from tests.pipeline.search.toy import deployment, pictures


@pytest.fixture
def evaluator(tiny_backbone, digits_params):
    """An evaluator on a supernet that was never trained."""
    settings = digits_params.search.model_copy(update={"codecs": ["uniform"], "code_channels": [2, 4], "strides": [2], "bits": [2], "keep": [0.5, 1.0]})
    cuts = cut_points(tiny_backbone, torch.zeros(1, 3, 16, 16))
    problem = Problem(tiny_backbone, cuts, settings, Codec(), channel_block=1)
    torch.manual_seed(0)
    splits = {cut: SplitSupernet(problem, cut).eval() for cut in problem.space().codes}
    return Evaluator(problem, pictures(64, 0), pictures(40, 1), deployment(), 0, Supernet(problem, copy.deepcopy(tiny_backbone), splits))


def test_candidates_differ_lie_near_the_best_and_are_the_same_each_time(evaluator, monkeypatch):
    found = candidates_near_the_best(evaluator, 3, seed=0)
    assert len({estimate.candidate for estimate in found}) == 3
    assert max(estimate.accuracy for estimate in found) - min(estimate.accuracy for estimate in found) <= 0.05
    assert all(estimate.trial_s > 0 for estimate in found)
    assert [estimate.candidate for estimate in candidates_near_the_best(evaluator, 3, seed=0)] == [estimate.candidate for estimate in found]
    monkeypatch.setattr("benchmarks.evaluator_rank.MOST_DRAWS", 1)
    with pytest.raises(CoinferError, match="fewer than 3 lie within 5% of the best"):
        candidates_near_the_best(evaluator, 3, seed=0)


@pytest.mark.parametrize("candidate", [Candidate("block1", (("block1", 0.5),), 4, 2, 2), Candidate("output", (("block2", 0.5),))])
def test_fine_tuning_makes_a_candidate_better_than_untrained(evaluator, candidate, digits_params):
    estimate = Estimate(candidate, 0.1, 64.0, 0.5)
    settings = digits_params.finetune.model_copy(update={"epochs": 12, "batch_size": 32, "learning_rate": 0.1})
    row = judged(evaluator.problem, estimate, pictures(200, 0), evaluator.validation, settings, 0.0, seed=0)
    assert (row.candidate, row.estimated, row.trial_s) == (candidate.to_dict(), 0.1, 0.5)
    assert row.finetuned > evaluator.measure(candidate, 0).accuracy + 0.1
    assert row.finetune_s > 0


def test_the_summary_ranks_and_sets_costs_in_relation():
    rows = [Judged({}, estimated, tuned, 1.0, 100.0) for estimated, tuned in ((0.7, 0.8), (0.72, 0.81), (0.74, 0.83), (0.76, 0.82))]
    found = summary(rows, training_s=200.0)
    assert found["spearman"] == pytest.approx(0.8)
    assert found["kendall"] == pytest.approx(4 / 6)
    assert (found["cost_ratio"], found["cost_ratio_shared"]) == (pytest.approx(0.01), pytest.approx(0.02))
