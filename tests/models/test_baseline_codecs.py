from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models.baseline_codecs import RawByteCodec
from models.codec import CodecSpec, SymbolCodec
from models.codecs import build_codec
from pipeline.errors import ModelError


def symbol_codec(kind: str, shape: tuple[int, ...], code_channels: int, stride: int, bits: int) -> SymbolCodec:
    codec = build_codec(CodecSpec(kind, code_channels, stride, bits), shape)
    assert isinstance(codec, SymbolCodec)
    return codec


@pytest.mark.parametrize("shape", [(6, 8, 8), (6,)])
def test_the_raw_feature_arrives_as_it_was(shape: tuple[int, ...]) -> None:
    feature = torch.randn(4, *shape)
    assert torch.equal(build_codec(CodecSpec("raw-fp32", 6, 1, 8), shape)(feature).decoded, feature)


@pytest.mark.parametrize("shape", [(6, 8, 8), (6,)])
def test_a_byte_a_value_is_off_by_half_a_step_of_the_range_of_the_calibration(shape: tuple[int, ...]) -> None:
    codec = symbol_codec("raw-8bit", shape, 6, 1, 8).eval()
    assert isinstance(codec, RawByteCodec)
    with pytest.raises(ModelError, match="its range is not known yet; calibrate it"):
        codec(torch.rand(2, *shape))
    for _ in range(3):
        codec.calibrate(torch.rand(64, *shape) * 5 - 2)
    feature = torch.rand(64, *shape) * 5 - 2
    assert (codec(feature).decoded - feature).abs().max() <= 1.01 * 5 / 255 / 2
    assert codec(feature + 100).decoded.max() == pytest.approx(3, abs=0.1), "what lies outside is cut off, not wrapped"
    assert codec.quantise(codec.encode(feature)).shape == (64, *codec.code_shape)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_bottlenet_is_two_convolutions_with_sigmoid_and_relu(stride: int) -> None:
    codec = symbol_codec("bottlenet++", (16, 16, 16), 4, stride, 8)
    feature = torch.randn(2, 16, 16, 16)
    u = codec.encode(feature)
    assert u.shape[1:] == codec.code_shape == (4, 16 // stride, 16 // stride)
    assert 0 < u.min() < u.max() < 1
    restored = codec(feature).decoded
    assert restored.shape == feature.shape
    assert restored.min() == 0
    convolutions = [layer for layer in codec.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    assert [layer.kernel_size for layer in convolutions] == [(3, 3) if stride == 1 else (stride, stride)] * 2


def test_the_public_codes_encoders_are_theirs_but_for_the_extra_level() -> None:
    early = symbol_codec("public-code", (16, 32, 32), 4, 1, 3)
    feature = torch.randn(8, 16, 32, 32) * 10
    symbols = early.quantise(early.encode(feature))
    assert symbols.unique().tolist() == list(range(8)), "2^3 levels, not 2^3 + 1"
    assert early(feature).decoded.min() > -1, "ELU"
    late = symbol_codec("public-code-vector", (64, 8, 8), 32, 1, 3)
    assert late.code_shape == (32, 1, 1)
    assert late(torch.randn(2, 64, 8, 8)).decoded.shape == (2, 64, 8, 8)
    weights = [layer.weight.shape for layer in late.modules() if isinstance(layer, nn.Linear)]
    assert weights == [(32, 4096), (32, 32), (32, 32), (4096, 32)]


@pytest.mark.parametrize("kind", ["bottlenet++", "public-code", "public-code-vector"])
def test_gradients_reach_every_layer(kind: str) -> None:
    codec = symbol_codec(kind, (8, 8, 8), 4, 1, 2)
    codec(torch.randn(4, 8, 8, 8)).decoded.square().sum().backward()
    assert all(parameter.grad is not None and math.isfinite(float(parameter.grad.sum())) for parameter in codec.parameters())


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (CodecSpec("raw-8bit", 4, 1, 8), (8, 8, 8), "sends all 8 channels of the feature as they are; choose code_channels 8"),
        (CodecSpec("raw-fp32", 8, 2, 8), (8, 8, 8), "stride 1, no pruning"),
        (CodecSpec("raw-8bit", 8, 1, 4), (8, 8, 8), "bits is 4; choose 8"),
        (CodecSpec("bottlenet++", 4, 2, 8), (8, 7, 7), r"stride 2 does not divide the feature \(8, 7, 7\)"),
        (CodecSpec("public-code", 4, 1, 8), (8,), "choose a map"),
        (CodecSpec("public-code", 4, 2, 8), (8, 16, 16), "stride is 2; choose 1"),
        (CodecSpec("public-code-vector", 4, 2, 8), (8, 8, 8), "stride is 2; choose 1"),
    ],
)
def test_a_baseline_that_cannot_be_is_refused(spec: CodecSpec, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_codec(spec, shape)
