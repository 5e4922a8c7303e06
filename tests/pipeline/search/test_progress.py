import csv
import io
from types import SimpleNamespace

import pytest

from pipeline.search.candidate import Candidate
from pipeline.search.executor import InProcess
from pipeline.search.hypervolume import Box, hypervolume
from pipeline.search.importances import importances, importances_csv
from pipeline.search.pareto import Trial, feasible, non_dominated
from pipeline.search.progress import LATENCY_SPAN, LiveTable, Progress, counted, progress_csv
from tests.pipeline.search.fake_measures import fake_measure, measurement
from tests.pipeline.search.fakes import LIMITS, SPACE, trials_of


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return trials_of(tmp_path_factory.mktemp("search"), method="random", trials=40)


def fresh():
    return Progress(LIMITS, "latency_ms", 3000.0, len(SPACE.baselines()))


def test_progress_has_a_row_for_every_evaluation_and_never_falls(trials):
    points = fresh().history(trials)
    assert [point.evaluations for point in points] == list(range(41))
    volumes, bests = [point.hypervolume for point in points], [point.best for point in points]
    assert volumes == sorted(volumes)
    assert volumes[-1] > 0
    assert bests == sorted(bests, reverse=True)
    front = [trial.measurement for trial in non_dominated(feasible(trials, LIMITS))]
    alone = trials[0].measurement.total_ms
    box = Box((LIMITS.floor, alone, 3000.0), (1.0, alone / LATENCY_SPAN, 1.0))
    assert volumes[-1] == pytest.approx(hypervolume(front, box))


def test_the_table_of_progress_leaves_the_best_empty_while_there_is_none():
    trials = [Trial(0, Candidate("output"), measurement(0.9, 100.0, 0.0, memory_mb=99)), Trial(4, Candidate("output", (("a", 0.5),)), None, failure="no")]
    rows = list(csv.DictReader(io.StringIO(progress_csv(fresh().history(trials)))))
    assert rows == [{"evaluations": "0", "hypervolume": "0", "best": ""}, {"evaluations": "1", "hypervolume": "0", "best": ""}]


def test_the_live_table_is_quiet_where_there_is_no_terminal(trials, capfd):
    progress = fresh()
    with LiveTable("search", progress, 40, InProcess(fake_measure)) as table:
        for trial in trials:
            progress.tell(trial)
            table.update()
    assert capfd.readouterr() == ("", "")


def test_the_live_table_shows_best_hypervolume_evaluations_and_time(trials, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = fresh()
    with LiveTable("search camera", progress, 50, InProcess(fake_measure)) as table:
        for trial in trials:
            progress.tell(trial)
            table.update()
    shown = capfd.readouterr().err
    for words in ("search camera", "best so far", "latency_ms", "hypervolume", "40 of 50", "time left"):
        assert words in shown


def test_only_what_this_run_evaluates_tells_the_time_left(trials, capfd, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    clock, executor, progress = SimpleNamespace(now=0.0), InProcess(fake_measure), fresh()
    monkeypatch.setattr("pipeline.search.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    with LiveTable("search camera", progress, 40, executor) as table:
        for trial in trials:
            if progress.evaluations == 30:
                break
            if progress.evaluations < 20:
                clock.now += 1  # it is kept, and learned from
            elif trial.duplicate_of is None:
                executor.finished += 1
                clock.now += 6
            progress.tell(trial)
            table.update()
    shown = capfd.readouterr().err
    assert "0:01:00" in shown, "ten are left, of six seconds each"


def test_what_comes_is_counted_where_there_is_a_terminal(trials, capfd, monkeypatch):
    assert list(counted(iter(trials), "rescoring", 4)) == trials
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(counted(iter(trials), "rescoring", len(trials))) == trials
    assert "rescoring" in capfd.readouterr().err


def test_importances_find_what_matters(trials):
    split = [trial for trial in trials if trial.candidate.kind == "split"]
    assert importances(split[:5], SPACE, 0) == {}, "too few to say"
    found = importances(trials, SPACE, 0)
    assert set(found) == {"accuracy", "total_ms"}
    assert "precision" not in found["accuracy"], "which never varied"
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found.values())
    code = sum(found["accuracy"][name] for name in ("bits", "code_channels", "stride"))
    assert code > 2 * found["accuracy"]["mean kept fraction"], "which the accuracy of the fake's splits does not depend on"
    assert importances(trials, SPACE, 0) == found
    rows = list(csv.DictReader(io.StringIO(importances_csv(found))))
    assert {row["explains"] for row in rows} == {"accuracy", "total_ms"}
