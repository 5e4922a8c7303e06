"""search: which cut, pruning and codec; measured candidates, their Pareto set, and the chosen one."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.costs.device_profile import DeviceProfile, backbone_key
from pipeline.costs.link import Link
from pipeline.data import load_card, load_split
from pipeline.errors import Interrupted
from pipeline.files import atomic_write_json, atomic_write_text
from pipeline.fingerprint import fingerprint
from pipeline.params import Params
from pipeline.paths import BACKBONE_WEIGHTS, DATA_CARD, STUDIES, DevicePaths
from pipeline.search.costing import Deployment
from pipeline.search.evaluator import Evaluator
from pipeline.search.figure import pareto_figure
from pipeline.search.inputs import load_problem
from pipeline.search.optuna import search
from pipeline.search.pareto import MEASURED, OBJECTIVES, Limits, Trial, baselines, cheapest, feasible, non_dominated, point, trials_csv
from pipeline.search.rescoring import choose_settled, rescored
from pipeline.search.supernet import Supernet

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

CODE = (
    "models/*.py",
    "pipeline/costs/*.py",
    "pipeline/data.py",
    "pipeline/inference.py",
    "pipeline/losses.py",
    "pipeline/networks.py",
    "pipeline/runtime/*.py",
    "pipeline/search/*.py",
    "pipeline/stages/search.py",
)


def run(params: Params, device: str, tracker: Tracker) -> dict[str, Any]:
    """Write trials.csv, pareto.json and chosen.json of `device` and return what chosen.json holds.

    Raises:
        CoinferError: an input is missing, a baseline failed, or no candidate is within the limits.
        Interrupted: Ctrl-C; finished trials are kept.
    """
    torch.set_num_threads(params.run.threads)
    settings, target, paths, minimize = params.search, params.device(device), DevicePaths(device), params.objective.minimize
    evaluator = _evaluator(params, device)
    limits = Limits(evaluator.reference_accuracy - params.objective.max_accuracy_drop, target.memory_mb)
    journal = STUDIES / _study_key(params, device) / "journal.log"

    space = evaluator.problem.space()
    for remark in evaluator.problem.remarks():
        print(f"search {device}: of {params.backbone.name}, {remark}", file=sys.stderr)
    trials: list[Trial] = []
    proposals = search(space, evaluator.measure, limits, journal=journal, seed=params.run.seed, trials=settings.trials, sampler=settings.sampler)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[best]}"), TimeRemainingColumn()
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
            task = bar.add_task(f"search {device}", total=len(space.baselines()) + settings.trials, best="")
            for trial in proposals:
                trials.append(trial)
                good = feasible(trials, limits)
                if good:
                    best = cheapest(good, minimize)
                    value = getattr(best.measurement, MEASURED[minimize])
                    bar.update(task, best=f"best {best.candidate.label()}: {minimize} {value:.4g}")
                    tracker.log_metrics({f"best_{minimize}": value}, step=trial.number)
                bar.update(task, advance=int(trial.duplicate_of is None))
            bar.update(task, description=f"search {device}, training the best")
            again = rescored(
                tuple(trials),
                limits,
                minimize,
                settings.rescored,
                evaluator.rescore,
                evaluator.is_estimate,
                seed=params.run.seed,
                kept=journal.with_name("rescored.json"),
            )
            trials.extend(again)
    except KeyboardInterrupt:
        raise Interrupted(f"search {device} was interrupted: {len(trials)} trials are kept in {journal}; `dvc repro` goes on from there.") from None

    chosen = choose_settled(trials, limits, minimize, evaluator.is_estimate)
    device_only, edge_only = baselines(trials, limits, minimize)
    if chosen.measurement is not None and not limits.allow(chosen.measurement):
        print(
            f"search {device}: none of the rescored candidates keeps accuracy {limits.floor:.4f}; {chosen.candidate.label()} comes nearest with "
            f"{chosen.measurement.accuracy:.4f} and is chosen, since fine-tuning is still to come.",
            file=sys.stderr,
        )
    front = non_dominated(feasible(trials, limits))
    if chosen not in front:  # an estimate may look better than what was measured again
        front.append(chosen)
    chosen_point = point(chosen, limits)
    common = {"reference_accuracy": evaluator.reference_accuracy, "floor": limits.floor}
    summary = {"chosen": chosen_point, "device_only": point(device_only, limits), "edge_only": point(edge_only, limits), **common}
    atomic_write_text(paths.trials, trials_csv(trials, limits))
    atomic_write_json(
        paths.pareto, {"objectives": OBJECTIVES, "memory_mb": limits.memory_mb, **common, "chosen": chosen.number, "points": [point(t, limits) for t in front]}
    )
    atomic_write_json(paths.chosen, summary)

    tracker.log_params({"chosen": chosen.candidate.label()})
    tracker.log_metrics({**common, **{f"chosen_{name}": value for name, value in chosen_point["measurement"].items()}})
    tracker.log_figure(pareto_figure(trials, limits, chosen, [device_only, edge_only], device), "pareto.png")
    for path in (paths.trials, paths.pareto, paths.chosen):
        tracker.log_file(path)
    for trial in front:
        found = point(trial, limits)
        with tracker.child(f"trial {trial.number}: {trial.candidate.label()}") as child:
            child.log_params(found["candidate"])
            child.log_metrics(found["measurement"])
    return summary


def _evaluator(params: Params, device: str) -> Evaluator:
    paths, target = DevicePaths(device), params.device(device)
    problem = load_problem(params, device)
    profiles = DeviceProfile.load(paths.device_profile), DeviceProfile.load(paths.edge_profile)
    deployment = Deployment(backbone_key(params.backbone.name, load_card().image_size), *profiles, Link(target.link.rate_mbps, target.link.rtt_ms))
    supernet = Supernet.load(problem, paths.supernet)
    return Evaluator(problem, load_split("train"), load_split("validation"), deployment, params.run.seed, supernet)


def _study_key(params: Params, device: str) -> str:
    """Names all that a trial's outcome depends on, so not how many there are nor what is chosen from them: more trials go on with the same study."""
    paths = DevicePaths(device)
    supernet = sorted(paths.supernet.glob("*.safetensors"))
    inputs = (DATA_CARD, BACKBONE_WEIGHTS, paths.cuts, paths.device_profile, paths.edge_profile, *supernet)
    known = {
        "run": params.run.model_dump(),
        "backbone": params.backbone.name,
        "device": [device, params.device(device).memory_mb, params.device(device).link.model_dump()],
        "search": params.search.model_dump(exclude={"trials", "rescored"}),
        "codec": params.codec.model_dump(),
        "max_accuracy_drop": params.objective.max_accuracy_drop,
        "files": {path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs},
        "code": fingerprint(CODE, params.backbone.name),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
