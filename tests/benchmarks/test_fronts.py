"""Fronts of several methods, put in relation; and the evaluations that all of them share."""

import json

import numpy as np
import pytest

from benchmarks.fronts import EVALUATIONS, Shared, courses, figures, volumes
from pipeline.search.candidate import Candidate
from tests.pipeline.search.fake_measures import measurement

REFERENCE = [0.5, 100.0, 1000.0]


def run(method, seed, evaluations):
    front = [["a label", *point] for point in evaluations if point]
    return {"method": method, "seed": seed, "proposals": 4, "failed": 0, "baselines": [[0.9, 100.0, 0.0]], "evaluations": evaluations, "front": front}


@pytest.fixture
def raw():
    """Random reaches half of each axis, tpe the union's corner at its second evaluation."""
    half, best = [0.7, 10.0, 10**1.5], [0.9, 1.0, 1.0]
    return {
        "references": [REFERENCE, REFERENCE],
        "runs": [run("random", 0, [half, [], half]), run("random", 1, [half]), run("tpe", 0, [[0.4, 1.0, 1.0], best]), run("tpe", 1, [best])],
    }


def test_what_dominates_the_union_has_volume_one_and_half_of_each_axis_an_eighth(raw):
    assert volumes(raw) == {"random": [pytest.approx(1 / 8)] * 2, "tpe": [pytest.approx(1.0)] * 2}


def test_the_course_counts_evaluations_failed_ones_too_and_stays_where_it_ended(raw):
    found = courses(raw)
    assert found["tpe"].shape == (2, EVALUATIONS)
    assert found["tpe"][0, :3] == pytest.approx([0, 1, 1])
    assert found["random"][0] == pytest.approx(np.full(EVALUATIONS, 1 / 8))


def test_ratios_are_over_random_and_the_best_needs_so_many_evaluations_to_pass_it(raw):
    found = figures({"resnet20": raw, "other": raw})
    assert found["hypervolume_ratio.tpe"]["value"] == pytest.approx(8)
    assert found["evaluations_to_random200"]["spread"] == [1, 2]
    assert found["hypervolume_ratio.tpe.other"]["value"] == pytest.approx(8)
    raw["runs"] = [row for row in raw["runs"] if row["method"] == "random"] + [run("tpe", 0, [[0.6, 50.0, 500.0]])]
    assert figures({"resnet20": raw})["evaluations_to_random200"]["value"] == EVALUATIONS + 1


def test_what_one_search_measured_another_reads(tmp_path):
    asked = []

    def measure(candidate):
        asked.append(candidate)
        return measurement(0.75, 10.0, 100.0)

    first, second = (Shared(tmp_path / "known.db", measure) for _ in range(2))
    candidate = Candidate("block1", (("block1", 0.5),), 4, 2, 2)
    found = first(candidate, 1)
    assert second(Candidate.from_dict(json.loads(candidate.to_json())), 2) == found
    assert asked == [candidate]
