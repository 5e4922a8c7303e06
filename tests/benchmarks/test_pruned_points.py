from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.pruned_points import crossing
from benchmarks.split_points import _even
from models.backbones import build_backbone
from models.channel_plan import rebuild
from models.cutting import count_macs, cut_points
from models.pruning import Pruner
from pipeline.errors import ModelError
from pipeline.networks import layers_up_to

EXAMPLE = torch.zeros(1, 3, 32, 32)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_backbone("resnet20", 10, 32).eval()


@pytest.mark.parametrize(("cut", "width"), [("layer1.2", 4), ("layer2.2", 8), ("layer3.2", 16)])
def test_the_second_step_narrows_what_crosses(network: nn.Module, cut: str, width: int) -> None:
    cuts = cut_points(network, EXAMPLE)
    chooser = Pruner(network, EXAMPLE, layers_up_to(cuts, cuts[-1].name))
    narrow = rebuild(network, chooser.plan({crossing(network, chooser, cut): 0.25}, chooser.scores(network)))
    before, after = ({point.name: point.shape for point in cut_points(each, EXAMPLE)} for each in (network, narrow))
    assert after[cut][0] == width
    stage = cut.split(".")[0]
    assert all(after[name] == before[name] for name in before if name.startswith("layer") and not name.startswith(stage)), "no other stage's"


def test_even_pruning_removes_at_least_its_share(network: nn.Module) -> None:
    cuts = cut_points(network, EXAMPLE)
    chooser = Pruner(network, EXAMPLE, layers_up_to(cuts, cuts[-1].name))
    whole = sum(count_macs(network, EXAMPLE).values())
    keep = _even(network, chooser, 0.5)
    assert set(keep) == set(chooser.groups)
    assert len(set(keep.values())) == 1
    left = [
        sum(count_macs(rebuild(network, chooser.plan(ratios, chooser.scores(network))), EXAMPLE).values()) / whole
        for ratios in (keep, {name: ratio + 1 / 16 for name, ratio in keep.items()})
    ]
    assert left[0] <= 0.5 < left[1]
    with pytest.raises(ModelError, match="removes 100% of the head's MACs; choose less"):
        _even(network, chooser, 1.0)
