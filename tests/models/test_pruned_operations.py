from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from models.backbones import build_backbone
from models.channel_plan import ChannelPlan, rebuild
from models.cutting import cut_points, split
from models.operations import operations
from models.pruned_operations import PrunedOperations
from models.pruning import Pruner
from pipeline.errors import ModelError

RATIOS = (0.25, 0.4, 0.5, 0.7, 0.9, 1.0)


def made(name: str, size: int, cut: str) -> tuple[nn.Module, torch.Tensor, dict[str, tuple[str, ...]]]:
    torch.manual_seed(0)
    backbone, image = build_backbone(name, 10, size).eval(), torch.zeros(1, 3, size, size)
    points = cut_points(backbone, image)
    end = next(index for index, point in enumerate(points) if point.name == cut)
    return split(backbone, image, cut)[0], image, {point.name: point.layers for point in points[: end + 1] if point.layers}


@pytest.mark.parametrize(
    ("name", "size", "cut", "dropped"),
    [
        ("resnet20", 32, "output", ("layer1.1", "layer2.2", "layer3.1")),
        ("resnet20", 32, "layer1.2", ("layer1.2",)),  # the last operation goes
        ("mobilenet_v3_small", 32, "features.8", ("features.3", "features.5")),
        ("densenet121", 32, "features.transition2", ()),
        ("efficientnet_b0", 32, "features.4.1", ("features.2.1", "features.3.1")),
        ("vgg11_bn", 32, "output", ()),
        ("resnext50_32x4d", 32, "layer1.1", ("layer1.1",)),
    ],
)
def test_they_are_those_of_the_half_really_pruned(name: str, size: int, cut: str, dropped: tuple[str, ...]) -> None:
    head, image, layers = made(name, size, cut)
    pruner = Pruner(head, image, layers, cut_channels=cut != "output")
    scores, foreseen, draw = pruner.scores(head), PrunedOperations(head, image), random.Random(0)
    for attempt in range(3):
        keep: dict[str, float] = {group: draw.choice(RATIOS) for group in pruner.groups}
        if attempt:
            keep |= dict.fromkeys(dropped[:attempt], 0.0)
        plan = pruner.plan(keep, scores)
        assert plan.kept
        assert foreseen.of(plan) == operations(rebuild(head, plan), image)


def test_an_empty_plan_leaves_all() -> None:
    head, image, _ = made("resnet20", 32, "layer2.0")
    assert PrunedOperations(head, image).of(ChannelPlan()) == operations(head, image)


@pytest.mark.parametrize("plan", [ChannelPlan({"layer9.conv1": {"out": (0,)}}), ChannelPlan({"conv1": {"out": ()}})])
def test_a_plan_of_another_network_is_refused_as_rebuilding_does(plan: ChannelPlan) -> None:
    head, image, _ = made("resnet20", 32, "layer1.0")
    with pytest.raises(ModelError, match="channel plan"):
        rebuild(head, plan)
    with pytest.raises(ModelError, match="channel plan"):
        PrunedOperations(head, image).of(plan)
