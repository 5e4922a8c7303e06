import json
from contextlib import closing

import pytest

from pipeline.errors import CoinferError
from pipeline.search.driver import search
from pipeline.search.executor import InProcess, evaluate
from tests.pipeline.search.fake_measures import fake_measure
from tests.pipeline.search.fakes import SPACE, journal_in, run, searcher_of, trials_of


@pytest.mark.parametrize("cut_off", [1, 40, 900])
def test_a_journal_cut_short_by_a_power_cut_is_mended(tmp_path, cut_off):
    whole = run(tmp_path, trials=8)
    data = journal_in(tmp_path).read_bytes()
    journal_in(tmp_path).write_bytes(data[:-cut_off])
    assert run(tmp_path, trials=8) == whole
    assert journal_in(tmp_path).read_bytes().startswith(data[: data[:-cut_off].rfind(b"\n") + 1])


DAMAGES = {
    "a key": lambda d: d.replace(b'"accuracy"', b'"acc', 1),
    "zeros": lambda d: b"\0" * 9 + d,
    "a field": lambda d: d.replace(b"device_ms", b"ms"),
    "a number": lambda d: b"7\n",
    "a lost result": lambda d: d.replace(b'"measurement": {', b'"measurement": null, "was": {', 1),
    "a candidate": lambda d: d.replace(b'"cut": "output"', b'"cut": "input"', 1),
    "a line twice": lambda d: d + d.splitlines(keepends=True)[0],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_journal_is_one_sentence(tmp_path, damage):
    run(tmp_path, trials=2)
    journal_in(tmp_path).write_bytes(damage(journal_in(tmp_path).read_bytes()))
    with pytest.raises(CoinferError, match=r"journal\.log is damaged; delete .*study and run again"):
        run(tmp_path, trials=2)


def test_a_line_of_the_journal_is_a_finished_trial(tmp_path):
    trials = trials_of(tmp_path, trials=5)
    lines = [json.loads(line) for line in journal_in(tmp_path).read_text().splitlines()]
    assert [line["number"] for line in lines] == [trial.number for trial in trials]
    assert lines[0]["measurement"]["total_ms"] == trials[0].measurement.total_ms


def test_two_searches_do_not_share_a_journal(tmp_path):
    options = {"journal_file": journal_in(tmp_path), "seed": 0, "trials": 2}
    searcher = searcher_of("random", seed=0)
    first = search(SPACE, searcher, InProcess(fake_measure), **options)
    next(first)
    with pytest.raises(CoinferError, match="another search is writing"):
        next(search(SPACE, searcher, InProcess(fake_measure), **options))
    first.close()
    next(search(SPACE, searcher, InProcess(fake_measure), **options))


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "study").write_text("in the way")
    with pytest.raises(CoinferError, match="cannot write"):
        run(tmp_path)


def test_running_out_of_memory_is_no_result_of_a_trial(tmp_path):
    def hungry(candidate, trial_seed, *, rescores):
        if candidate.kind == "split":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return fake_measure(candidate, trial_seed)

    with pytest.raises(CoinferError, match="ran out of memory"):
        run(tmp_path, measure=hungry)
    kept = journal_in(tmp_path).read_bytes()
    assert run(tmp_path) == run(tmp_path / "afresh")
    assert journal_in(tmp_path).read_bytes().startswith(kept)


class Backwards:
    """Three in flight, of which the latest is finished first; stops after `most`, as if killed."""

    workers = 3

    def __init__(self, most=10**6):
        self.jobs, self.left, self.seen = [], most, []

    def submit(self, job):
        assert len(self.jobs) < self.workers
        self.jobs.append(job)

    def next(self):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        job = self.jobs.pop()
        self.seen.append(job)
        return evaluate(fake_measure, job)

    def close(self):
        self.jobs.clear()


@pytest.mark.parametrize("method", ["tpe", "random"])
@pytest.mark.parametrize("most", [4, 11, 17])
def test_trials_in_flight_when_a_search_dies_are_all_that_is_lost(tmp_path, method, most):
    executors = Backwards(most), Backwards()
    with pytest.raises(KeyboardInterrupt):
        trials_of(tmp_path, method=method, executor=executors[0])
    found = trials_of(tmp_path, method=method, executor=executors[1])
    evaluated = [job.candidate for executor in executors for job in executor.seen]
    assert len(evaluated) == len(set(evaluated)) == 3 + 20
    assert sorted(trial.number for trial in found) == list(range(len(found)))
    if method == "random":
        assert sorted(found, key=lambda t: t.number) == trials_of(tmp_path / "afresh", method=method)


def test_a_proposal_of_what_is_in_flight_waits_for_it(tmp_path):
    class Stubborn:
        def ask(self, number):
            return SPACE.suggest(lambda name, choices: choices[number % 2 if name == "bits" else 1])

        def tell(self, trial):
            self.last = trial

    executor = Backwards()
    options = {"journal_file": journal_in(tmp_path), "seed": 0, "trials": 2}
    with closing(executor):
        trials = list(search(SPACE, Stubborn(), executor, **options))
    assert len(executor.seen) == 3 + 2
    by_number = {trial.number: trial for trial in trials}
    assert all(by_number[n].duplicate_of is None for n in (3, 4))
    assert [trial.number for trial in trials].index(3) < len(trials)
