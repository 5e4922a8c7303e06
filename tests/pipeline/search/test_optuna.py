import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from pipeline.errors import CoinferError
from pipeline.search.optuna import Space, search
from tests.pipeline.search.fakes import LIMITS, SPACE, fake_measure, run

ROOT = Path(__file__).resolve().parents[3]


def rows_of(table):
    return list(csv.DictReader(io.StringIO(table)))


def journal_in(folder):
    return folder / "study" / "journal.log"


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_killed_search_goes_on_to_the_same_table(tmp_path, sampler):
    options = {"sampler": sampler, "trials": 20}
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


def test_a_kept_search_is_not_measured_again(tmp_path):
    def refuse(candidate, trial_seed):
        pytest.fail("measured again")

    assert run(tmp_path, trials=5) == run(tmp_path, trials=5, measure=refuse)


def test_more_trials_go_on_where_fewer_ended(tmp_path):
    fewer, more = run(tmp_path / "a", trials=8), run(tmp_path / "b", trials=16)
    assert [row["label"] for row in rows_of(fewer)] == [row["label"] for row in rows_of(more)][: len(rows_of(fewer))]
    assert run(tmp_path / "a", trials=16) == more
    assert run(tmp_path / "b", trials=8) == fewer


def test_another_seed_gives_another_search(tmp_path):
    assert run(tmp_path / "a", seed=1) != run(tmp_path / "b", seed=2)


def test_baselines_come_first(tmp_path):
    assert [row["label"] for row in rows_of(run(tmp_path, trials=4))][:3] == ["device-only", "WebP lossless", "WebP q50"]


def test_trials_are_evaluations_beyond_the_baselines_and_none_is_made_twice(tmp_path):
    seen = []

    def measure(candidate, trial_seed):
        seen.append(candidate)
        return fake_measure(candidate, trial_seed)

    rows = rows_of(run(tmp_path, trials=20, measure=measure))
    assert len(seen) == len(set(seen)) == 3 + 20
    reused = [row for row in rows if row["state"] == "reused"]
    assert reused
    for row in reused:
        original = rows[int(row["duplicate_of"])]
        assert (row["label"], row["keep"], row["accuracy"], row["total_ms"]) == tuple(original[key] for key in ("label", "keep", "accuracy", "total_ms"))


def test_a_failing_candidate_is_recorded_and_the_search_goes_on(tmp_path):
    rows = rows_of(run(tmp_path, trials=60))
    reasons = {row["failure"] for row in rows if row["state"] == "failed"}
    assert reasons == {"the fake runs out of luck", "accuracy came out as no finite number"}
    assert rows[-1]["number"] == str(len(rows) - 1)


def test_a_search_ends_when_the_space_is_used_up(tmp_path):
    small = Space(codes={"early": ((2,), (1,))}, bits=(1, 2), qualities=(50,), keep=lambda cut: {})
    found = list(search(small, fake_measure, LIMITS, journal=journal_in(tmp_path), seed=0, trials=10, sampler="tpe"))
    assert sum(trial.duplicate_of is None for trial in found) == 4


def test_only_legal_combinations_are_proposed(tmp_path):
    for row in rows_of(run(tmp_path, trials=30)):
        if row["cut"] == "early":
            assert int(row["code_channels"]) <= 4
            assert row["keep"] == "{}"
        if row["cut"] == "late":
            assert int(row["stride"]) <= 2
            assert "block2" not in row["keep"]


@pytest.mark.parametrize("cut_off", [1, 40, 400])
def test_a_journal_cut_short_by_a_power_cut_is_mended(tmp_path, cut_off):
    whole = run(tmp_path, trials=8)
    data = journal_in(tmp_path).read_bytes()
    journal_in(tmp_path).write_bytes(data[:-cut_off])
    assert run(tmp_path, trials=8) == whole
    assert journal_in(tmp_path).read_bytes().startswith(data[: data[:-cut_off].rfind(b"\n") + 1])


DAMAGES = [lambda d: d.replace(b'"accuracy"', b'"acc', 1), lambda d: b"\0" * 9 + d, lambda d: d.replace(b"device_ms", b"ms"), lambda d: b"7\n"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_one_sentence(tmp_path, damage):
    run(tmp_path, trials=2)
    journal_in(tmp_path).write_bytes(damage(journal_in(tmp_path).read_bytes()))
    with pytest.raises(CoinferError, match=r"journal\.log is damaged; delete .*study and run again"):
        run(tmp_path, trials=2)


def test_a_lock_left_by_a_killed_search_does_not_stop_the_next(tmp_path):
    run(tmp_path, trials=2)
    journal_in(tmp_path).with_name("journal.log.lock").symlink_to(journal_in(tmp_path))
    run(tmp_path, trials=3)


def test_two_searches_do_not_share_a_journal(tmp_path):
    options = {"journal": journal_in(tmp_path), "seed": 0, "trials": 2, "sampler": "tpe"}
    first = search(SPACE, fake_measure, LIMITS, **options)
    next(first)
    with pytest.raises(CoinferError, match="another search is writing"):
        next(search(SPACE, fake_measure, LIMITS, **options))


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "study").write_text("in the way")
    with pytest.raises(CoinferError, match="cannot write"):
        run(tmp_path)


def test_limits_reach_the_sampler_as_constraints(tmp_path):
    run(tmp_path, trials=5)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal_in(tmp_path))))
    device_only = optuna.load_study(study_name="search", storage=storage).trials[0]
    assert device_only.constraints["accuracy"] < 0
    assert device_only.constraints["memory"] == pytest.approx(1 / 5 - 1)


def test_running_out_of_memory_is_no_result_of_a_trial(tmp_path):
    def hungry(candidate, trial_seed):
        if candidate.kind == "split":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return fake_measure(candidate, trial_seed)

    with pytest.raises(CoinferError, match="ran out of memory"):
        run(tmp_path, measure=hungry)
    kept = journal_in(tmp_path).read_bytes()
    assert run(tmp_path) == run(tmp_path / "afresh")
    assert journal_in(tmp_path).read_bytes().startswith(kept)
