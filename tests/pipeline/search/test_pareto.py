import csv
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CoinferError
from pipeline.search.candidate import Candidate
from pipeline.search.limits import Limits
from pipeline.search.pareto import Trial, baselines, choose, costs, feasible, non_dominated, trials_csv
from tests.pipeline.search.fake_measures import measurement

LIMITS = Limits(floor=0.7, memory_mb=2)


def trial(number, accuracy=0.9, total_ms=10.0, wire_bytes=100.0, memory_mb=1.0, candidate=None, **rest):
    return Trial(number, candidate or Candidate("cut", (), number + 1, 1, 2), measurement(accuracy, total_ms, wire_bytes, memory_mb), **rest)


few = st.sampled_from([1.0, 2.0, 3.0])
some_trials = st.lists(st.tuples(few, few, few), min_size=1, max_size=12).map(lambda rows: [trial(i, a / 4, t, b) for i, (a, t, b) in enumerate(rows)])


@given(some_trials)
def test_the_pareto_set_beats_the_rest_and_not_itself(trials):
    front = non_dominated(trials)
    for mine in trials:
        beaten_by = [all(a <= b for a, b in zip(costs(rival.measurement), costs(mine.measurement), strict=True)) for rival in front]
        assert (mine in front and sum(beaten_by) == 1) or (mine not in front and any(beaten_by))


@given(some_trials, st.randoms())
def test_the_order_of_trials_does_not_matter(trials, random):
    shuffled = random.sample(trials, len(trials))
    assert {t.number for t in non_dominated(shuffled)} == {t.number for t in non_dominated(trials)}
    open_limits = Limits(floor=0, memory_mb=math.inf)
    assert choose(shuffled, open_limits, "latency_ms") == choose(trials, open_limits, "latency_ms")


def test_the_objective_picks_among_the_feasible():
    trials = [trial(0, 0.6, 1, 1), trial(1, 0.8, 5, 50), trial(2, 0.8, 9, 10), trial(3, 0.95, 2, 5, memory_mb=3)]
    assert choose(trials, LIMITS, "latency_ms").number == 1
    assert choose(trials, LIMITS, "wire_bytes").number == 2


def test_ties_go_to_accuracy_then_the_earlier_trial():
    trials = [trial(0, 0.8, 5, 50), trial(1, 0.9, 5, 60), trial(2, 0.9, 5, 60)]
    assert choose(trials, LIMITS, "latency_ms").number == 1


def test_accuracy_on_the_floor_is_enough():
    assert feasible([trial(0, accuracy=0.7)], Limits(floor=0.8 - 0.1, memory_mb=2))


def test_failed_and_reused_trials_are_never_chosen():
    trials = [Trial(0, Candidate("output"), None, failure="no"), trial(1, total_ms=5), trial(2, total_ms=5, duplicate_of=1)]
    assert [t.number for t in feasible(trials, LIMITS)] == [1]


def test_nothing_within_memory_names_memory_and_the_nearest():
    with pytest.raises(
        CoinferError, match=r"none keeps the limit on memory; nearest are cut 2ch /1 2bit: it needs 3 MB of the device's 2 MB \(memory_mb\); cut 1ch"
    ):
        choose([trial(0, memory_mb=9), trial(1, memory_mb=3)], LIMITS, "latency_ms")


def test_nothing_above_the_floor_names_the_floor_and_the_nearest():
    with pytest.raises(CoinferError, match=r"limit on accuracy; nearest are cut 1ch /1 2bit: accuracy 0.6900 lies below the floor 0.7000 \(objective"):
        choose([trial(0, 0.69), trial(1, 0.5)], LIMITS, "latency_ms")


def test_nothing_measured_gives_the_reason():
    with pytest.raises(CoinferError, match="every trial of the search failed, the first with: no channels left"):
        choose([Trial(0, Candidate("output"), None, failure="no channels left")], LIMITS, "latency_ms")


def webp(number, quality, accuracy, total_ms):
    return trial(number, accuracy, total_ms, 10.0, candidate=Candidate("input", quality=quality))


def test_edge_only_is_the_cheapest_quality_on_the_floor():
    device = trial(0, candidate=Candidate("output"))
    images = [webp(1, 100, 0.9, 30.0), webp(2, 75, 0.7, 20.0), webp(3, 15, 0.5, 10.0)]
    assert [t.number for t in baselines([device, *images], LIMITS, "latency_ms")] == [0, 2]
    assert [t.number for t in baselines([device, *images[2:]], LIMITS, "latency_ms")] == [0, 3], "the most accurate where none reaches the floor"


def test_a_baseline_that_failed_is_one_sentence():
    with pytest.raises(CoinferError, match="the device-only baseline has no measurement: out of luck"):
        baselines([Trial(0, Candidate("output"), None, failure="out of luck"), webp(1, 100, 0.9, 30.0)], LIMITS, "latency_ms")


def test_the_table_has_a_row_for_every_trial():
    failed = Trial(2, Candidate("output", (("block", 0.5),)), None, failure="broke, badly")
    rows = list(csv.DictReader(io.StringIO(trials_csv([trial(0), trial(1, 0.5, 1), failed], LIMITS))))
    assert [row["state"] for row in rows] == ["measured", "measured", "failed"]
    assert [(row["feasible"], row["pareto"]) for row in rows] == [("1", "1"), ("0", "0"), ("0", "0")]
    assert (rows[2]["failure"], rows[2]["keep"], rows[2]["accuracy"]) == ("broke, badly", '{"block": 0.5}', "")
    assert float(rows[0]["total_ms"]) == 10
