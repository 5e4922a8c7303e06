from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from models.backbones import build_backbone
from models.codec import CodecSpec, UniformCodec
from models.coinference import CoInference, build_split
from models.cutting import cut_points
from models.operations import chained, operations
from models.pruned_operations import PrunedOperations
from models.pruning import Pruner
from pipeline.costs.fused import KernelCall, kernel_calls
from pipeline.costs.profiled import profiled_kernels
from pipeline.onnx_export import export_onnx
from pipeline.quantising import quantise
from tests.pipeline.costs.kernels import narrowed, profiled_session, this_block


def called(model: bytes) -> Counter[KernelCall]:
    return Counter(time.call for time in profiled_kernels(*profiled_session(model)))


def trained(network: CoInference) -> CoInference:
    """With batch norms as after training: those that shift nothing leave convolutions without a bias, which are fused otherwise."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "size", "cut"),
    [
        ("resnet20", 32, "layer2.0"),
        ("mobilenet_v3_small", 64, "features.3"),
        ("densenet121", 32, "features.transition1"),
        ("efficientnet_b0", 32, "features.2.1"),
        ("vgg11_bn", 32, "features.10"),
    ],
)
def test_the_kernels_foreseen_are_those_called_whole_and_pruned_in_float_and_integers(name: str, size: int, cut: str) -> None:
    torch.manual_seed(0)
    backbone, image, spec = build_backbone(name, 10, size).eval(), torch.zeros(1, 3, size, size), CodecSpec("uniform", 4, 2, 4)
    network = trained(build_split(backbone, image, cut, spec))
    points = cut_points(backbone, image)
    end = next(index for index, point in enumerate(points) if point.name == cut)
    pruner = Pruner(network.head, image, {point.name: point.layers for point in points[: end + 1] if point.layers}, cut_channels=True)
    scores, foreseen, draw = pruner.scores(network.head), PrunedOperations(network.head, image), random.Random(0)
    whole = export_onnx(network.device_half(), image, input_name="image", output_name="symbols")
    batch = [np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)]
    for attempt in range(3):
        keep = {group: draw.uniform(0.2, 1) if attempt else 1.0 for group in pruner.groups}
        head = foreseen.of(pruner.plan(keep, scores))
        codec = UniformCodec(spec, head[-1].output[1:], points[end].shape[0]).eval()
        half = chained(head, operations(nn.Sequential(codec.encode, codec.quantise), torch.zeros(head[-1].output)))
        model = narrowed(whole, half) if attempt else whole
        assert Counter(kernel_calls(half, block=this_block())) == called(model)
        if attempt < 2:
            assert Counter(kernel_calls(half, "int8", block=this_block())) == called(quantise(model, batch))


@pytest.mark.parametrize(("kind", "stride", "edge"), [("uniform", 4, True), ("codebook", 1, False), ("codebook", 2, True), ("multi-rate", 2, False)])
def test_the_kernels_of_encoders_and_decoders_are_foreseen(kind: str, stride: int, edge: bool) -> None:
    image = torch.zeros(1, 3, 16, 16)
    network = build_split(build_backbone("resnet8", 10, 16), image, "layer1.0", CodecSpec(kind, 4, stride, 3, points=((4, 4),)))
    trained(network)
    half = network.edge_half() if edge else network.device_half()
    example = torch.zeros(1, *network.codec.code_shape, dtype=torch.uint8) if edge else image
    model = export_onnx(half, example, input_name="x", output_name="y")
    assert Counter(kernel_calls(operations(half, example), block=this_block())) == called(model)


def test_attention_is_foreseen_as_the_products_that_it_is_exported_as() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x[:, :, :6], x[:, :, 2:8])

    example = torch.zeros(1, 2, 12, 8)
    foreseen = kernel_calls(operations(Attention(), example), block=this_block())
    real = called(export_onnx(Attention(), example, input_name="x", output_name="y"))
    assert "Attention" not in {call.op for call in foreseen}
    assert Counter(call.output for call in foreseen if "MatMul" in call.op) == Counter(call.output for call in real if "MatMul" in call.op)
    assert {"Softmax"} <= {call.op for call in foreseen} & {call.op for call in real}


def test_blocks_are_as_wide_as_the_device_has_them() -> None:
    half = operations(build_backbone("resnet8", 10, 16), torch.zeros(1, 3, 16, 16))
    plain, eight, sixteen = (kernel_calls(half, block=block) for block in (0, 8, 16))
    assert not any(call.op.startswith("nchwc.") for call in plain)
    assert sum(len(call.inputs) == 2 and call.op == "FusedConv" for call in plain) == 3  # the sums are computed by a convolution
    assert {call.output[1] % 8 for call in eight if call.op == "nchwc.Conv"} == {0}
    assert {call.output[1] % 16 for call in sixteen if call.op == "nchwc.Conv"} == {0}


def test_a_call_survives_json() -> None:
    for precision in ("fp32", "int8"):
        for call in kernel_calls(operations(build_backbone("mobilenet_v3_small", 10, 32), torch.zeros(1, 3, 32, 32)), precision, block=8):  # type: ignore[arg-type]
            assert KernelCall.from_dict(json.loads(json.dumps(call.to_dict()))) == call
