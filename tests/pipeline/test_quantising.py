from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from models.codec import Bounded, CodecSpec, Quantiser
from models.coinference import build_split
from pipeline.errors import ModelError
from pipeline.onnx_export import export_onnx
from pipeline.quantising import quantise
from pipeline.runtime.bundle import open_session

IMAGES = np.random.default_rng(0).normal(size=(32, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def half(tiny_backbone: nn.Module) -> bytes:
    network = build_split(tiny_backbone, torch.zeros(1, 3, 16, 16), "block2", CodecSpec("uniform", 4, 1, 3)).train()
    with torch.no_grad():
        for _ in range(20):  # statistics like a trained network's
            network(torch.from_numpy(IMAGES))
    return export_onnx(network.device_half(), torch.zeros(2, 3, 16, 16), input_name="image", output_name="symbols")


def symbols(model: bytes) -> np.ndarray:
    found: np.ndarray = open_session(model, 1).run(["symbols"], {"image": IMAGES})[0]
    return found


def test_symbols_change_little_and_weights_take_a_byte(half: bytes) -> None:
    quantised = quantise(half, np.split(IMAGES, 4))
    before, after = symbols(half), symbols(quantised)
    assert after.dtype == np.uint8
    assert (before == after).mean() > 0.85
    assert np.abs(before.astype(int) - after).max() <= 2
    kinds = Counter(item.data_type for item in onnx.load_from_string(quantised).graph.initializer if len(item.dims) == 4)
    assert kinds == {onnx.TensorProto.INT8: 6, onnx.TensorProto.FLOAT: 1}, "all convolutions but the encoder's"
    per_channel = [item for item in onnx.load_from_string(quantised).graph.initializer if item.data_type == onnx.TensorProto.FLOAT and item.dims == [16]]
    assert per_channel, "a scale for each filter"


def test_the_same_calibration_gives_the_same_bytes_and_another_not(half: bytes) -> None:
    assert quantise(half, np.split(IMAGES, 4)) == quantise(half, [IMAGES]) != quantise(half, [IMAGES[:1] / 4])


@pytest.mark.parametrize("batches", [[], [IMAGES[:0]]])
def test_calibration_on_nothing_is_refused(half: bytes, batches: list[np.ndarray]) -> None:
    with pytest.raises(ModelError, match=r"calibration of the int8 device half got no image; check data\.path"):
        quantise(half, batches)


def test_a_whole_network_with_a_mean_over_axes_can_be_quantised() -> None:
    class Pooled(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.adaptive_avg_pool2d(images, 1).flatten(1)

    torch.manual_seed(0)
    model = export_onnx(nn.Sequential(nn.Conv2d(3, 8, 3), Pooled()), torch.zeros(2, 3, 16, 16), input_name="image", output_name="symbols")
    assert np.abs(symbols(model) - symbols(quantise(model, [IMAGES]))).max() < 0.01, "on a processor without VNNI too"


def test_what_is_no_model_is_refused_as_such() -> None:
    empty = onnx.helper.make_graph([onnx.helper.make_node("NoSuch", ["image"], ["symbols"])], "g", [], [])
    empty.input.append(onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["n", 3, 16, 16]))
    with pytest.raises(ModelError, match=r"the device half cannot be quantised to int8 \(.+\); set search\.precision to \[fp32\]"):
        quantise(onnx.helper.make_model(empty).SerializeToString(), [IMAGES])


def test_integers_go_on_through_relu6_and_a_gate_but_not_through_the_codec() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.SiLU())
            self.encode = nn.Sequential(nn.Conv2d(8, 4, 1), Bounded(), Quantiser(4))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.encode(self.features(images))

    torch.manual_seed(0)
    model = export_onnx(Gated(), torch.zeros(2, 3, 16, 16), input_name="image", output_name="symbols")
    quantised = quantise(model, [IMAGES])
    assert np.abs(symbols(model).astype(int) - symbols(quantised)).max() <= 1
    nodes = onnx.load_from_string(quantised).graph.node
    integers = {output for node in nodes if node.op_type == "DequantizeLinear" for output in node.output}
    taken = [(node.op_type, node.input[0] in integers) for node in nodes if node.op_type in ("Conv", "Clip", "Mul")]
    assert taken == [("Conv", True), ("Conv", True), ("Mul", True), ("Conv", True), ("Clip", False), ("Mul", False)], "ReLU6 is in the integers' range"
