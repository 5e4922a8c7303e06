"""Pruning without a learned codec: the whole network narrowed alike everywhere, to stay on the device, and 2-step pruning, harder at the cut."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.split_points import cost
from benchmarks.three_step_training import SETTINGS, STATE, STATISTICS_IMAGES, digest, named, recipe, teacher, train
from models.backbones import build_backbone
from models.baseline_codecs import RawByteCodec
from models.channel_plan import ChannelPlan, rebuild
from models.codec import CodecSpec
from models.coinference import CoInference, build_split
from models.cutting import count_macs, cut_points, split
from models.pruning import Pruner
from pipeline.data import Split, load_card, load_split
from pipeline.distilling import Distiller
from pipeline.files import atomic_write_bytes, atomic_write_text
from pipeline.inference import accuracy, outputs, recalibrated
from pipeline.networks import layers_up_to
from pipeline.training import weights_bytes

EXAMPLE = torch.zeros(1, 3, 32, 32)


@dataclass(frozen=True)
class PrunedPoint:
    """`backbone` with `weights` (a safetensors file), or what `before` made of it, pruned once by l1 norms and then trained for `epochs`.

    Without `cut` every group keeps `keep` of its channels and all stays on the device. With it the channels that cross there keep `keep` and no other group
    loses any: the second step of 2-step pruning (Shi et al., arXiv 1903.03472), `before` being the first; what crosses is sent in 8 bits a value,
    entropy-coded.
    """

    backbone: str
    weights: str
    keep: float
    epochs: int
    cut: str | None = None
    before: PrunedPoint | None = None

    @property
    def name(self) -> str:
        where = f"{self.cut} 2-step" if self.cut else "whole"
        return f"{self.backbone} {where}, keeps {self.keep:g}{f' of {self.before.keep:g}' if self.before else ''}"

    def key(self) -> str:
        """Names everything the network depends on."""
        fields = asdict(self) | {"before": self.before.key() if self.before else None, "weights": digest(Path(self.weights))}
        return named(fields, recipe())

    def facts(self) -> dict[str, Any]:
        network = trained(self)
        half = split(network, EXAMPLE, self.cut)[0] if self.cut else network
        return {"head_macs": sum(count_macs(half, EXAMPLE).values()), "encoder_macs": 0}

    def judged(self, images: Split) -> dict[str, Any]:
        """Accuracy on one split and, where something crosses, its sizes."""
        if not self.cut:
            return {"accuracy": accuracy(trained(self), images)}
        network = coded(self)
        return {"accuracy": accuracy(network, images), **cost(network, images[0])}


def trained(point: PrunedPoint) -> nn.Module:
    """The network of `point`, trained now unless it was before."""
    card, file, plan_file = load_card(), STATE / f"{point.key()}.safetensors", STATE / f"{point.key()}.plan.json"
    start = trained(point.before) if point.before else build_backbone(point.backbone, card.num_classes, card.image_size, Path(point.weights)).eval()
    if file.exists():
        network = rebuild(start, ChannelPlan.from_json(plan_file.read_text()))
    else:
        cuts = cut_points(start, EXAMPLE)
        layers = layers_up_to(cuts, cuts[-1].name)
        chooser = Pruner(start, EXAMPLE, layers)
        chosen = [crossing(start, chooser, point.cut)] if point.cut else list(chooser.groups)
        plan = chooser.plan(dict.fromkeys(chosen, point.keep), chooser.scores(start))
        network = recalibrated(rebuild(start, plan), load_split("train")[0][:STATISTICS_IMAGES])
        train(Distiller(network, teacher(), SETTINGS, 0.0), point.name, f"{point.key()}-all", point.epochs)
        atomic_write_text(plan_file, plan.to_json())
        atomic_write_bytes(file, weights_bytes(network))
    network.load_state_dict(load_file(file))
    return network.eval()


def crossing(network: nn.Module, chooser: Pruner, cut: str) -> str:
    """The group that holds the channels of the feature at `cut`: the one without half of which fewer of them arrive."""
    width = _channels(network, cut)
    for group in chooser.groups:
        if _channels(rebuild(network, chooser.plan({group: 0.5}, chooser.scores(network))), cut) < width:
            return group
    raise ValueError(f"no group of channels crosses at {cut}")


@torch.no_grad()
def _channels(network: nn.Module, cut: str) -> int:
    return int(split(network, EXAMPLE, cut)[0].eval()(EXAMPLE).shape[1])


def coded(point: PrunedPoint) -> CoInference:
    """The network of `point`, cut there, its feature in 8 bits."""
    assert point.cut
    network = trained(point)
    found = build_split(network, EXAMPLE, point.cut, CodecSpec("raw-8bit", _channels(network, point.cut), 1, 8)).eval()
    assert isinstance(found.codec, RawByteCodec)
    found.codec.calibrate(outputs(found.head, load_split("train")[0][:STATISTICS_IMAGES]))
    return found
