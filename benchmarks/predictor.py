"""How well a profile foresees the time of pruned device halves that it was not measured with; `benchmarks/search.py` runs this and writes the results.

For each backbone a profile is measured here as `coinfer profile` does; then random candidates, as the search proposes them, are exported and timed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.results_file import figure
from models.backbones import build_backbone
from models.cutting import CutPoint, cut_points
from models.operations import macs, operations
from pipeline.costs.device_profile import DeviceProfile, Precision
from pipeline.costs.energy import board
from pipeline.costs.fused import kernel_calls
from pipeline.costs.link import Link
from pipeline.costs.measure import forget_kept, measure_profile, untrained
from pipeline.costs.measure_plan import MeasurePlan
from pipeline.inference import recalibrate
from pipeline.networks import split_network
from pipeline.onnx_export import export_onnx
from pipeline.params import Codec, Search
from pipeline.quantising import quantise
from pipeline.runtime.bench import LocalBench, ModelWork, Repeats
from pipeline.search.candidate import OUTPUT, Candidate
from pipeline.search.costing import Costing, Deployment, parameters
from pipeline.search.problem import Problem
from pipeline.search.simple import RandomSearcher

PROFILES = Path(__file__).resolve().parents[1] / "profiles"
BACKBONES = (("resnet20", 32), ("cifar_resnet18", 32), ("mobilenet_v3_small", 224))
CLASSES, SEED = 10, 1_000
HALVES: tuple[tuple[Precision, int], ...] = (("fp32", 24), ("int8", 8))
REPEATS, VISITS, AT_ONCE = Repeats(threads=1, rounds=2, repeats=10, warmup=2, job_ms=60), 4, 12
SPACE = Search(
    trials=1,
    codec_steps=1,
    train_images=1,
    keep=[0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0],
    code_channels=[2, 4, 8, 16],
    strides=[1, 2, 4],
    bits=[4],
    images={"webp": [90]},
)
MODELS = {  # of `errors`: what its figures are called, and what it is
    "predicted": ("predictor", "a profile measured with that backbone"),
    "shipped": ("predictor_shipped", "profiles/epyc.json, which of the backbones knows ResNet-20 alone"),
    "macs": ("macs_model", "a time in proportion to MACs, by the factor that suits each backbone and precision best"),
    "params": ("params_model", "a time in proportion to parameters, by the factor that suits each backbone and precision best"),
    "repeated": ("measurement_repeatability", "every second visit, as a word on the others"),
}

Raw = dict[str, Any]


@dataclass(frozen=True)
class Half:
    """One device half: what it was foreseen to take by the profile with its backbone and by the one of the repository, and what it took on each visit."""

    backbone: str
    precision: str
    candidate: dict[str, Any]
    macs: int
    params: int
    predicted_ms: float
    shipped_ms: float
    visits_ms: list[float]


def measured() -> Raw:
    """A profile for each backbone, then its unseen halves; the machine should do nothing else."""
    plan, bench = MeasurePlan.load(PROFILES / "measure.json"), LocalBench()
    shipped, rows = DeviceProfile.load(PROFILES / "epyc.json"), []
    for name, image_size in BACKBONES:
        model, example = untrained(name, CLASSES, image_size), torch.zeros(1, 3, image_size, image_size)
        cuts = cut_points(model, example)
        print(f"predictor: profile of {name}", file=sys.stderr, flush=True)
        profile = measure_profile(f"predictor-{name}", name, model, example, cuts, plan, bench)
        problem = problem_of(name, image_size, cuts, profile)
        made = list(_halves(problem, image_size, profile))
        random = np.random.default_rng(SEED)
        visits: list[list[float]] = [[] for _ in made]
        for _ in range(VISITS):
            order = random.permutation(len(made))
            for start in range(0, len(order), AT_ONCE):
                chosen = order[start : start + AT_ONCE]
                for index, samples in zip(chosen, bench.measure([ModelWork(made[index][2]) for index in chosen], REPEATS), strict=True):
                    visits[index].append(round(float(np.median(samples.ms)), 5))
        forget_kept(f"predictor-{name}", bench)
        costings = [_costing(problem, known) for known in (profile, shipped)]
        for (candidate, half, _), visited in zip(made, visits, strict=True):
            predicted, shipped_ms = (round(_half_ms(costing, candidate, image_size), 5) for costing in costings)
            work = macs(operations(half, example)), parameters(half)
            rows.append(asdict(Half(name, candidate.precision, candidate.to_dict(), *work, predicted, shipped_ms, visited)))
    return {"halves": rows}


def problem_of(name: str, image_size: int, cuts: Sequence[CutPoint], profile: DeviceProfile) -> Problem:
    """The backbone with random weights and the statistics of random images, so that no batch norm folds to nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build_backbone(name, CLASSES, image_size)
        images = torch.rand(16, 3, image_size, image_size) * 2 - 1
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
        with torch.no_grad():
            recalibrate([model], lambda: [model(images)])
    return Problem(model.eval(), cuts, SPACE, Codec(), profile.channel_block)


def _halves(problem: Problem, image_size: int, profile: DeviceProfile) -> Iterator[tuple[Candidate, nn.Module, bytes]]:
    """Distinct random split candidates with their device halves, none of which calls just the kernels of a run that the profile was fitted to."""
    known = {run.calls for run in profile.runs}
    searcher, number, images = RandomSearcher(problem.space(), seed=SEED), 0, [torch.randn(1, 3, image_size, image_size).numpy() for _ in range(4)]
    for precision, count in HALVES:
        found = 0
        while found < count:
            number += 1
            drawn = searcher.ask(number)
            if drawn.cut == OUTPUT:
                continue
            candidate = Candidate.from_dict(drawn.to_dict() | {"precision": precision})
            half = split_network(problem.backbone, problem.example, candidate, problem.plan(candidate.cut, dict(candidate.keep))).device_half().eval()
            calls = kernel_calls(operations(half, problem.example), precision, block=profile.nchwc_block)
            if tuple(calls) in known:
                continue
            known.add(tuple(calls))
            found += 1
            model = export_onnx(half, problem.example, input_name="image", output_name="symbols")
            yield candidate, half, quantise(model, images) if precision == "int8" else model


def _costing(problem: Problem, profile: DeviceProfile) -> Costing:
    return Costing(problem, Deployment(profile, profile, Link(1.0, 0.0), board("raspberry-pi-4")), CLASSES)


def _half_ms(costing: Costing, candidate: Candidate, image_size: int) -> float:
    """What the search counts for the device half alone."""
    return costing.measurement(candidate, 0.0, [], 0, 0, 0).device_ms - costing.deployment.device.image(image_size).preprocess.median_ms


def errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Absolute relative errors, one for each row: of the product, of what is proportional to MACs or parameters (the factor that suits the rows of each
    backbone and precision best), and of one half of the visits as a word on the other."""
    took = np.array([np.median(row["visits_ms"]) for row in rows])
    first, second = (np.array([np.median(row["visits_ms"][start::2]) for row in rows]) for start in (0, 1))
    groups = [(row["backbone"], row["precision"]) for row in rows]
    found = {name: np.array([row[f"{name}_ms"] for row in rows]) / took - 1 for name in ("predicted", "shipped")} | {"repeated": second / first - 1}
    for name in ("macs", "params"):
        ratio = took / np.array([row[name] for row in rows])
        best = {group: np.median([value for value, own in zip(ratio, groups, strict=True) if own == group]) for group in groups}
        found[name] = np.array([best[group] for group in groups]) / ratio - 1
    return {name: np.abs(values) for name, values in found.items()}


def figures(raw: Raw) -> Raw:
    """The figures of issue "Search at full strength"; each over all halves, and by backbone and precision beside."""
    rows = raw["halves"]
    found: Raw = {}
    kinds = sorted({(row["backbone"], row["precision"]) for row in rows})
    missed = errors(rows)
    for model, (key, how) in MODELS.items():
        low, median, high, worse = (float(value) for value in np.percentile(missed[model], [25, 50, 75, 90]))
        found[f"{key}_mdape"] = figure(100 * median, "%", f"median absolute error of {how}", n=len(rows), spread=(100 * low, 100 * high))
        found[f"{key}_p90ape"] = figure(100 * worse, "%", f"nine tenths of the halves are foreseen better, by {how}", n=len(rows))
        for backbone, precision in kinds:
            own = missed[model][[(row["backbone"], row["precision"]) == (backbone, precision) for row in rows]]
            middle, most = (float(100 * value) for value in np.percentile(own, [50, 90]))
            found[f"{key}_mdape.{backbone}.{precision}"] = figure(middle, "%", f"median absolute error of {how}", n=len(own), spread=(0.0, most))
    return found | {"measurement_repeatability": found["measurement_repeatability_mdape"]}
