from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CoinferError, ModelError
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.executor import InProcess, Job, Measure, Outcome, evaluate
from pipeline.search.pareto import Limits, Trial, feasible, trials_csv
from pipeline.search.rescoring import choose_settled, rescored
from tests.pipeline.search.fake_measures import fake_measure, measurement
from tests.pipeline.search.fakes import processes, trials_of

LIMITS = Limits(floor=0.7, memory_mb=5)
WHOLE = Candidate("output")


def code(width: int) -> Candidate:
    return Candidate("block1", (), width, 1, 4)


def is_estimate(candidate: Candidate) -> bool:
    return candidate != WHOLE


def trials(*found: tuple[float, float], whole_memory: float = 1.0) -> list[Trial]:
    """The whole network on the device at 100 ms, then codes of 1, 2, ... channels with the given (accuracy, ms)."""
    measured = [Trial(0, WHOLE, measurement(0.9, 100, 0, whole_memory))]
    return measured + [Trial(n, code(n), measurement(accuracy, ms, 10 * n)) for n, (accuracy, ms) in enumerate(found, 1)]


class LastFirst:
    """Several in flight, of which the latest is finished first; `most` is as many as there ever were."""

    def __init__(self, measure: Measure, workers: int) -> None:
        self.workers, self.finished, self.most, self._measure = workers, 0, 0, measure
        self._jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        self.most = max(self.most, len(self._jobs))
        assert self.most <= self.workers

    def next(self) -> Outcome:
        self.finished += 1
        return evaluate(self._measure, self._jobs.pop())

    def close(self) -> None:
        self._jobs.clear()


def again(before: list[Trial], accuracy: dict[int, float], kept: Path, count: int = 2, workers: int = 1) -> tuple[list[Trial], list[int]]:
    """`before` with its rescored trials, the accuracy of width n then being `accuracy[n]`; and the widths measured."""
    asked = []

    def measure(candidate: Candidate, seed: int, *, rescores: bool = False) -> Measurement:
        assert rescores
        width = candidate.code_channels or 0
        asked.append(width)
        if accuracy[width] < 0:
            raise ModelError("it broke")
        ms = next(trial.measurement.total_ms for trial in before if trial.candidate == candidate and trial.measurement)
        return measurement(accuracy[width], ms, 10 * width)

    options = {"seed": 0, "kept": kept / "rescored.json"}
    executor = LastFirst(measure, workers)
    found = list(rescored(tuple(before), LIMITS, "latency_ms", count, executor, is_estimate, **options))
    assert not asked or executor.most == min(workers, max(count, len(found) - count)), "nobody is idle, and nothing is started that may not be needed"
    return before + found, asked


def test_the_cheapest_that_are_good_enough_are_measured_again_and_the_choice_is_among_them(tmp_path: Path) -> None:
    found, asked = again(trials((0.75, 10), (0.6, 5), (0.8, 20), (0.85, 30)), {1: 0.65, 3: 0.82}, tmp_path)
    assert asked == [1, 3], "not the one below the floor, not the dearest"
    assert [trial.rescores for trial in found[-2:]] == [1, 3]
    assert [trial.number for trial in found[-2:]] == [5, 6]
    chosen = choose_settled(found, LIMITS, "latency_ms", is_estimate)
    assert (chosen.candidate, chosen.number) == (code(3), 6), "1 fell below the floor"
    assert [trial.number for trial in feasible(found, LIMITS)] == [0, 4, 6], "what was measured again speaks for itself no longer"


def test_more_are_tried_while_none_is_good_enough(tmp_path: Path) -> None:
    found, asked = again(trials((0.75, 10), (0.76, 12), (0.8, 20), (0.85, 30), (0.86, 31)), {1: 0.65, 2: 0.6, 3: 0.72}, tmp_path)
    assert asked == [1, 2, 3]
    assert choose_settled(found, LIMITS, "latency_ms", is_estimate).candidate == code(3)


def test_where_all_fall_below_the_floor_what_is_certain_is_chosen_and_else_the_nearest(tmp_path: Path) -> None:
    low = {1: 0.65, 2: 0.6}
    found, _ = again(trials((0.75, 10), (0.76, 12)), low, tmp_path)
    assert choose_settled(found, LIMITS, "latency_ms", is_estimate).candidate == WHOLE
    found, _ = again(trials((0.75, 10), (0.76, 12), whole_memory=9), low, tmp_path)
    assert choose_settled(found, LIMITS, "latency_ms", is_estimate).candidate == code(1), "the whole network does not fit"


def test_nothing_is_measured_again_that_is_dearer_than_what_is_certain(tmp_path: Path) -> None:
    _, asked = again(trials((0.95, 110), (0.97, 120)), {}, tmp_path)
    assert asked == []


def test_the_nearest_are_trained_where_no_estimate_is_within_the_limits(tmp_path: Path) -> None:
    found, asked = again(trials((0.5, 10), (0.69, 12), (0.65, 5), whole_memory=9), {2: 0.72, 3: 0.68}, tmp_path)
    assert asked == [2, 3]
    assert choose_settled(found, LIMITS, "latency_ms", is_estimate).candidate == code(2)
    found, _ = again(trials((0.5, 10), (0.6, 12), whole_memory=9), {1: 0.5, 2: 0.6}, tmp_path / "other")
    with pytest.raises(CoinferError, match=r"none of \d candidates is within the limits"):
        choose_settled(found, LIMITS, "latency_ms", is_estimate)


def test_what_was_measured_again_is_kept(tmp_path: Path) -> None:
    before, better = trials((0.75, 10), (0.8, 20), (0.85, 30)), {1: 0.75, 2: -1, 3: 0.85}
    first, asked = again(before, better, tmp_path)
    assert asked == [1, 2]
    assert first[-1].failure == "it broke"
    second, asked = again(before, better, tmp_path)
    assert (asked, second) == ([], first)


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("better", [{1: 0.75, 2: 0.8, 3: 0.1}, {1: 0.65, 2: 0.6, 3: 0.72, 4: 0.85}, {1: -1, 2: 0.6, 3: 0.1, 4: 0.75}])
def test_several_workers_measure_again_what_one_does(tmp_path: Path, workers: int, better: dict[int, float]) -> None:
    before = trials((0.75, 10), (0.76, 12), (0.8, 20), (0.85, 30), (0.86, 31))
    alone, _ = again(before, better, tmp_path / "one")
    found, asked = again(before, dict.fromkeys(range(1, 6), 0.1) | better, tmp_path / "several", workers=workers)
    assert found == alone
    assert len(asked) == len(set(asked))
    assert again(before, better, tmp_path / "several", workers=workers)[0] == alone, "what was measured again is kept"


def test_workers_get_what_to_measure_again(tmp_path: Path) -> None:
    before = trials_of(tmp_path, method="random", trials=12)
    options: dict[str, Any] = {"seed": 0, "count": 2, "is_estimate": lambda candidate: candidate.kind == "split"}
    with closing(InProcess(fake_measure)) as one, closing(processes(2)[0]) as two:
        found = [list(rescored(before, LIMITS, "latency_ms", executor=executor, kept=tmp_path / str(executor.workers), **options)) for executor in (one, two)]
    assert found[0] == found[1]
    assert found[0]
    for trial in found[0]:
        assert trial.measurement
        estimate = next(old for old in before if old.number == trial.rescores).measurement
        assert estimate
        assert trial.measurement.accuracy < estimate.accuracy


def test_a_failure_leaves_the_candidate_out(tmp_path: Path) -> None:
    found, _ = again(trials((0.75, 10), (0.8, 20)), {1: -1, 2: 0.8}, tmp_path)
    assert choose_settled(found, LIMITS, "latency_ms", is_estimate).candidate == code(2)


def test_without_rescoring_all_count_and_the_table_says_what_was_trained_on(tmp_path: Path) -> None:
    found, asked = again(trials((0.75, 10)), {}, tmp_path, count=0)
    assert asked == []
    assert choose_settled(found, LIMITS, "latency_ms", is_estimate).candidate == code(1)
    found, _ = again(trials((0.75, 10)), {1: 0.8}, tmp_path)
    rows = [line.split(",") for line in trials_csv(found, LIMITS).splitlines()]
    state, rescores = (rows[0].index(name) for name in ("state", "rescores"))
    assert [(row[state], row[rescores]) for row in rows[1:]] == [("measured", ""), ("measured", ""), ("rescored", "1")]
