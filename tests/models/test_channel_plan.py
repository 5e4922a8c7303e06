from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.func import functional_call

from models.channel_plan import ChannelPlan, Silence, rebuild, silenced
from models.cutting import cut_points, split
from models.pruning import prune_head
from pipeline.errors import ModelError


def test_plan_survives_json() -> None:
    plan = ChannelPlan({"a.conv": {"out": (0, 2), "in": (1,)}, "a.bn": {"out": (0, 2)}, "b.conv": {"out": ()}})
    assert plan.dropped == {"b.conv"}
    assert ChannelPlan.from_json(plan.to_json()) == plan
    assert ChannelPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"a": [1]}',
        '{"a": {}}',
        '{"a": {"up": [1]}}',
        '{"a": {"in": []}}',
        '{"a": {"out": [], "in": [0]}}',
        '{"a": {"out": [2, 1]}}',
        '{"a": {"out": [0.5]}}',
    ],
)
def test_nonsense_is_no_plan(text: str) -> None:
    with pytest.raises(ModelError, match="channel plan"):
        ChannelPlan.from_json(text)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"nowhere": {"out": (0,)}}, "layer nowhere"),
        ({"0": {"out": (0, 9)}}, r"channel 9 \(out\) of layer 0, which has 4"),
        ({"1": {"out": (0,)}}, "depthwise convolution 1"),
        ({"2": {"in": (0, 3)}}, "groups of convolution 2 unequally"),
        ({"3": {"out": (0,)}}, "type ReLU"),
    ],
)
def test_a_plan_of_another_network_is_refused(kept: dict[str, dict[str, tuple[int, ...]]], message: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=2), nn.ReLU())
    with pytest.raises(ModelError, match=message):
        rebuild(network, ChannelPlan(kept))


def pruned_tiny(tiny_backbone: nn.Module) -> tuple[nn.Module, ChannelPlan, torch.Tensor]:
    image = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        for layer in tiny_backbone.modules():
            if isinstance(layer, nn.BatchNorm2d):  # beta - gamma*mu/sigma is not zero: what a silenced filter alone would leak
                layer.bias.uniform_(0.2, 0.5)
                layer.running_mean.uniform_(-1, 1)
    layers = {point.name: point.layers for point in cut_points(tiny_backbone, image) if point.layers and point.name != "output"}
    head = split(tiny_backbone, image, "block2")[0]
    return head, prune_head(head, image, dict.fromkeys(layers, 0.5), layers)[1], image


@pytest.mark.parametrize("training", [False, True])
def test_a_silenced_network_computes_what_the_pruned_one_does(tiny_backbone: nn.Module, training: bool) -> None:
    head, plan, image = pruned_tiny(tiny_backbone)
    narrow = rebuild(head, plan).train(training)
    Silence(head.train(training), plan)
    torch.testing.assert_close(head(image), narrow(image))


def test_silence_holds_against_an_optimiser_with_momentum_and_decay_and_lifts_to_what_was_there(tiny_backbone: nn.Module) -> None:
    head, plan, image = pruned_tiny(tiny_backbone)
    head.train()
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9, weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        head(image).square().mean().backward()
        optimizer.step()

    step()
    before = copy.deepcopy(head.state_dict())
    silence = Silence(head, plan)
    for _ in range(3):
        step()
        silence.hold()
    torch.testing.assert_close(head(image), rebuild(head, plan)(image))
    silence.lift()
    after = head.state_dict()
    gone = [channel for channel in range(16) if channel not in plan.kept["block2.conv1"]["out"]]
    kept = list(plan.kept["block2.conv1"]["out"])
    for tensor in ("block2.conv1.weight", "block2.bn1.weight", "block2.bn1.bias", "block2.bn1.running_var"):
        assert torch.equal(after[tensor][gone], before[tensor][gone])
        assert not torch.equal(after[tensor][kept], before[tensor][kept]), "the rest trained on meanwhile"


@pytest.mark.parametrize("training", [False, True])
def test_silenced_parameters_give_what_the_pruned_network_computes_and_gradients_to_what_is_left(tiny_backbone: nn.Module, training: bool) -> None:
    head, plan, images = pruned_tiny(tiny_backbone)
    narrow = rebuild(head, plan).train(training)
    before = {name: tensor.clone() for name, tensor in head.named_parameters()}
    found = functional_call(head.train(training), silenced(head, plan), (images,))
    torch.testing.assert_close(found, narrow(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.named_parameters())
    found.square().mean().backward()
    name, kept = next((name, sides["out"]) for name, sides in plan.kept.items() if "out" in sides and "conv" in name)
    gradient = head.get_submodule(name).weight.grad
    assert isinstance(gradient, torch.Tensor)
    assert set(gradient.flatten(1).any(1).nonzero().flatten().tolist()) <= set(kept)
    assert bool(gradient.any())
