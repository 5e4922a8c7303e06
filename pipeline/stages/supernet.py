"""supernet: what trials of the search start from, trained once: for each cut all its codecs, and one network that bears pruning."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.cutting import split
from pipeline.data import load_split
from pipeline.errors import Interrupted
from pipeline.files import atomic_directory
from pipeline.fingerprint import TRAINING_CODE, fingerprint
from pipeline.inference import outputs
from pipeline.params import Params
from pipeline.paths import BACKBONE_WEIGHTS, DATA_CARD, DevicePaths
from pipeline.search.candidate import OUTPUT
from pipeline.search.inputs import load_problem
from pipeline.search.supernet import SplitSupernet, prunable_cuts, weights_file
from pipeline.search.supernet_training import BodyLesson, Lesson, SplitLesson, Taught
from pipeline.training import History, checkpoint_folder, fit, forget, weights_bytes, write_curves

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

CODE = ("models/slimmable.py", "pipeline/networks.py", "pipeline/search/*.py", "pipeline/stages/supernet.py")


def run(params: Params, device: str, tracker: Tracker) -> dict[str, float]:
    """Write artifacts/DEVICE/supernet/ (CUT.safetensors for each cut with codecs, output.safetensors where something can be pruned, curves.csv).

    Returns the last loss of each training. With `supernet.epochs` 0 there is nothing to train, and each trial trains its own codec.

    Raises:
        CoinferError: an input is missing or does not fit, or a loss is not finite.
        Interrupted: Ctrl-C; finished trainings and epochs are kept.
    """
    torch.set_num_threads(params.run.threads)
    course = _Course(params, device, tracker)
    if params.supernet.epochs:
        course.run()
    losses = {name: rows[-1]["loss"] for name, rows in course.curves.items()}
    with atomic_directory(DevicePaths(device).supernet) as folder:
        for name, weights in course.weights.items():
            weights_file(folder, name).write_bytes(weights)
        write_curves(folder / "curves.csv", [{"training": name, **row} for name, rows in course.curves.items() for row in rows], ("training", "epoch", "loss"))
    forget(course.folders)
    tracker.log_metrics({f"loss_{name}": loss for name, loss in losses.items()})
    return losses


class _Course:
    """The trainings of one device, one after the other: each kept when finished, so that an interrupted stage goes on where it was."""

    def __init__(self, params: Params, device: str, tracker: Tracker) -> None:
        self.params, self.device, self.tracker = params, device, tracker
        self.problem, self.data = load_problem(params, device), load_split("train")
        self.folders: list[Path] = []
        self.weights: dict[str, bytes] = {}
        self.curves: dict[str, History] = {}
        self.inputs = [
            params.run.model_dump(),
            params.backbone.name,
            params.supernet.model_dump(),
            *(hashlib.sha256(path.read_bytes()).hexdigest() for path in (DATA_CARD, BACKBONE_WEIGHTS)),
            fingerprint([*TRAINING_CODE, *CODE], params.backbone.name),
        ]

    def run(self) -> None:
        problem, settings = self.problem, self.params.supernet
        prunable = prunable_cuts(problem)
        coded = [cut for cut in problem.space().codes if problem.specs(cut)]
        if not prunable and not coded:
            return
        known = outputs(problem.backbone, self.data[0])
        body = copy.deepcopy(problem.backbone) if prunable else None
        if body is not None:
            data = Taught(problem, self.data, known, settings, self.params.run.seed)
            self._fit(OUTPUT, BodyLesson(problem, body, prunable, settings), data, [{cut: dict(problem.legal_keep(cut)) for cut in prunable}])
        for cut in coded:
            torch.manual_seed(self.params.run.seed)
            network = SplitSupernet(problem, cut)
            head = split(copy.deepcopy(body), problem.example, cut)[0] if body is not None and cut in prunable else None
            data = Taught(problem, self.data, known, settings, self.params.run.seed, cut)
            self._fit(cut, SplitLesson(problem, cut, network, head, settings), data, [asdict(spec) for spec in problem.specs(cut)])

    def _fit(self, name: str, lesson: Lesson, data: Taught, further: list[Any]) -> None:
        def log(row: dict[str, float]) -> None:
            self.tracker.log_metrics({f"{name}_loss": row["loss"]}, step=int(row["epoch"]))

        before = hashlib.sha256(self.weights.get(OUTPUT, b"")).hexdigest()
        folder = checkpoint_folder(f"supernet-{self.device}", name, [*self.inputs, before, *further])
        try:
            self.curves[name] = fit(
                lesson,
                data,
                name=f"supernet {self.device}, {name}",
                epochs=self.params.supernet.epochs,
                checkpoint_dir=folder,
                threads=self.params.run.threads,
                precision=self.params.supernet.precision,
                log=log,
            )
        except Interrupted as error:
            kept = f" What came before it ({', '.join(self.weights)}) is finished and kept." if self.weights else ""
            raise Interrupted(f"{error}{kept}") from None
        self.folders.append(folder)
        self.weights[name] = weights_bytes(lesson.network)
