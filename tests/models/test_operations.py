from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.backbones import build_backbone
from models.codec import CodecSpec
from models.coinference import build_split
from models.operations import chained, macs, operations


@pytest.mark.parametrize(
    ("name", "size"), [("resnet8", 32), ("mobilenet_v3_small", 32), ("shufflenet_v2_x0_5", 32), ("resnext50_32x4d", 32), ("vgg11_bn", 32), ("mlp", 8)]
)
def test_macs_are_those_of_the_flop_counter(name: str, size: int) -> None:
    model, image = build_backbone(name, 10, size).eval(), torch.zeros(1, 3, size, size)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(image)
    assert macs(operations(model, image)) == counter.get_total_flops() // 2


def test_macs_of_attention_and_of_transposed_convolutions_are_those_of_the_flop_counter() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(x).flatten(2).unsqueeze(1)
            return nn.functional.scaled_dot_product_attention(x, x, x)

    network, x = Both(), torch.zeros(1, 4, 5, 5)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(x)
    assert macs(operations(network, x)) == counter.get_total_flops() // 2


def test_an_operation_knows_its_sources_shapes_and_layer() -> None:
    found = operations(build_backbone("resnet8", 10, 32), torch.zeros(4, 3, 32, 32))
    shortcut = next(operation for operation in found if operation.layer == "layer2.0.downsample.0")
    assert (shortcut.kind, shortcut.inputs, shortcut.output, shortcut.weight) == ("conv", ((1, 16, 32, 32),), (1, 32, 16, 16), (32, 16, 1, 1))
    added = [operation for operation in found if operation.kind == "add"][1]
    assert added.layer == "layer2.0"
    assert {found[source].layer for source in added.sources} == {"layer2.0.bn2", "layer2.0.downsample.1"}
    assert found[0].sources == (-1,)


def test_a_network_keeps_its_mode_its_statistics_and_runs_as_before() -> None:
    model = build_backbone("resnet8", 10, 32).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    operations(model, torch.randn(2, 3, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize(("kind", "cut"), [("uniform", "layer2.0"), ("codebook", "layer2.0"), ("multi-rate", "layer1.0")])
def test_head_and_encoder_chained_are_the_device_half(kind: str, cut: str) -> None:
    image = torch.zeros(1, 3, 32, 32)
    network = build_split(build_backbone("resnet8", 10, 32), image, cut, CodecSpec(kind, 4, 2, 4, points=((4, 4),))).eval()
    codec = network.symbol_codec()
    feature = torch.zeros(1, *codec.feature_shape)
    joined = chained(operations(network.head, image), operations(nn.Sequential(codec.encode, codec.quantise), feature))
    whole = operations(network.device_half(), image)
    assert [(o.kind, o.sources, o.inputs, o.output) for o in joined] == [(o.kind, o.sources, o.inputs, o.output) for o in whole]
    assert joined[-1].dtype == "uint8"
