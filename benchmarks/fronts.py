"""What the methods of search find on a trained network at as many evaluations; `benchmarks/search.py` runs this and writes the results.

A workplace of its own (.coinfer/benchmarks/search/NAME) holds what the stages leave; every search runs there through the product's driver and evaluator,
with one cache of evaluations for all, so what another search has measured already costs nothing. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from benchmarks.results_file import ROOT, figure
from pipeline.costs.link import wire_bytes
from pipeline.params import Params, parse_params
from pipeline.runtime.frame import OVERHEAD_BYTES
from pipeline.search.build import build_evaluator
from pipeline.search.candidate import OUTPUT, Candidate, Measurement
from pipeline.search.driver import search
from pipeline.search.evaluator import Evaluator
from pipeline.search.executor import InProcess
from pipeline.search.hypervolume import Box, hypervolume
from pipeline.search.limits import Limits
from pipeline.search.pareto import Trial, feasible, non_dominated
from pipeline.search.searcher import build_searcher

METHODS = ("random", "uniform", "tpe", "nsga2", "ddpg")
EVALUATIONS = 200
DEVICE = "camera"
LANES = 2

Raw = dict[str, Any]
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """A network to search for: the example it is an example of, and what its params.yaml is changed to."""

    name: str
    example: str
    changes: Fields

    @property
    def folder(self) -> Path:
        return ROOT / ".coinfer" / "benchmarks" / "search" / self.name


SEARCH = {
    "trials": EVALUATIONS,
    "rescored": 0,
    "keep": [0.5, 0.75, 1.0],
    "codecs": ["uniform", "rate"],
    "code_channels": [4, 8, 16],
    "strides": [1, 2, 4],
    "bits": [2, 3, 4],
    "rate_weights": [0.0005, 0.002],
}
# Where neither staying, sending the image nor splitting is best in everything.
LINK = {"memory_mb": 64.0, "link": {"rate_mbps": 0.2, "rtt_ms": 10}}
COMMON = {
    "supernet": {"epochs": 1},
    "search": {**SEARCH, "validation_images": 1000},
    "objective": {"max_accuracy_drop": 0.1},  # of what was trained in one epoch for all candidates, and is not fine-tuned yet
}
RESNET20 = Place("resnet20", "examples/cifar10", {"pretrain": {"epochs": 0, "teachers": {}}, "devices": {DEVICE: LINK}, **COMMON})
RESNET8 = Place(
    "resnet8",
    "examples/cifar10",
    {
        "backbone": {"name": "resnet8", "weights": None},
        "pretrain": {"epochs": 20, "learning_rate": 0.1, "teachers": {"weights/resnet20-cifar10jpeg.safetensors": "resnet20"}},
        "devices": {DEVICE: {**LINK, "slowdown": 120}},  # takes as long as ResNet-20 on the other
        **COMMON,
    },
)
PLACES = {place.name: place for place in (RESNET20, RESNET8)}


def prepared(place: Place) -> Params:
    """Run the stages before the search in the folder of `place`, unless they ran, and return its params."""
    source, folder = ROOT / place.example, place.folder
    folder.mkdir(parents=True, exist_ok=True)
    fields = _changed(yaml.safe_load((source / "params.yaml").read_text()), place.changes)
    text = yaml.safe_dump(fields, sort_keys=False)
    params = parse_params(fields)
    known = folder / "params.yaml"
    if known.exists() and known.read_text() != text:
        shutil.rmtree(folder)
        folder.mkdir()
    known.write_text(text)
    for name in ("data", "weights", "profiles"):
        if not (folder / name).exists() and (source / name).exists():
            (folder / name).symlink_to(source / name)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder / 'mlflow.db'}"
    artifacts = folder / "artifacts"
    stages = {
        "prepare": "data",
        "pretrain": "backbone",
        f"profile --device {DEVICE}": f"{DEVICE}/profile/edge.json",
        f"supernet --device {DEVICE}": f"{DEVICE}/supernet",
    }
    for stage, made in stages.items():
        if not (artifacts / made).exists():
            print(f"{place.name}: {stage}", file=sys.stderr, flush=True)
            before = _children_s()
            try:
                subprocess.run([sys.executable, "-m", "pipeline.cli", *stage.split()], cwd=folder, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            finally:
                took = folder / f"{stage.split()[0]}-seconds.json"  # of the processor, all interrupted runs together
                took.write_text(json.dumps((json.loads(took.read_text()) if took.exists() else 0.0) + _children_s() - before))
    return params


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def evaluators(place: Place) -> tuple[Evaluator, Evaluator]:
    """Of this process: on the images that trials see, and on the whole validation split. Torch then has one thread, and the process the place's folder."""
    return _evaluator(place.name, False), _evaluator(place.name, True)


def _changed(fields: Any, changes: Any) -> Any:
    if not isinstance(changes, dict) or not isinstance(fields, dict) or not changes:
        return changes
    return {**fields, **{key: _changed(fields.get(key), value) for key, value in changes.items()}}


class Shared:
    """Measurements by candidate, in a file that several processes share."""

    def __init__(self, path: Path, measure: Callable[[Candidate], Measurement]) -> None:
        self.measure = measure
        self.connection = sqlite3.connect(path, timeout=60, isolation_level=None)
        self.connection.execute("pragma journal_mode=wal")
        self.connection.execute("create table if not exists known (candidate text primary key, measurement text)")

    def __call__(self, candidate: Candidate, trial_seed: int, *, rescores: bool = False) -> Measurement:
        key = json.dumps(candidate.to_dict(), sort_keys=True)
        row = self.connection.execute("select measurement from known where candidate = ?", (key,)).fetchone()
        if row is not None:
            return Measurement(**json.loads(row[0]))
        found = self.measure(candidate)
        self.connection.execute("insert or replace into known values (?, ?)", (key, json.dumps(found.to_dict())))
        return found


@cache
def _evaluator(name: str, whole: bool) -> Evaluator:
    """Of the place `name`, in this process: on its validation images, or on the `whole` split."""
    place = PLACES[name]
    os.chdir(place.folder)
    torch.set_num_threads(1)
    fields = yaml.safe_load((place.folder / "params.yaml").read_text())
    if whole:
        fields["search"]["validation_images"] = None
    return build_evaluator(parse_params(fields), DEVICE)


def _limits(evaluator: Evaluator, params: Params) -> Limits:
    return Limits.of(params, DEVICE, evaluator.reference_accuracy, evaluator.costing.classes)


def _searched(name: str, method: str, seed: int) -> Raw:
    """One search: accuracy, ms, bytes of each evaluation in order, and the front on the whole validation split."""
    (evaluator, whole), folder = evaluators(PLACES[name]), PLACES[name].folder
    params = parse_params(yaml.safe_load((folder / "params.yaml").read_text()))
    settings = params.search.model_copy(update={"method": method})
    limits, space = _limits(evaluator, params), evaluator.problem.space()
    searcher = build_searcher(settings, space, evaluator.costing, limits, params.objective.minimize, seed=seed)
    measure = Shared(folder / "subset.db", lambda candidate: evaluator.measure(candidate, 0))
    journal = folder / "studies" / f"{method}-{seed}" / "journal.log"
    with closing(InProcess(measure)) as executor:
        trials = sorted(search(space, searcher, executor, journal_file=journal, seed=seed, trials=EVALUATIONS), key=lambda trial: trial.number)
    judge = Shared(folder / "whole.db", lambda candidate: whole.measure(candidate, 0))
    front = non_dominated(feasible(trials, limits), params.objective.minimize)
    baselines = len(space.baselines())
    searched = [trial for trial in trials if trial.number >= baselines and trial.duplicate_of is None]
    rescored = [Trial(trial.number, trial.candidate, judge(trial.candidate, 0)) for trial in front]
    return {
        "method": method,
        "seed": seed,
        "proposals": len(trials) - baselines,
        "failed": sum(trial.measurement is None for trial in searched),
        "baselines": [_point(trial) for trial in trials[:baselines]],
        "evaluations": [_point(trial) for trial in searched],
        "front": [[trial.candidate.label(), *_point(trial)] for trial in rescored],
    }


def _point(trial: Trial) -> list[float]:
    measured = trial.measurement
    return [] if measured is None else [measured.accuracy, round(measured.total_ms, 4), round(measured.wire_bytes, 2)]


def lanes_of_one_thread() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(LANES, mp_context=multiprocessing.get_context("spawn"))


def searched(place: Place, seeds: Sequence[int], methods: Sequence[str] = METHODS) -> Raw:
    """Every method with every seed, two searches at a time, the first seed of all methods first."""
    params = prepared(place)
    runs = []
    with lanes_of_one_thread() as lanes:
        for future in [lanes.submit(_searched, place.name, method, seed) for seed in seeds for method in methods]:
            runs.append(future.result())
            print(f"{place.name}: {runs[-1]['method']}, seed {runs[-1]['seed']}", file=sys.stderr, flush=True)
    evaluator, whole = evaluators(place)
    raw_bytes = wire_bytes(evaluator.problem.example.numel() + OVERHEAD_BYTES)
    device_only_ms = evaluator.costing.bound_ms(Candidate(OUTPUT))
    floors = [_limits(own, params).floor for own in (evaluator, whole)]
    return {"references": [[floor, device_only_ms, raw_bytes] for floor in floors], "runs": runs}


class Point(NamedTuple):
    """What the hypervolume asks of a measurement."""

    accuracy: float
    total_ms: float
    wire_bytes: float


def volumes(raw: Fields) -> dict[str, list[float]]:
    """Method -> the hypervolume of each seed's front on the whole validation split, the union of all fronts being what counts as best."""
    fronts = [(run["method"], [Point(*row[1:]) for row in run["front"]]) for run in raw["runs"]]
    box = _box(raw["references"][1], (point for _, front in fronts for point in front))
    return {method: [hypervolume(front, box) for own, front in fronts if own == method] for method in dict.fromkeys(own for own, _ in fronts)}


def courses(raw: Fields) -> dict[str, np.ndarray]:
    """Method -> (seeds, evaluations): the hypervolume after each evaluation, on the images that the searches saw."""
    runs = [(run["method"], [Point(*row) for row in run["baselines"]], [Point(*row) if row else None for row in run["evaluations"]]) for run in raw["runs"]]
    reference = raw["references"][0]
    box = _box(reference, (point for _, first, later in runs for point in (*first, *later) if point is not None and point.accuracy >= reference[0]))
    found: dict[str, list[list[float]]] = {}
    for method, first, later in runs:
        known, course = list(first), []
        for point in later:
            known += [] if point is None else [point]
            course.append(hypervolume(known, box))
        found.setdefault(method, []).append(course + [course[-1]] * (EVALUATIONS - len(course)))
    return {method: np.array(rows) for method, rows in found.items()}


def _box(reference: Sequence[float], points: Iterable[Point]) -> Box:
    floor, ms, sent = reference
    inside = [point for point in points if point.accuracy >= floor and point.total_ms <= ms and point.wire_bytes <= sent]
    return Box.around((floor, ms, sent), inside)


def figures(raw: Mapping[str, Raw]) -> Raw:
    """Of all places, the first of which has several seeds and gives the figures that are asked for."""
    found: Raw = {}
    for name, place in raw.items():
        main, fronts, progress = name == RESNET20.name, volumes(place), courses(place)
        end = "" if main else f".{name}"
        how = f"front after {EVALUATIONS} evaluations, judged on the whole validation split without fine-tuning; {name}"
        random = float(np.mean(fronts["random"]))
        for method, values in fronts.items():
            found[f"hypervolume.{method}{end}"] = figure(float(np.mean(values)), "", how, n=len(values), spread=(min(values), max(values)))
            if method != "random" and random > 0:
                ratios = [value / random for value in values]
                said = f"mean {how}, over the mean of random"
                found[f"hypervolume_ratio.{method}{end}"] = figure(float(np.mean(ratios)), "", said, n=len(ratios), spread=(min(ratios), max(ratios)))
        best = max((method for method in fronts if method != "random"), key=lambda method: float(np.mean(fronts[method])))
        goal = float(np.mean(progress["random"][:, -1]))
        needed = [int(np.argmax(row >= goal)) + 1 if row[-1] >= goal else EVALUATIONS + 1 for row in progress[best]]
        how = f"evaluations that {best} needs for the mean hypervolume of random after {EVALUATIONS}, on the images that trials see; {EVALUATIONS + 1}: never"
        found[f"evaluations_to_random200{end}"] = figure(float(np.median(needed)), "evaluations", how, n=len(needed), spread=(min(needed), max(needed)))
    return found
