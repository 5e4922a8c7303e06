"""finetune: the chosen candidate trained for good, beside the unsplit backbone given the same extra epochs."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from models.backbones import build_backbone
from models.baseline_codecs import RawByteCodec
from models.channel_plan import ChannelPlan, rebuild
from models.codec import CodecSpec, RateCodec
from models.coinference import CoInference, build_split
from models.cutting import CutPoint, split
from models.jscc import ChannelCodec
from pipeline.course import Course
from pipeline.data import Sent, Split, load_card, load_split
from pipeline.files import atomic_write_bytes, atomic_write_json, read_json
from pipeline.inference import accuracy, outputs, recalibrated
from pipeline.networks import pruner, split_network
from pipeline.params import Params
from pipeline.paths import BACKBONE_WEIGHTS, DevicePaths
from pipeline.runtime.images import LOSSLESS
from pipeline.search.candidate import Candidate
from pipeline.soft_pruning import SoftPruning
from pipeline.training import forget, weights_bytes, write_curves

if TYPE_CHECKING:
    from pipeline.tracking import Tracker

NOISE_LEVELS = 5


def run(params: Params, device: str, tracker: Tracker) -> dict[str, float]:
    """Write artifacts/DEVICE/finetune/ (split and reference weights, split.json, metrics.json, curves.csv) and return the metrics.

    A chosen split is made in up to three trainings, each taught by the pretrained backbone (METHODS 2 and 3): `prune`, the unsplit network with ever
    more channels of the device half silenced; `frozen`, codec and edge half behind the frozen device half; `split`, all. The network of a chosen lossy
    edge-only candidate is trained on compressed images, taught by what that backbone makes of the images themselves, and kept if that made it better.
    The reference is the better on validation of the backbone as pretrained and after the split's epochs, phase by phase and by the same recipe, that
    teacher included, but with nothing pruned and no codec, so that what a split loses is not hidden by what training longer gains. Split weights are the
    state dict of the `CoInference`; of a candidate without a codec, that of the whole. Codec `rate` is trained to cost what it did in the search, where
    it was trained for less: with the same weight on bits it would go on to spend fewer of them than the accuracy can bear.

    Raises:
        CoinferError: an input is missing or does not fit.
        Interrupted: Ctrl-C; a finished training and finished epochs are kept.
    """
    torch.set_num_threads(params.run.threads)
    paths = DevicePaths(device)
    chosen = read_json(paths.chosen, "the chosen candidate")["chosen"]
    candidate = Candidate.from_dict(chosen["candidate"])
    promised_bits = float(chosen["measurement"]["payload_bits"])
    card, validation = load_card(), load_split("validation")
    pretrained = build_backbone(params.backbone.name, card.num_classes, card.image_size, BACKBONE_WEIGHTS).eval()
    course = Course(params, device, tracker, pretrained, [card.sha256, candidate.to_dict(), promised_bits])
    example = torch.zeros(1, 3, card.image_size, card.image_size)
    student, plan = _student(course, candidate, promised_bits, paths, example)
    further = _reference(course, candidate, plan, example)

    metrics = {"accuracy_validation_pretrained": accuracy(pretrained, validation)}
    accuracy_further = accuracy(further, validation)
    better = accuracy_further > metrics["accuracy_validation_pretrained"]
    reference = further if better else pretrained
    metrics["accuracy_validation_reference"] = accuracy_further if better else metrics["accuracy_validation_pretrained"]
    view = _view(candidate) or (lambda images: images)
    seen = view(validation[0]), validation[1]
    if candidate.kind == "edge-only" and student is not None and accuracy(student, seen) <= accuracy(reference, seen):
        student = None
    if isinstance(student, CoInference) and isinstance(student.codec, ChannelCodec):
        metrics |= _over_noise(student, student.codec, validation, params.run.seed)
    else:
        metrics["accuracy_validation_split"] = accuracy(reference if student is None else student, seen)

    atomic_write_bytes(paths.split_weights, weights_bytes(reference if student is None else student))
    atomic_write_bytes(paths.reference_weights, weights_bytes(reference))
    spec = {"candidate": candidate.to_dict(), "plan": json.loads(plan.to_json()), "reference": "finetuned" if better else "pretrained"}
    atomic_write_json(paths.split_spec, spec)
    write_curves(paths.finetune_curves, course.curves, ("training", "epoch", "loss", "accuracy_validation"))
    atomic_write_json(paths.finetune_metrics, metrics)
    forget([*course.folders, *course.features])
    tracker.log_metrics(metrics)
    return metrics


def _over_noise(network: CoInference, codec: ChannelCodec, validation: Split, seed: int) -> dict[str, float]:
    """Channel uses of an image and accuracy at noise levels from the least to the largest trained for; that of the middle one stands for the split."""
    metrics = {"channel_uses": float(codec.channel_uses)}
    levels = np.geomspace(*codec.spec.noise, NOISE_LEVELS)
    for number, level in enumerate(levels):
        torch.manual_seed(seed)
        codec.at(float(level))
        metrics[f"accuracy_validation_noise_{level:.3g}"] = accuracy(network, validation)
        if number == NOISE_LEVELS // 2:
            metrics["accuracy_validation_split"] = metrics[f"accuracy_validation_noise_{level:.3g}"]
    return metrics


def _view(candidate: Candidate) -> Sent | None:
    """What a lossy format leaves of the images, if that is what the edge gets to see."""
    if candidate.image_format is None or candidate.quality is None or candidate.quality == LOSSLESS:
        return None
    return Sent(candidate.image_format, candidate.quality)


def _student(course: Course, candidate: Candidate, promised_bits: float, paths: DevicePaths, example: Tensor) -> tuple[nn.Module | None, ChannelPlan]:
    """The trained network of `candidate` and its plan; None where that is the backbone as it is."""
    if candidate.kind == "edge-only":
        view = _view(candidate)
        student = course.run("split", copy.deepcopy(course.teacher), epochs=course.params.finetune.epochs, view=view) if view else None
        return student, ChannelPlan()
    if candidate.kind == "device-only" and not candidate.keep:
        return None, ChannelPlan()
    settings, body, plan = course.params.finetune, copy.deepcopy(course.teacher), ChannelPlan()
    head, _ = split(body, example, candidate.cut)
    if candidate.keep:
        rows = read_json(paths.cuts, "the list of cut points")
        cuts = [CutPoint.from_dict({field.name: row[field.name] for field in fields(CutPoint)}) for row in rows]
        channel_block = int(read_json(paths.device_profile, "the device's profile")["channel_block"])
        chooser = pruner(head, example, cuts, candidate.cut, channel_block)
        soft = SoftPruning(head, chooser, dict(candidate.keep), settings.prune_rounds, settings.importance)
        if settings.prune_epochs:
            course.run("prune", body, epochs=settings.prune_epochs, callbacks=[soft], further=[channel_block, chooser.groups])
            plan = soft.plan()
        else:
            plan = chooser.plan(dict(candidate.keep), chooser.scores(head, settings.importance))
    if candidate.kind == "device-only":
        return course.run("split", recalibrated(rebuild(head, plan), course.sample), epochs=settings.epochs, further=plan.to_dict()), plan
    torch.manual_seed(course.params.run.seed)
    network = split_network(body, example, candidate, plan, course.params.codec)
    if isinstance(network.codec, RateCodec):
        network.codec.budget_bits = promised_bits
    if isinstance(network.codec, RawByteCodec):
        network.codec.calibrate(outputs(network.head, course.sample))
    if plan.kept:
        recalibrated(network.head, course.sample)
    cut = split(copy.deepcopy(course.teacher), example, candidate.cut)
    if settings.frozen_epochs:
        course.run_behind("frozen", network, cut if plan.kept else (None, copy.deepcopy(course.teacher)), plan)
    return course.run("split", network, epochs=settings.epochs, cut=cut, further=plan.to_dict()), plan


def _reference(course: Course, candidate: Candidate, plan: ChannelPlan, example: Tensor) -> nn.Module:
    """The backbone after the epochs of `_student`, with nothing pruned and no codec."""
    settings, body = course.params.finetune, copy.deepcopy(course.teacher)
    if candidate.kind == "split" and settings.frozen_epochs:
        width = split(body, example, candidate.cut)[0](example).shape[1]
        network = build_split(body, example, candidate.cut, CodecSpec("raw-fp32", width, 1, 8))
        course.run_behind("reference_frozen", network, (None, copy.deepcopy(course.teacher)), ChannelPlan())
        body.load_state_dict(network.head.state_dict() | network.tail.state_dict())
    return course.run("reference", body, epochs=settings.epochs + (settings.prune_epochs if plan.kept else 0))
