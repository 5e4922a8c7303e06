"""finetune: the chosen candidate trained for good, beside the unsplit backbone given the same extra epochs."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.backbones import build_backbone
from models.coinference import build_split
from models.cutting import CutPoint, split
from models.channel_plan import ChannelPlan
from pipeline.costs.device_profile import DeviceProfile
from pipeline.data import load_card, load_split
from pipeline.distilling import Distiller
from pipeline.errors import Interrupted
from pipeline.files import atomic_write_bytes, atomic_write_json, read_json
from pipeline.fingerprint import TRAINING_CODE, fingerprint
from pipeline.inference import accuracy
from pipeline.params import Params
from pipeline.paths import BACKBONE_WEIGHTS, DevicePaths
from pipeline.search.candidate import Candidate
from pipeline.search.evaluator import prune
from pipeline.training import DataModule, checkpoint_folder, fit, forget, weights_bytes, write_curves

if TYPE_CHECKING:
    from pipeline.tracking import Tracker


def run(params: Params, device: str, tracker: Tracker) -> dict[str, float]:
    """Write artifacts/DEVICE/finetune/ (split and reference weights, split.json, metrics.json, curves.csv) and return the metrics.

    The split is taught by the pretrained backbone. The reference is the better on validation of that backbone as pretrained and after as many
    further epochs by the same recipe, that teacher included, without a split, so that what a split loses is not hidden by what training longer gains.
    Split weights are the state dict of the `CoInference`; of a candidate without a codec, that of the (pruned) whole network.

    Raises:
        CoinferError: an input is missing or does not fit.
        Interrupted: Ctrl-C; a finished training and finished epochs are kept.
    """
    torch.set_num_threads(params.run.threads)
    paths, settings = DevicePaths(device), params.finetune
    candidate = Candidate.from_dict(read_json(paths.chosen, "the chosen candidate")["chosen"]["candidate"])
    card, train, validation = load_card(), load_split("train"), load_split("validation")
    pretrained = build_backbone(params.backbone.name, card.num_classes, card.image_size, BACKBONE_WEIGHTS).eval()
    data = DataModule(train, validation, settings, params.run.seed)
    inputs = [params.run.model_dump(), params.backbone.name, settings.model_dump(), params.pretrain.label_smoothing, card.sha256, _digest(BACKBONE_WEIGHTS)]
    code = fingerprint([*TRAINING_CODE, "pipeline/stages/finetune.py"], params.backbone.name)
    folders: list[Path] = []
    curves: list[dict[str, Any]] = []

    def trained(network: nn.Module, teacher: tuple[nn.Module, nn.Module], distill_feature: float, name: str, *further: str) -> nn.Module:
        def log(row: dict[str, float]) -> None:
            curves.append({"training": name, **row})
            tracker.log_metrics({f"{name}_{key}": row[key] for key in ("loss", "accuracy_validation")}, step=int(row["epoch"]))

        folder = checkpoint_folder(f"finetune-{device}", name, [*inputs, code, *further])
        try:
            fit(
                Distiller(
                    network,
                    teacher,
                    settings,
                    distill_logits=settings.distill_logits,
                    distill_feature=distill_feature,
                    temperature=settings.temperature,
                    label_smoothing=params.pretrain.label_smoothing,
                ),
                data,
                name=f"finetune {device}, {name}",
                epochs=settings.epochs,
                checkpoint_dir=folder,
                threads=params.run.threads,
                precision=settings.precision,
                log=log,
            )
        except Interrupted as error:
            raise Interrupted(f"{error} The training of the split is finished and kept." if folders else str(error)) from None
        folders.append(folder)
        return network

    example = torch.zeros(1, 3, card.image_size, card.image_size)
    student, plan = _student(pretrained, example, candidate, paths, params.run.seed)
    if student is not None:
        teacher = split(copy.deepcopy(pretrained), example, candidate.cut)
        feature = settings.distill_feature if candidate.kind == "split" else 0.0
        student = trained(student, teacher, feature, "split", candidate.to_json(), plan.to_json())
    further = trained(copy.deepcopy(pretrained), (nn.Identity(), copy.deepcopy(pretrained)), 0.0, "reference")
    metrics = {"accuracy_validation_pretrained": accuracy(pretrained, validation)}
    accuracy_further = accuracy(further, validation)
    better = accuracy_further > metrics["accuracy_validation_pretrained"]
    reference = further if better else pretrained
    metrics["accuracy_validation_reference"] = accuracy_further if better else metrics["accuracy_validation_pretrained"]
    metrics["accuracy_validation_split"] = metrics["accuracy_validation_reference"] if student is None else accuracy(student, validation)

    atomic_write_bytes(paths.split_weights, weights_bytes(reference if student is None else student))
    atomic_write_bytes(paths.reference_weights, weights_bytes(reference))
    spec = {"candidate": candidate.to_dict(), "plan": json.loads(plan.to_json()), "reference": "finetuned" if better else "pretrained"}
    atomic_write_json(paths.split_spec, spec)
    write_curves(paths.finetune_curves, curves, ("training", "epoch", "loss", "accuracy_validation"))
    atomic_write_json(paths.finetune_metrics, metrics)
    forget(folders)
    tracker.log_metrics(metrics)
    return metrics


def _student(backbone: nn.Module, example: Tensor, candidate: Candidate, paths: DevicePaths, seed: int) -> tuple[nn.Module | None, ChannelPlan]:
    """The network `candidate` describes, on `backbone`'s weights, and its plan; None where that is the backbone as it is."""
    if candidate.kind == "edge-only" or (candidate.kind == "device-only" and all(ratio == 1 for _, ratio in candidate.keep)):
        return None, ChannelPlan()
    rows = read_json(paths.cuts, "the list of cut points")
    cuts = [CutPoint.from_dict({field.name: row[field.name] for field in fields(CutPoint)}) for row in rows]
    pruned, plan = prune(backbone, example, cuts, candidate, DeviceProfile.load(paths.device_profile).channel_block)
    if candidate.kind == "device-only":
        return pruned, plan
    assert candidate.code_channels is not None
    assert candidate.stride is not None
    assert candidate.bits is not None
    torch.manual_seed(seed)
    return build_split(backbone, example, candidate.cut, candidate.code_channels, candidate.stride, candidate.bits, plan), plan


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
