"""What the workers of `benchmarks/search_ray.py` evaluate with; light to import, since 64 of them do on one machine."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from pipeline.search.candidate import OUTPUT, Candidate, Measurement
from pipeline.search.executor import Measure

MEET = 2**32  # trial seeds from here on, which no search gives, are rooms to meet the other workers in
PATIENCE_S = 300


def sleeping(folder: str, workers: int, sleep_ms: float) -> Measure:
    """Evaluations that sleep and measure nothing."""
    numbers = Measurement(**dict.fromkeys(Measurement.__dataclass_fields__, 1))

    def measure(candidate: Candidate, trial_seed: int, *, rescores: bool = False) -> Measurement:
        if trial_seed >= MEET:
            _meet(Path(folder) / str(trial_seed), workers)
        else:
            time.sleep(sleep_ms / 1e3)
        return numbers

    return measure


def real(folder: str, workers: int, **setup: Any) -> Measure:
    """The evaluator of the stage `search`; a meeting begins with an evaluation, which fills its caches."""
    from pipeline.search.build import build_measure  # torch, which workers that sleep do without

    evaluated = build_measure(**setup)

    def measure(candidate: Candidate, trial_seed: int, *, rescores: bool = False) -> Measurement:
        measured = evaluated(candidate, trial_seed, rescores=rescores)
        if trial_seed >= MEET:
            _meet(Path(folder) / str(trial_seed), workers)
        return measured

    return measure


def meeting(number: int) -> tuple[Candidate, int]:
    """The candidate and seed of a job that ends once every worker holds one such job, so that all of them are up."""
    return Candidate(OUTPUT), MEET + number


def _meet(room: Path, workers: int) -> None:
    room.mkdir(exist_ok=True)
    (room / str(os.getpid())).touch()
    deadline = time.monotonic() + PATIENCE_S
    while (here := len(list(room.iterdir()))) < workers:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{here} of {workers} workers started within {PATIENCE_S} s")
        time.sleep(0.02)
