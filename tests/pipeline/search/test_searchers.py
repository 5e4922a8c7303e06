"""One suite over every method of search, driven as a stage drives it."""

import csv
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.search.candidate import OUTPUT
from pipeline.search.executor import evaluate
from pipeline.search.pareto import OBJECTIVES, Trial
from pipeline.search.space import Space
from tests.pipeline.search.fake_measures import fake_measure
from tests.pipeline.search.fakes import METHODS, SEVERAL, SPACE, journal_in, processes, run, searcher_of, trials_of

ROOT = Path(__file__).resolve().parents[3]
every_method = pytest.mark.parametrize("method", METHODS)


def rows_of(table):
    return list(csv.DictReader(io.StringIO(table)))


@every_method
def test_a_killed_search_goes_on_to_the_same_table(tmp_path, method):
    options = {"method": method, "trials": 20}
    whole = run(tmp_path / "whole", **options)
    command = [sys.executable, "-m", "tests.pipeline.search.fakes", str(tmp_path / "killed"), json.dumps(options)]
    journal = journal_in(tmp_path / "killed")
    for lines in (6, 16):
        with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": str(lines)}, stdout=subprocess.PIPE) as process:
            while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert journal.read_bytes().count(b"\n") < 22, "the search was over before it was killed"
    assert run(tmp_path / "killed", **options) == whole


@every_method
def test_a_kept_search_is_not_measured_again(tmp_path, method):
    def refuse(candidate, trial_seed):
        pytest.fail("measured again")

    assert run(tmp_path, method=method, trials=5) == run(tmp_path, method=method, trials=5, measure=refuse)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "ddpg"])  # whose noise shrinks with the trials there are to be
def test_more_trials_go_on_where_fewer_ended(tmp_path, method):
    fewer, more = run(tmp_path / "a", method=method, trials=8), run(tmp_path / "b", method=method, trials=16)
    assert [row["label"] for row in rows_of(fewer)] == [row["label"] for row in rows_of(more)][: len(rows_of(fewer))]
    assert run(tmp_path / "a", method=method, trials=16) == more
    assert run(tmp_path / "b", method=method, trials=8) == fewer


@every_method
def test_another_seed_gives_another_search(tmp_path, method):
    assert run(tmp_path / "a", method=method, seed=1) != run(tmp_path / "b", method=method, seed=2)


@every_method
def test_baselines_come_first(tmp_path, method):
    assert [row["label"] for row in rows_of(run(tmp_path, method=method, trials=4))][:3] == ["device-only", "WebP lossless", "WebP q50"]


@every_method
def test_trials_are_evaluations_beyond_the_baselines_and_none_is_made_twice(tmp_path, method):
    seen = []

    def measure(candidate, trial_seed, *, rescores):
        seen.append(candidate)
        return fake_measure(candidate, trial_seed)

    rows = rows_of(run(tmp_path, method=method, trials=20, measure=measure))
    assert len(seen) == len(set(seen)) == 3 + 20
    reused = [row for row in rows if row["state"] == "reused"]
    assert reused or method in ("tpe", "nsga2", "ddpg"), "which look for what they were not told of"
    for row in reused:
        original = rows[int(row["duplicate_of"])]
        assert (row["label"], row["keep"], row["accuracy"], row["total_ms"]) == tuple(original[key] for key in ("label", "keep", "accuracy", "total_ms"))


@every_method
def test_a_failing_candidate_is_recorded_and_the_search_goes_on(tmp_path, method):
    def unlucky(candidate, trial_seed, *, rescores):
        if candidate.kind == "split" and trial_seed % 3 == 0:
            raise RuntimeError("out of\nluck")
        measured = fake_measure(candidate, trial_seed)
        return replace(measured, accuracy=math.nan) if candidate.kind == "split" and trial_seed % 3 == 1 else measured

    rows = rows_of(run(tmp_path, method=method, trials=25, measure=unlucky))
    reasons = {row["failure"] for row in rows if row["state"] == "failed"}
    assert reasons - {"the fake runs out of luck"} == {"out of luck", "accuracy came out as no finite number"}
    assert [int(row["number"]) for row in rows] == list(range(len(rows)))


@every_method
def test_a_search_ends_when_the_space_is_used_up(tmp_path, method):
    small = Space(codes={"early": ((2,), (1,))}, bits=(1, 2), images=(("webp", 50),), keep=lambda cut: {})
    found = trials_of(tmp_path, method=method, space=small, trials=10)
    assert sum(trial.duplicate_of is None for trial in found) == 4


@every_method
def test_only_legal_combinations_are_proposed(tmp_path, method):
    for row in rows_of(run(tmp_path, method=method, trials=30)):
        keep = json.loads(row["keep"])
        if row["cut"] == "early":
            assert int(row["code_channels"]) <= 4
            assert not keep
        if row["cut"] == "late":
            assert int(row["stride"]) <= 2
            assert "block2.conv1" not in keep
        assert keep.get("block1") != 0 or "block1.conv1" not in keep, "a block that is gone has no channels to choose"


@every_method
def test_every_kind_of_codec_is_tried_and_the_better_one_more_often_by_what_learns(tmp_path, method):
    def measure(candidate, trial_seed, rescores=False):
        measured = fake_measure(replace(candidate, codec="uniform", rate_weight=None, points=()) if candidate.codec else candidate, trial_seed)
        return measured if candidate.codec == "rate" else replace(measured, device_memory_mb=9.0, total_ms=10 * measured.total_ms)

    found = trials_of(tmp_path, method=method, space=SEVERAL, trials=60, seed=1, measure=measure)
    kinds = [trial.candidate.codec for trial in found if trial.candidate.codec and trial.duplicate_of is None]
    assert set(kinds) == set(SEVERAL.codecs)
    assert method in ("random", "uniform") or kinds[-20:].count("rate") >= 8, "chance alone makes it 5"


@every_method
def test_workers_finish_the_search_that_one_began(tmp_path, method):
    run(tmp_path, method=method, trials=6)
    rows = rows_of(run(tmp_path, method=method, trials=20, executor=processes(2)[0]))
    assert [int(row["number"]) for row in rows] == list(range(len(rows)))
    assert sum(not row["duplicate_of"] for row in rows) == 3 + 20
    measured = Counter((row["label"], row["keep"]) for row in rows if not row["duplicate_of"])
    assert set(measured.values()) == {1}


@pytest.mark.parametrize("method", ["random", "uniform"])
def test_where_nothing_is_learnt_the_number_of_workers_changes_nothing(tmp_path, method):
    alone = run(tmp_path / "one", method=method, trials=30)
    assert run(tmp_path / "two", method=method, trials=30, executor=processes(2)[0]) == alone


@every_method
@pytest.mark.parametrize("space", [SPACE, SEVERAL], ids=["one codec", "several"])
def test_a_fresh_searcher_told_the_same_trials_asks_the_same(tmp_path, method, space):
    """What resuming rests on; the last to be told is a repetition in some rounds and not in others."""
    first, numbers = searcher_of(method, space, seed=5), range(100, 103)
    told = trials_of(tmp_path, method=method, space=space, seed=5, trials=40)
    for count in range(len(told)):
        first.tell(told[count])
        if count % 9 == 0 or told[count].duplicate_of is not None:
            second = searcher_of(method, space, seed=5)
            for trial in told[: count + 1]:
                second.tell(trial)
            assert [first.ask(number) for number in numbers] == [second.ask(number) for number in numbers]


def hypercube():
    """Eight groups whose best kept fractions are known, all else being fixed."""
    return Space(codes={}, bits=(), images=(("webp", 100),), keep=lambda cut: {f"g{n}": (0.25, 0.5, 0.75, 1.0) for n in range(8)})


def towards_the_corner(candidate, trial_seed, *, rescores):
    measured = fake_measure(candidate, trial_seed)
    if candidate.cut != OUTPUT:
        return measured
    wrong = sum(abs(dict(candidate.keep).get(f"g{n}", 1.0) - (0.25 if n % 2 else 0.75)) for n in range(8))
    return replace(measured, accuracy=0.95 - wrong / 20, total_ms=10 + wrong)


@pytest.mark.parametrize("method", ["tpe", "nsga2"])
@pytest.mark.parametrize("workers", [1, 3])
def test_what_learns_beats_chance_alone_and_in_parallel(tmp_path, method, workers):
    """Also resumed in the middle: with NSGA-II, whose generations could be lost by a kill or by trials in flight."""

    class InTurns:
        """Several in flight, the latest finished first."""

        def __init__(self):
            self.workers, self.jobs = workers, []

        def submit(self, job):
            self.jobs.append(job)

        def next(self):

            return evaluate(towards_the_corner, self.jobs.pop())

        def close(self):
            pass

    def late(name, seed):
        """Mean accuracy of the last proposals of a search that was resumed once."""
        options = {"method": name, "space": hypercube(), "seed": seed}
        for trials in (20, 50):
            found = trials_of(tmp_path / f"{name}{seed}", trials=trials, executor=InTurns(), **options)
        return statistics.mean([trial.measurement.accuracy for trial in found if trial.candidate.cut == OUTPUT and trial.duplicate_of is None][-15:])

    assert late(method, 0) > late("random", 0) + 0.02


@pytest.mark.parametrize("method", ["tpe", "nsga2"])
def test_limits_reach_the_sampler_as_constraints(method):
    searcher = searcher_of(method, seed=0)
    searcher.tell(Trial(0, SPACE.baselines()[0], fake_measure(SPACE.baselines()[0], 0)))
    told = searcher.study.trials[-1]
    assert told.values == [getattr(fake_measure(SPACE.baselines()[0], 0), name) for name in OBJECTIVES]
    assert told.constraints["accuracy"] < 0
    assert told.constraints["memory"] == pytest.approx(1 / 5 - 1)


def test_uniform_keeps_one_fraction_everywhere():
    searcher = searcher_of("uniform", seed=1)
    found = [dict(searcher.ask(number).keep) for number in range(200)]
    assert all("block1" not in keep for keep in found), "it drops no block"
    assert {tuple(sorted(keep.items())) for keep in found if "block2.conv1" in keep or "stem" in keep} <= {
        tuple(sorted({"stem": 0.5, "block1.conv1": ratio, **more}.items())) for ratio in (0.25, 0.5) for more in ({}, {"block2.conv1": 0.5})
    }
