"""What trainings side by side share: the teacher's answers, and turns."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.three_step_training import Remembered, alone


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5))


def batch(seed: int) -> Tensor:
    return torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


def test_what_a_teacher_answered_is_found_by_the_next_training(tmp_path: Path) -> None:
    first = Remembered(linear(0), tmp_path)
    with torch.no_grad():
        answers = [first(batch(seed)) for seed in range(2)]
    first.keep()
    other = Remembered(linear(1), tmp_path)  # would answer otherwise if it were asked
    with torch.no_grad():
        assert all(torch.equal(other(batch(seed)), answer) for seed, answer in enumerate(answers))
        fresh = other(batch(2))
    assert not torch.equal(fresh, first(batch(2)))


def test_a_teacher_looks_for_what_a_training_side_by_side_has_kept_meanwhile(tmp_path: Path) -> None:
    ours, theirs = Remembered(linear(0), tmp_path), Remembered(linear(1), tmp_path)
    with torch.no_grad():
        ours(batch(0))
        answer = theirs(batch(1))
        theirs.keep()
        assert torch.equal(ours(batch(1)), answer)


def _add_one(file: Path, times: int, both_there: Barrier) -> None:
    os.chdir(file.parent)
    both_there.wait()
    for _ in range(times):
        with alone("number"):
            file.write_text(str(int(file.read_text()) + 1))


def test_of_two_that_want_the_same_one_waits(tmp_path: Path) -> None:
    number = tmp_path / "number"
    number.write_text("0")
    spawned = multiprocessing.get_context("spawn")
    both_there = spawned.Barrier(2)
    both = [spawned.Process(target=_add_one, args=(number, 500, both_there)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert number.read_text() == "1000"
