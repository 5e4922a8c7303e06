from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.backbones import build_backbone
from models.codec import CodecSpec
from models.coinference import build_split
from models.cutting import cut_points
from models.integers import integer_half
from pipeline.errors import ModelError
from pipeline.onnx_export import export_onnx
from pipeline.quantising import quantise
from pipeline.runtime.bundle import open_session


@pytest.mark.parametrize(("name", "place"), [("resnet20", 4), ("mobilenet_v2", 4), ("densenet121", 2)])
def test_symbols_are_those_of_the_quantised_onnx_half(name: str, place: int) -> None:
    torch.manual_seed(0)
    backbone, example, calibration = build_backbone(name, 10, 32).eval(), torch.zeros(2, 3, 32, 32), torch.randn(24, 3, 32, 32)
    cut = cut_points(backbone, example)[place].name
    network = build_split(backbone, example, cut, CodecSpec("uniform", 8, 1, 4)).train()
    with torch.no_grad():
        for _ in range(20):
            network(calibration)
    network.eval()
    images = torch.randn(16, 3, 32, 32)
    rounded = integer_half(nn.Sequential(network.head, network.codec.encode), calibration.split(8))
    with torch.no_grad():
        mine = network.symbol_codec().quantise(rounded(images)).numpy()
        fp32 = network.device_half()(images).numpy()
    half = export_onnx(network.device_half(), example, input_name="image", output_name="symbols")
    session = open_session(quantise(half, (batch.numpy() for batch in calibration.split(8))), 1)
    real = session.run(["symbols"], {"image": images.numpy()})[0]
    # one value that lies between two levels and is rounded the other way moves all that depends on it a little
    assert (mine == real).mean() > 0.9
    assert np.abs(mine.astype(int) - real).max() <= 1
    assert (mine != real).mean() < 0.4 * (fp32 != real).mean()


def test_the_half_itself_stays_as_it_is(tiny_backbone: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_backbone.state_dict().items()}
    integer_half(tiny_backbone, [torch.randn(4, 3, 16, 16)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_backbone.state_dict().items())


def test_a_half_that_decides_by_its_values_is_refused() -> None:
    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="cannot be followed to judge it in int8"):
        integer_half(Deciding(), [torch.zeros(1, 3, 4, 4)])
