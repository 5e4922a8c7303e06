from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from models.backbones import build_backbone
from models.branches import drop_branches, residual_branches
from models.channel_plan import ChannelPlan, rebuild
from models.cutting import count_macs, cut_points, split
from models.pruning import Pruner, prune_head
from pipeline.errors import ModelError


def halves(name: str, size: int, cut: str) -> tuple[nn.Module, Tensor, dict[str, tuple[str, ...]]]:
    """Device half, an image batch, and the layers of each block up to the cut; batch norms as after training."""
    torch.manual_seed(0)
    backbone = build_backbone(name, 10, size).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    image = torch.randn(2, 3, size, size)
    points = cut_points(backbone, image)
    end = next(i for i, point in enumerate(points) if point.name == cut)
    return split(backbone, image, cut)[0], image, {point.name: point.layers for point in points[: end + 1] if point.layers}


def silenced(head: nn.Module, plan: ChannelPlan) -> nn.Module:
    """The unpruned head with weights and biases of the removed channels at zero: what a right pruning computes, the slow way."""
    head = copy.deepcopy(head)
    for name, sides in plan.kept.items():
        layer = head.get_submodule(name)
        if "out" in sides:
            gone = torch.ones(len(layer.weight), dtype=torch.bool)
            gone[list(sides["out"])] = False
            with torch.no_grad():
                layer.weight[gone] = 0
                if layer.bias is not None:
                    layer.bias[gone] = 0
    return head


@pytest.mark.parametrize(
    ("name", "size", "cut"),
    [
        ("resnet20", 16, "layer2.1"),
        ("vgg11_bn", 32, "features.14"),
        ("alexnet", 64, "features.7"),
        ("densenet121", 32, "features.transition1"),
        ("mobilenet_v2", 32, "features.4"),
        ("mobilenet_v3_small", 32, "features.4"),
        ("efficientnet_b0", 32, "features.2.1"),
        ("squeezenet1_1", 32, "features.6"),
        ("resnext50_32x4d", 32, "layer1.0"),
    ],
)
@pytest.mark.parametrize("cut_channels", [False, True])
def test_pruned_half_computes_what_the_whole_one_does_without_those_channels(name: str, size: int, cut: str, cut_channels: bool) -> None:
    """Channels of the cut may only go where a codec follows, which reads fewer then."""
    head, image, layers = halves(name, size, cut)
    pruned, plan = prune_head(head, image, dict.fromkeys(layers, 0.5), layers, cut_channels=cut_channels)
    with torch.no_grad():
        expected, actual = silenced(head, plan)(image), pruned(image)
    if cut_channels:
        assert actual.shape[1] <= 0.6 * expected.shape[1]
        kept = [channel for channel in range(expected.shape[1]) if expected[:, channel].abs().max() > 0]
        narrow = [channel for channel in range(actual.shape[1]) if actual[:, channel].abs().max() > 0]
        assert len(kept) == len(narrow) > 0, "what ReLU has not silenced by itself"
        expected, actual = expected[:, kept], actual[:, narrow]
    assert actual.shape == expected.shape
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert set(pruned.state_dict()) == set(head.state_dict())
    assert sum(count_macs(pruned, image[:1]).values()) < 0.75 * sum(count_macs(head, image[:1]).values())


def test_half_of_resnet20_has_smaller_tensors_and_rebuilds_bit_for_bit() -> None:
    head, image, layers = halves("resnet20", 16, "layer2.1")
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    pruned, plan = prune_head(head, image, dict.fromkeys(layers, 0.5), layers)

    assert pruned.get_submodule("layer1.1.conv1").weight.shape == (8, 8, 3, 3)
    assert pruned.get_submodule("layer1.1.bn1").running_var.shape == (8,)
    assert pruned.get_submodule("layer2.1.conv2").weight.shape == (32, 16, 3, 3), "the cut keeps its width, through the residual sum too"
    assert pruned.get_submodule("layer2.0.downsample.0").weight.shape == (32, 8, 1, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items()), "the given half must stay as it was"

    torch.manual_seed(1)
    fresh = split(build_backbone("resnet20", 10, 16), image, "layer2.1")[0].eval()
    again = rebuild(fresh, ChannelPlan.from_json(plan.to_json()))
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(image), pruned(image))


def test_only_the_named_block_is_pruned() -> None:
    head, image, layers = halves("resnet20", 16, "layer2.1")
    _, plan = prune_head(head, image, {"layer1.1": 0.5}, layers)
    assert set(plan.kept) == {"layer1.1.conv1", "layer1.1.bn1", "layer1.1.conv2"}
    assert set(plan.kept["layer1.1.conv2"]) == {"in"}


def test_the_channels_with_the_smallest_l1_norm_over_the_group_go() -> None:
    head, image, layers = halves("resnet20", 16, "layer1.1")
    with torch.no_grad():
        for channel in (3, 7):
            head.get_submodule("layer1.0.conv1").weight[channel] *= 1e-3
            head.get_submodule("layer1.0.conv2").weight[:, channel] *= 1e-3
        head.get_submodule("layer1.0.conv1").weight[5] *= 1e-3  # small here, but layer1.0.conv2 leans on it
        head.get_submodule("layer1.0.conv2").weight[:, 5] *= 10
    _, plan = prune_head(head, image, {"layer1.0": 14 / 16}, layers)
    assert set(range(16)) - set(plan.kept["layer1.0.conv1"]["out"]) == {3, 7}


def test_depthwise_filters_count_and_stay_one_a_channel() -> None:
    head = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Conv2d(4, 2, 1, bias=False))
    with torch.no_grad():
        for layer in head:
            nn.init.ones_(layer.weight)
        head[1].weight[2] = 0
    pruned, plan = prune_head(head, torch.randn(1, 3, 4, 4), {"block": 0.75}, {"block": ("0", "1", "2")})
    assert plan.kept == {"0": {"out": (0, 1, 3)}, "1": {"out": (0, 1, 3), "in": (0, 1, 3)}, "2": {"in": (0, 1, 3)}}
    assert pruned[1].groups == pruned[1].in_channels == pruned[1].out_channels == 3


def test_pruned_widths_are_multiples_of_the_channel_block() -> None:
    head, image, layers = halves("resnet20", 16, "layer2.1")
    _, plan = prune_head(head, image, dict.fromkeys(layers, 0.3), layers, channel_block=4)
    widths = {len(indices) for sides in plan.kept.values() for indices in sides.values()}
    assert widths == {8, 12}, "0.3 of 16 and of 32, rounded up to whole blocks"


@pytest.mark.parametrize("keep", [{}, {"layer1.0": 1.0, "layer2.0": 1.0}])
def test_keeping_everything_gives_an_empty_plan_and_the_same_half(keep: dict[str, float]) -> None:
    head, image, layers = halves("resnet20", 16, "layer2.1")
    pruned, plan = prune_head(head, image, keep, layers)
    assert plan == ChannelPlan() == ChannelPlan.from_json(plan.to_json())
    assert torch.equal(pruned(image), head(image))


@pytest.mark.parametrize("training", [True, False])
def test_pruning_keeps_mode_gradients_and_statistics(training: bool) -> None:
    head, image, layers = halves("resnet20", 16, "layer2.1")
    head.train(training).requires_grad_(False)
    with torch.no_grad():
        pruned, plan = prune_head(head, image, {"layer1.1": 0.5}, layers)
    assert {module.training for module in pruned.modules()} == {training}
    assert not any(parameter.requires_grad for parameter in pruned.parameters())
    kept = list(plan.kept["layer1.1.bn1"]["out"])
    assert torch.equal(pruned.get_submodule("layer1.1.bn1").running_mean, head.get_submodule("layer1.1.bn1").running_mean[kept])


def test_a_group_may_have_a_ratio_of_its_own() -> None:
    head, image, layers = halves("resnet20", 16, "layer2.1")
    groups = Pruner(head, image, layers, cut_channels=True).groups
    assert groups["conv1"] == "relu" or groups["conv1"] in layers
    assert {name for name in groups if name.startswith("layer2")} == {"layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1"}
    block = groups["layer1.1.conv1"]
    _, plan = prune_head(head, image, {block: 0.5, "layer1.1.conv1": 0.25}, layers)
    assert len(plan.kept["layer1.1.conv1"]["out"]) == 4


def test_l2_prefers_one_large_weight_and_l1_many_small_ones() -> None:
    head = nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        head[0].weight.zero_()
        head[0].weight[0] = 0.1  # l1 2.7, l2 .52
        head[0].weight[1, 0, 0, 0] = 2.0  # l1 2, l2 2
        nn.init.ones_(head[1].weight)
    pruner = Pruner(head, torch.randn(1, 3, 4, 4), {"block": ("0", "1")})
    assert pruner.plan({"block": 0.5}, pruner.scores(head, "l1")).kept["0"]["out"] == (0,)
    assert pruner.plan({"block": 0.5}, pruner.scores(head, "l2")).kept["0"]["out"] == (1,)


def test_taylor_keeps_what_the_loss_leans_on_and_wants_gradients() -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)).eval()
    with torch.no_grad():
        head[3].weight.fill_(0.1)
        head[0].weight[2] *= 3
        head[3].weight[:, 2] = 0  # large filters that nothing reads
    image = torch.randn(8, 3, 6, 6)
    pruner = Pruner(head, image, {"block": ("0", "1", "3")})
    assert 2 in pruner.plan({"block": 0.75}, pruner.scores(head, "l1")).kept["0"]["out"]
    with pytest.raises(ModelError, match="taylor importance needs a gradient of layer 0"):
        pruner.plan({"block": 0.75}, pruner.scores(head, "taylor"))
    head(image).square().mean().backward()
    assert pruner.plan({"block": 0.75}, pruner.scores(head, "taylor")).kept["0"]["out"] == (0, 1, 3)


def test_a_plan_follows_the_weights_as_they_are_now() -> None:
    head, image, layers = halves("resnet20", 16, "layer1.1")
    pruner = Pruner(head, image, layers)
    with torch.no_grad():
        for channel, name in ((3, "conv1"), (9, "conv1")):
            head.get_submodule(f"layer1.0.{name}").weight[channel] = 0
            head.get_submodule("layer1.0.conv2").weight[:, channel] = 0
    assert set(range(16)) - set(pruner.plan({"layer1.0": 14 / 16}, pruner.scores(head)).kept["layer1.0.conv1"]["out"]) == {3, 9}


@pytest.mark.parametrize(("name", "cut"), [("shufflenet_v2_x0_5", "stage2.0"), ("swin_t", "features.1.0")])
def test_what_cannot_be_followed_is_refused_by_name(name: str, cut: str) -> None:
    head, image, layers = halves(name, 32, cut)
    with pytest.raises(ModelError, match="shuffles channels or attends in windows, which Torch-Pruning cannot follow; keep it whole"):
        prune_head(head, image, dict.fromkeys(layers, 0.5), layers)


def test_device_only_prunes_up_to_the_logits() -> None:
    head, image, layers = halves("resnet20", 16, "output")
    pruned, plan = prune_head(head, image, dict.fromkeys(layers, 0.5), layers)
    assert pruned(image).shape == (2, 10)
    assert plan.kept["fc"] == {"in": plan.kept["layer3.2.bn2"]["out"]}


def test_a_ratio_that_empties_a_layer_is_refused_by_name() -> None:
    head, image, layers = halves("resnet20", 16, "layer2.1")
    with pytest.raises(ModelError, match=r"keep ratio 0\.01 of block layer1\.1 would leave layer layer1\.1\.conv1 \(16 channels\) without channels; choose"):
        prune_head(head, image, {"layer1.1": 0.01}, layers)


@pytest.mark.parametrize(("keep", "message"), [({"layer9": 0.5}, "layer9.*choose among"), ({"layer1.1": 1.5}, r"1\.5"), ({"layer1.1": float("nan")}, "nan")])
def test_unknown_blocks_and_impossible_ratios_are_refused(keep: dict[str, float], message: str) -> None:
    head, image, layers = halves("resnet20", 16, "layer2.1")
    with pytest.raises(ModelError, match=message):
        prune_head(head, image, keep, layers)


@pytest.mark.parametrize(
    ("name", "size", "cut", "block"),
    [("resnet20", 16, "layer2.1", "layer1.1"), ("mobilenet_v2", 32, "features.4", "features.3"), ("efficientnet_b0", 32, "features.2.1", "features.2.1")],
)
def test_a_block_with_a_shortcut_can_go_as_a_whole(name: str, size: int, cut: str, block: str) -> None:
    head, image, layers = halves(name, size, cut)
    pruned, plan = prune_head(head, image, {block: 0.0}, layers)
    assert plan.dropped == set(layers[block])
    with torch.no_grad():
        torch.testing.assert_close(pruned(image), silenced(head, plan)(image))
    assert not [key for key in pruned.state_dict() if key.startswith(f"{block}.")]
    again = rebuild(head, ChannelPlan.from_json(plan.to_json()))
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(image), pruned(image))
    assert sum(count_macs(pruned, image[:1]).values()) == sum(macs for layer, macs in count_macs(head, image[:1]).items() if layer not in layers[block])


def test_blocks_in_a_row_can_go_also_without_a_layer_between_their_sums() -> None:
    head, image, layers = halves("mobilenet_v2", 32, "features.10")
    pruned, plan = prune_head(head, image, {"features.8": 0.0, "features.9": 0.0}, layers)
    assert plan.dropped == {*layers["features.8"], *layers["features.9"]}
    with torch.no_grad():
        torch.testing.assert_close(pruned(image), silenced(head, plan)(image))
    assert not [key for key in pruned.state_dict() if key.startswith(("features.8.", "features.9."))]


class Nested(nn.Module):
    """A shortcut within what another goes past, and a layer that both sides of a sum go through."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.shared = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)
        y = x + self.outer(x + self.inner(x))
        return y + self.shared(y)


def test_a_shortcut_within_another_goes_with_it_and_a_layer_used_twice_stays() -> None:
    image = torch.randn(2, 4, 8, 8)
    head = fx.symbolic_trace(Nested().eval())
    assert sorted(residual_branches(head)) == [("inner",), ("inner", "outer")]
    dropped = copy.deepcopy(head)
    drop_branches(dropped, ["inner", "outer"])
    with torch.no_grad():
        first = head.get_submodule("shared")(image)
        torch.testing.assert_close(dropped(image), first + head.get_submodule("shared")(first))
    with pytest.raises(ModelError, match="drops layer shared, which no shortcut"):
        drop_branches(head, ["shared"])


def test_what_no_shortcut_goes_past_cannot_be_dropped() -> None:
    head, image, layers = halves("resnet20", 16, "layer2.1")
    with pytest.raises(ModelError, match=r"keep ratio of block layer2\.0 is 0, but no shortcut goes past its layers; choose a fraction above 0"):
        prune_head(head, image, {"layer2.0": 0.0}, layers)
    with pytest.raises(ModelError, match=r"drops layer layer2\.0\.conv1, which no shortcut of this network goes past"):
        rebuild(head, ChannelPlan({"layer2.0.conv1": {"out": ()}}))


def test_dropping_goes_with_narrowing_the_rest() -> None:
    head, image, layers = halves("resnet20", 16, "layer2.1")
    pruned, plan = prune_head(head, image, {"layer1.1": 0.0, "layer1.0": 0.5, "layer1.2": 0.5, "relu": 0.5}, layers)
    assert plan.dropped == set(layers["layer1.1"])
    with torch.no_grad():
        torch.testing.assert_close(pruned(image), silenced(head, plan)(image), rtol=1e-4, atol=1e-5)
