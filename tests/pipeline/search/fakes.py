"""A small search space and searches over it, for tests of searchers, driver and workers alone."""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.params import Search
from pipeline.search.candidate import Candidate
from pipeline.search.driver import search
from pipeline.search.executor import Executor, InProcess, Measure, Pool, Setup
from pipeline.search.layer import Layer
from pipeline.search.limits import Limits
from pipeline.search.pareto import Trial, trials_csv
from pipeline.search.processes import ProcessFleet
from pipeline.search.searcher import Searcher, build_searcher
from pipeline.search.space import Space
from tests.pipeline.search.fake_measures import fake_measure, slow

METHODS = ("tpe", "nsga2", "random", "uniform", "ddpg")
LIMITS = Limits(floor=0.7, memory_mb=5)
HALF = {"stem": (0.5, 1.0), "block1": (0.0, 1.0), "block1.conv1": (0.25, 0.5, 1.0)}
SPACE = Space(
    codes={"early": ((2, 4), (1, 2, 4)), "late": ((2, 4, 8), (1, 2))},
    bits=(1, 2, 4),
    images=(("webp", 100), ("webp", 50)),
    keep=lambda cut: {"early": {}, "late": HALF, "output": {**HALF, "block2.conv1": (0.5, 1.0)}}[cut],
    inside=lambda cut: {"block1": {"block1.conv1"}} if cut != "early" else {},
)
SEVERAL = replace(SPACE, codecs=("uniform", "rate", "multi-rate", "jscc-awgn"), rate_weights=(0.1, 0.2), points=((1.0, 4), (0.5, 2)))


class Costs:
    """What the agent asks of a space, without order or budget."""

    def __init__(self, space: Space) -> None:
        self.space = space

    def layers(self, cut: str) -> list[Layer]:
        return [Layer(name, "conv", 8, 8, 1, 3, 576, 1000) for name in self.space.keep(cut)]

    def feature_shape(self, cut: str) -> tuple[int, ...]:
        return (8, 4, 4)

    def bound_ms(self, candidate: Candidate) -> float:
        return 100.0


def searcher_of(method: str, space: Space = SPACE, *, seed: int, trials: int = 20) -> Searcher:
    nothing = {"codec_steps": 1, "train_images": 1, "keep": [1.0], "code_channels": [1], "strides": [1], "bits": [1], "images": {"webp": [100]}}
    return build_searcher(Search(method=method, trials=trials, **nothing), space, Costs(space), LIMITS, "latency_ms", seed=seed)


def run(folder: Path, *, measure: Measure = fake_measure, executor: Executor | None = None, **changes: Any) -> str:
    """Search to the end and give the table."""
    trials = list(trials_of(folder, measure=measure, executor=executor, **changes))
    return trials_csv(sorted(trials, key=lambda trial: trial.number), LIMITS)


def trials_of(folder: Path, *, measure: Measure = fake_measure, executor: Executor | None = None, space: Space = SPACE, **changes: Any) -> list[Trial]:
    """Search to the end and give the trials in the order in which they finished."""
    options = {"seed": 3, "trials": 20, "method": "tpe"} | changes
    searcher = searcher_of(options.pop("method"), space, seed=options["seed"], trials=options["trials"])
    with closing(executor or InProcess(measure)) as open_executor:
        return list(search(space, searcher, open_executor, journal_file=journal_in(folder), **options))


def journal_in(folder: Path) -> Path:
    return folder / "study" / "journal.log"


def setup(factory: str, **arguments: Any) -> Setup:
    return Setup(f"tests.pipeline.search.fake_measures:{factory}", arguments, 1)


def processes(workers: int, factory: str = "plain", **arguments: Any) -> tuple[Pool, ProcessFleet]:
    fleet = ProcessFleet(setup(factory, **arguments))
    return Pool(fleet, workers), fleet


if __name__ == "__main__":  # searches slowly, to be killed
    given = json.loads(sys.argv[2])
    folder = Path(sys.argv[1])
    workers = given.pop("workers", 1)
    executor = processes(workers, "slow", seconds=0.1, log=given.pop("log"))[0] if workers > 1 else None
    print(os.getpid(), flush=True)
    run(folder, measure=slow(0.05), executor=executor, **given)
