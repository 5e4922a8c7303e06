import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from pipeline.errors import CoinferError
from pipeline.search.candidate import Candidate
from pipeline.search.executor import InProcess, Job, Outcome
from tests.pipeline.search.fake_measures import fake_measure
from tests.pipeline.search.fakes import journal_in, processes, run, trials_of

ROOT = Path(__file__).resolve().parents[3]


def test_jobs_and_outcomes_survive_the_pipe():
    job = Job(7, Candidate("late", (("a", 0.5),), 4, 2, 3), 11, rescores=True)
    assert Job.from_json(job.to_json()) == job
    for outcome in (Outcome(7, fake_measure(job.candidate, 3)), Outcome(8, failure="no")):
        assert Outcome.from_json(outcome.to_json()) == outcome


def test_a_worker_that_is_killed_costs_its_trial_a_retry(tmp_path):
    pool, _ = processes(2, "slow", seconds=0.1, log=str(tmp_path / "log"))
    killed = []

    class Watched:
        workers = 2

        def submit(self, job):
            pool.submit(job)

        def next(self):
            if not killed and (tmp_path / "log").exists() and len((tmp_path / "log").read_text().splitlines()) > 8:
                killed.append(int((tmp_path / "log").read_text().splitlines()[-1].split()[0]))
                os.kill(killed[0], signal.SIGKILL)
            return pool.next()

        def close(self):
            pool.close()

    assert run(tmp_path / "two", method="random", trials=20, executor=Watched()) == run(tmp_path / "one", method="random", trials=20)
    assert killed
    evaluations = [line.split(" ", 1) for line in (tmp_path / "log").read_text().splitlines()]
    assert len({pid for pid, _ in evaluations}) == 3
    repeated = [what for _, what in evaluations if [w for _, w in evaluations].count(what) > 1]
    assert len(set(repeated)) <= 1, "only what the killed worker had, with the same trial seed, is evaluated twice"


def test_a_candidate_that_kills_two_workers_is_a_failed_trial(tmp_path):
    trials = trials_of(tmp_path, method="random", trials=12, executor=processes(2, "deadly", cut="early")[0])
    dead = [trial for trial in trials if trial.candidate.cut == "early" and trial.duplicate_of is None]
    assert dead
    assert all(trial.failure.startswith("the worker that evaluated it died, 2 times in a row") for trial in dead)
    assert any(trial.measurement is not None and trial.candidate.cut == "late" for trial in trials)


def test_workers_that_cannot_be_built_say_why(tmp_path):
    with pytest.raises(CoinferError, match=r"^no evaluator today$"):
        run(tmp_path, executor=processes(2, "unable", sentence="no evaluator today")[0])
    with pytest.raises(CoinferError, match="workers of the search died while they started"):
        run(tmp_path, executor=processes(2, "stillborn")[0])
    with pytest.raises(CoinferError, match=r"a worker of the search failed with AttributeError: .* this is a bug"):
        run(tmp_path, executor=processes(1, "nobody")[0])


def test_closing_ends_the_workers():
    pool, fleet = processes(2, "slow", seconds=60)
    with closing(pool):
        pool.submit(Job(0, Candidate("output"), 0))
        pids = fleet.pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_worker_is_the_driver_itself():
    def measure(candidate, trial_seed, *, rescores):
        assert os.getpid() == pid
        return fake_measure(candidate, trial_seed)

    pid, executor = os.getpid(), InProcess(measure)
    executor.submit(Job(3, Candidate("output"), 5))
    assert executor.next() == Outcome(3, fake_measure(Candidate("output"), 5))


def test_a_killed_driver_takes_its_workers_along_and_another_goes_on(tmp_path):
    log = tmp_path / "log"
    options = {"method": "random", "trials": 30, "workers": 2, "log": str(log)}
    command = [sys.executable, "-m", "tests.pipeline.search.fakes", str(tmp_path / "killed"), json.dumps(options)]
    journal = journal_in(tmp_path / "killed")
    for lines in (6, 14):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    workers = {int(line.split()[0]) for line in log.read_text().splitlines()}
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in workers), "orphans go on evaluating"
    kept = [json.loads(line) for line in journal.read_bytes().splitlines()]
    assert run(tmp_path / "killed", method="random", trials=30) == run(tmp_path / "one", method="random", trials=30)
    evaluated = [line.split(" ", 1)[1] for line in log.read_text().splitlines()]
    again = [line for line in set(evaluated) if evaluated.count(line) > 1]
    recorded = {json.dumps(row["candidate"], sort_keys=True) for row in kept}
    assert len(again) <= 2, "at most one in flight for each worker of the first driver"
    assert len(recorded) == len({line.split(" ", 1)[1] for line in evaluated} & recorded)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
