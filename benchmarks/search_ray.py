"""What many workers cost and bring: searches on a real Ray cluster of this machine; `benchmarks/search.py` runs this and writes the results."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.ray_cluster import NODES, ray_cluster
from benchmarks.ray_measures import meeting
from benchmarks.results_file import ROOT, figure
from benchmarks.surrogates import layered
from pipeline.params import Params, parse_params
from pipeline.paths import PARAMS, PROFILES
from pipeline.search.driver import search
from pipeline.search.executor import Job, Pool, Setup
from pipeline.search.inputs import load_problem
from pipeline.search.ray_fleet import RayFleet
from pipeline.search.simple import RandomSearcher
from pipeline.search.space import Space

DEVICE = "camera"
STAGES = ("prepare", "pretrain", "profile", "supernet")


@dataclass(frozen=True)
class Load:
    """So many evaluations of `sleep_ms` on each of `workers`, of one thread."""

    workers: int
    sleep_ms: float
    rounds: int

    @property
    def name(self) -> str:
        return f"w{self.workers}" if self.sleep_ms else f"w{self.workers} saturated"


# With 64 workers the sleep is longer, so that the driver, which has one core at most, waits for them and not they for it; without sleep it never waits.
LOADS = (Load(1, 200, 25), Load(4, 200, 25), Load(16, 500, 15), Load(64, 2000, 6), Load(64, 0, 10))
REPETITIONS = 5
TRIALS, PAIRS = 24, 3  # of real evaluations


def ray(loads: Sequence[Load] = LOADS, repetitions: int = REPETITIONS, trials: int = TRIALS, pairs: int = PAIRS) -> dict[str, Any]:
    """Wall-clock seconds of every search, without the start of its workers."""
    with ray_cluster(cpus=max(load.workers for load in loads) // NODES + 1) as address:
        overhead = {load.name: _slept(load, address, repetitions) for load in loads}
    with ray_cluster(cpus=1) as address:
        return {"overhead": overhead, "speedup": _evaluated(address, trials, pairs)}


def _slept(load: Load, address: str, repetitions: int) -> dict[str, Any]:
    space, evaluations = layered(0).space, load.workers * load.rounds
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"folder": folder, "workers": load.workers, "sleep_ms": load.sleep_ms}
        with closing(Pool(RayFleet(Setup("benchmarks.ray_measures:sleeping", arguments, 1), address), load.workers)) as pool:
            wall_s = [_searched(space, pool, Path(folder), number, evaluations - len(space.baselines()), evaluations) for number in range(repetitions)]
    return {"workers": load.workers, "sleep_ms": load.sleep_ms, "evaluations": evaluations, "wall_s": wall_s}


def _evaluated(address: str, trials: int, pairs: int) -> dict[str, Any]:
    """The same trials of the digits by one worker and by two, by turns; each trial trains its own codec."""
    wall_s: dict[str, list[float]] = {"1": [], "2": []}
    with tempfile.TemporaryDirectory(prefix="coinfer-bench-") as folder, chdir(folder):
        params = _prepared()
        space = load_problem(params, DEVICE).space()
        for number in range(pairs):
            for workers in (1, 2):
                arguments = {"folder": folder, "workers": workers, "params": params.model_dump(mode="json"), "device": DEVICE}
                with closing(Pool(RayFleet(Setup("benchmarks.ray_measures:real", arguments, 1), address), workers)) as pool:
                    spent = _searched(space, pool, Path(folder) / f"{number}-{workers}", 0, trials, trials + len(space.baselines()))
                    wall_s[str(workers)].append(spent)
    return {"trials": trials, "baselines": len(space.baselines()), "codec_steps": params.search.codec_steps, "wall_s": wall_s}


def _searched(space: Space, pool: Pool, folder: Path, seed: int, trials: int, evaluations: int) -> float:
    """Seconds of a random search, from when all workers of `pool` are up and idle."""
    folder.mkdir(exist_ok=True)
    for number in range(pool.workers):
        pool.submit(Job(-1 - number, *meeting(seed)))
    for _ in range(pool.workers):
        assert pool.next().failure is None
    start = time.perf_counter()
    found = list(search(space, RandomSearcher(space, seed=seed), pool, journal_file=folder / str(seed) / "journal.log", seed=seed, trials=trials))
    spent = time.perf_counter() - start
    measured = [trial for trial in found if trial.measurement is not None and trial.duplicate_of is None]
    assert len(measured) == evaluations, f"{len(measured)} of {evaluations} evaluations went well"
    return round(spent, 4)


def _prepared() -> Params:
    """The digits as far as the stage `search`, in the current directory, for one thread."""
    fields = yaml.safe_load((ROOT / PARAMS).read_text())
    fields["run"]["threads"] = 1
    fields["pretrain"]["epochs"] = 2  # how well it classifies does not matter here
    fields["supernet"]["epochs"] = 0
    fields["search"] |= {"method": "random", "workers": 1}
    PARAMS.write_text(yaml.safe_dump(fields))
    PROFILES.symlink_to(ROOT / PROFILES)
    environment = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "DVC_ROOT")} | {"PYTHONPATH": str(ROOT)}
    for stage in STAGES:
        subprocess.run([sys.executable, "-m", "pipeline.cli", stage], check=True, env=environment)
    return parse_params(fields)


def figures_of(raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, row in raw["overhead"].items():
        ideal_s = row["evaluations"] / row["workers"] * row["sleep_ms"] / 1e3
        each = [1e3 * (wall_s - ideal_s) / row["evaluations"] for wall_s in row["wall_s"]]
        of = f"random search of {row['evaluations']} evaluations on a local Ray cluster, {row['workers']} workers that"
        if row["sleep_ms"]:
            key, how = f"ray_overhead_ms_per_trial.{name}", f"(wall - ideal) / trials: {of} sleep {row['sleep_ms']:g} ms each; start-up not counted; median"
        else:
            key, how = f"ray_saturated_ms_per_trial.w{row['workers']}", f"wall / trials: {of} do nothing, so that the driver never waits; median"
        found[key] = figure(statistics.median(each), "ms", how, n=len(each), spread=(min(each), max(each)))
    known = raw["speedup"]
    one, two = (known["wall_s"][workers] for workers in ("1", "2"))
    how = f"{known['trials']} random trials of the digits, each training its codec for {known['codec_steps']} steps, and {known['baselines']} baselines, "
    how += "by one Ray worker of one thread over two; start-up not counted; ratio of medians, spread: of the pairs"
    ratios = [first / second for first, second in zip(one, two, strict=True)]
    found["ray_speedup_2"] = figure(statistics.median(one) / statistics.median(two), "x", how, n=len(ratios), spread=(min(ratios), max(ratios)))
    return found
