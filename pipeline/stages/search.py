"""search: which cut, pruning and codec; measured candidates, their Pareto set, and the chosen one."""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from pipeline.costs.link import wire_bytes
from pipeline.errors import Interrupted
from pipeline.files import atomic_write_json, atomic_write_text
from pipeline.fingerprint import fingerprint
from pipeline.params import Params
from pipeline.paths import BACKBONE_WEIGHTS, DATA_CARD, STUDIES, DevicePaths
from pipeline.runtime.frame import OVERHEAD_BYTES
from pipeline.search.build import build_evaluator, build_executor, threads_of
from pipeline.search.ddpg import DdpgSearcher
from pipeline.search.driver import search
from pipeline.search.figure import hypervolume_figure, importance_figure, learning_figure, pareto_figure
from pipeline.search.foresight import refuse_the_impossible
from pipeline.search.importances import importances, importances_csv
from pipeline.search.limits import Limits
from pipeline.search.pareto import Trial, baselines, feasible, non_dominated, objectives, point, trials_csv
from pipeline.search.progress import LiveTable, Progress, counted, learning_csv, progress_csv
from pipeline.search.rescoring import choose_settled, rescored
from pipeline.search.searcher import build_searcher

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
    """Write trials.csv, pareto.json, chosen.json, progress.csv, importances.csv and learning.csv of `device` and return what chosen.json holds.

    Raises:
        CoinferError: an input is missing, a baseline failed, or no candidate is within the limits.
        Interrupted: Ctrl-C; finished trials are kept.
    """
    settings, paths, minimize = params.search, DevicePaths(device), params.objective.minimize
    torch.set_num_threads(threads_of(params))
    evaluator = build_evaluator(params, device)
    limits = Limits.of(params, device, evaluator.reference_accuracy, evaluator.costing.classes)
    journal = STUDIES / _study_key(params, device, limits) / "journal.log"

    space = evaluator.problem.space()
    for remark in evaluator.problem.remarks():
        print(f"search {device}: of {params.backbone.name}, {remark}", file=sys.stderr)
    refuse_the_impossible(space, evaluator.costing, limits)
    searcher = build_searcher(settings, space, evaluator.costing, limits, minimize, seed=params.run.seed)
    raw_bytes = wire_bytes(evaluator.problem.example.numel() + OVERHEAD_BYTES)
    progress = Progress(limits, minimize, raw_bytes, len(space.baselines()))
    trials: list[Trial] = []
    try:
        with closing(build_executor(params, device, evaluator.measure)) as executor:
            with LiveTable(f"search {device}", progress, settings.trials, executor) as table:
                for trial in search(space, searcher, executor, journal_file=journal, seed=params.run.seed, trials=settings.trials):
                    trials.append(trial)
                    point_now = progress.tell(trial)
                    table.update()
                    if point_now.best is not None:
                        tracker.log_metrics({f"best_{minimize}": point_now.best, "hypervolume": point_now.hypervolume}, step=trial.number)
            trials.sort(key=lambda trial: trial.number)  # several workers finish in another order
            history = Progress(limits, minimize, raw_bytes, len(space.baselines())).history(trials)
            options: dict[str, Any] = {"seed": params.run.seed, "kept": journal.with_name("rescored.json")}
            again = rescored(tuple(trials), limits, minimize, settings.rescored, executor, evaluator.is_estimate, **options)
            trials.extend(counted(again, f"search {device}: rescoring", settings.rescored))
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
    front = non_dominated(feasible(trials, limits), minimize)
    if chosen not in front:  # an estimate may look better than what was measured again
        front.append(chosen)
    chosen_point = point(chosen, limits)
    common = {"reference_accuracy": evaluator.reference_accuracy, "floor": limits.floor}
    summary = {"chosen": chosen_point, "device_only": point(device_only, limits), "edge_only": point(edge_only, limits), **common}
    atomic_write_text(paths.trials, trials_csv(trials, limits))
    atomic_write_json(
        paths.pareto,
        {"objectives": objectives(minimize), "memory_mb": limits.memory_mb, **common, "chosen": chosen.number, "points": [point(t, limits) for t in front]},
    )
    atomic_write_json(paths.chosen, summary)
    atomic_write_text(paths.progress, progress_csv(history))
    shares = importances(trials, space, params.run.seed)
    atomic_write_text(paths.importances, importances_csv(shares))
    learned = searcher.history if isinstance(searcher, DdpgSearcher) else []
    atomic_write_text(paths.learning, learning_csv(learned))

    tracker.log_params({"chosen": chosen.candidate.label()})
    tracker.log_metrics({**common, **{f"chosen_{name}": value for name, value in chosen_point["measurement"].items()}})
    tracker.log_figure(pareto_figure(trials, limits, chosen, [device_only, edge_only], device), "pareto.png")
    tracker.log_figure(hypervolume_figure(history, device, settings.method), "hypervolume.png")
    if shares:
        tracker.log_figure(importance_figure(shares, device), "importances.png")
    if learned:
        tracker.log_figure(learning_figure(learned, device), "learning.png")
    for path in (paths.trials, paths.pareto, paths.chosen, paths.progress, paths.importances, paths.learning):
        tracker.log_file(path)
    for trial in front:
        found = point(trial, limits)
        with tracker.child(f"trial {trial.number}: {trial.candidate.label()}") as child:
            child.log_params(found["candidate"])
            child.log_metrics(found["measurement"])
    return summary


def _study_key(params: Params, device: str, limits: Limits) -> str:
    """Names all that trials depend on and their method reads, so not what is chosen from them, nor how many there are, which `ddpg` alone plans for."""
    settings, paths = params.search, DevicePaths(device)
    unread = {"rescored", "executor", "workers", "ray_address"} | ({"trials", "ddpg"} if settings.method != "ddpg" else set())
    learns_from: list[Any] = [] if settings.method in ("random", "uniform") else [asdict(limits)]
    if settings.method in ("tpe", "nsga2"):
        learns_from.append(list(objectives(params.objective.minimize)))
    supernet = sorted(paths.supernet.glob("*.safetensors"))
    inputs = (DATA_CARD, BACKBONE_WEIGHTS, paths.cuts, paths.device_profile, paths.edge_profile, *supernet)
    known = {
        "run": [params.run.seed, threads_of(params)],
        "backbone": params.backbone.name,
        "device": [device, params.device(device).model_dump(include={"link", "power"})],
        "search": settings.model_dump(exclude=unread),
        "codec": params.codec.model_dump(),
        "learns from": learns_from,
        "files": {path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs},
        "code": fingerprint(CODE, params.backbone.name),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
