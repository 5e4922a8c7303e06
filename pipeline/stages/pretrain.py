"""pretrain: the unsplit backbone, trained or loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from models.backbones import build_backbone
from pipeline.data import load_card, load_split
from pipeline.distilling import Distiller, Ensemble
from pipeline.errors import ParamsError
from pipeline.files import atomic_write_bytes, atomic_write_json
from pipeline.fingerprint import TRAINING_CODE, fingerprint
from pipeline.inference import accuracy
from pipeline.params import Params, Pretrain
from pipeline.paths import BACKBONE_CURVES, BACKBONE_METRICS, BACKBONE_WEIGHTS
from pipeline.training import Classifier, DataModule, History, checkpoint_folder, fit, forget, weights_bytes, write_curves

if TYPE_CHECKING:
    from pipeline.tracking import Tracker


def run(params: Params, tracker: Tracker) -> dict[str, float]:
    """Write artifacts/backbone/{weights.safetensors, metrics.json, curves.csv} and return the metrics.

    Given weights are kept where training does not improve on them (top-1 on validation), so training never makes them worse.

    Raises:
        ParamsError: there is nothing to train and nothing to load.
        ModelError: the backbone is unknown or the weights do not fit.
        Interrupted: Ctrl-C; finished epochs are kept.
    """
    settings, given = params.pretrain, params.backbone.weights
    if not settings.epochs and given is None:
        raise ParamsError("params.yaml: pretrain.epochs is 0 and backbone.weights is null, so there is nothing to train or load; set one of them.")
    torch.set_num_threads(params.run.threads)
    card, train, validation = load_card(), load_split("train"), load_split("validation")
    torch.manual_seed(params.run.seed)
    network = build_backbone(params.backbone.name, card.num_classes, card.image_size, Path(given) if given else None)

    metrics: dict[str, float] = {"epochs": settings.epochs}
    start = weights_bytes(network)
    if given:
        metrics["accuracy_start"] = metrics["accuracy_validation"] = accuracy(network, validation)
    history: History = []
    folders = []
    if settings.epochs:
        inputs = [params.run.model_dump(), params.backbone.name, settings.model_dump(), card.sha256, hashlib.sha256(start).hexdigest()]
        code = fingerprint([*TRAINING_CODE, "pipeline/stages/pretrain.py"], params.backbone.name)
        teachers = [build_backbone(name, card.num_classes, card.image_size, Path(file)) for file, name in settings.teachers.items()]
        inputs += [hashlib.sha256(weights_bytes(teacher)).hexdigest() for teacher in teachers]
        folders = [checkpoint_folder("pretrain", "backbone", [*inputs, code])]
        history = fit(
            _lesson(network, teachers, settings),
            DataModule(train, validation, settings, params.run.seed),
            name="pretrain",
            epochs=settings.epochs,
            checkpoint_dir=folders[0],
            threads=params.run.threads,
            precision=settings.precision,
            log=lambda row: tracker.log_metrics({key: row[key] for key in row if key != "epoch"}, step=int(row["epoch"])),
        )
        metrics["accuracy_validation"] = max(accuracy(network, validation), metrics.get("accuracy_start", 0.0))
    improved = metrics["accuracy_validation"] > metrics.get("accuracy_start", -1.0)
    atomic_write_bytes(BACKBONE_WEIGHTS, weights_bytes(network) if improved else start)
    write_curves(BACKBONE_CURVES, history)
    atomic_write_json(BACKBONE_METRICS, metrics)
    forget(folders)
    tracker.log_metrics(metrics)
    return metrics


def _lesson(network: nn.Module, teachers: list[nn.Module], settings: Pretrain) -> Classifier:
    if not teachers:
        return Classifier(network, settings, settings.label_smoothing)
    return Distiller(network, Ensemble(teachers), settings, settings.label_smoothing)
