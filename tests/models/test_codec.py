from __future__ import annotations

import pytest
import torch
from torch import nn

from models.codec import FeatureCodec
from pipeline.errors import ModelError


@pytest.mark.parametrize("bits", range(1, 9))
def test_exactly_two_to_the_bits_levels_and_the_top_one_does_not_wrap(bits: int) -> None:
    codec = FeatureCodec(4, 2, 1, bits)
    symbols = codec.quantise(torch.linspace(0, 1, 100_001))
    assert symbols.dtype == torch.uint8
    assert symbols.unique().tolist() == list(range(2**bits))
    assert symbols[0] == 0
    assert symbols[-1] == codec.quantise(torch.tensor(0.999)) == 2**bits - 1
    assert (symbols.int().diff() >= 0).all()
    levels = codec.dequantise(torch.arange(2**bits, dtype=torch.uint8))
    assert levels[0] == 0
    assert levels[-1] == 1
    assert torch.equal(codec.quantise(levels), torch.arange(2**bits, dtype=torch.uint8))


def test_ties_round_to_even_as_in_onnx() -> None:
    assert FeatureCodec(4, 2, 1, 2).quantise(torch.tensor([0.5, 1.5, 2.5]) / 3).tolist() == [0, 2, 2]


def test_the_code_stays_within_bounds_whatever_the_feature() -> None:
    codec = FeatureCodec(4, 2, 1, 8)
    u = codec.encode(torch.randn(8, 4, 6, 6) * 1e4)
    assert u.min() == 0
    assert u.max() == 1


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(16, 16), (15, 17), (11, 9), (28, 23)])
def test_code_has_the_size_promised_and_the_feature_comes_back_whole(stride: int, size: tuple[int, int]) -> None:
    codec = FeatureCodec(6, 3, stride, 4, size)
    feature = torch.randn(2, 6, *size)
    u = codec.encode(feature)
    assert u.shape[1:] == codec.code_shape(feature.shape[1:]) == (3, -(-size[0] // stride), -(-size[1] // stride))
    assert codec(feature).shape == feature.shape
    assert codec.decode(codec.dequantise(codec.quantise(u))).shape == feature.shape


@pytest.mark.parametrize(("stride", "size"), [(1, 8), (2, 7), (4, 16), (8, 17)])
def test_every_place_of_the_restored_feature_depends_on_the_code(stride: int, size: int) -> None:
    """A transposed 3x3 with stride 4 would leave holes that hold the bias alone."""
    codec = FeatureCodec(2, 2, stride, 8, (size, size)).eval()
    nn.init.ones_(codec.decode[0].weight)
    code = torch.rand(1, *codec.code_shape((2, size, size)))
    assert (codec.decode(code + 1) - codec.decode(code)).abs().min() > 1e-3


@pytest.mark.parametrize(("stride", "kernel"), [(1, 1), (2, 3), (4, 3)])
def test_the_encoder_is_one_small_convolution(stride: int, kernel: int) -> None:
    convolutions = [module for module in FeatureCodec(8, 4, stride, 4).encode.modules() if isinstance(module, nn.Conv2d)]
    assert [(conv.kernel_size, conv.stride) for conv in convolutions] == [((kernel, kernel), (stride, stride))]


def test_training_sees_the_numbers_the_edge_will_see_and_gradients_pass_straight_through() -> None:
    torch.manual_seed(0)
    codec = FeatureCodec(6, 3, 2, 3, (7, 7)).eval()
    feature = torch.randn(4, 6, 7, 7)
    assert torch.equal(codec(feature), codec.decode(codec.dequantise(codec.quantise(codec.encode(feature)))))
    smooth = torch.autograd.grad(codec.decode(codec.encode(feature)).sum(), codec.encode[0].weight)[0]
    quantised = torch.autograd.grad(codec(feature).sum(), codec.encode[0].weight)[0]
    assert quantised.abs().max() > 0
    torch.testing.assert_close(quantised, smooth)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_codec_learns_and_uses_its_levels(bits: int) -> None:
    torch.manual_seed(0)
    feature = torch.relu(torch.einsum("bkhw,kc->bchw", torch.randn(32, 3, 8, 8), torch.randn(3, 8)))  # three causes behind eight channels
    codec = FeatureCodec(8, 6, 1, bits)
    optimizer = torch.optim.Adam(codec.parameters(), 0.02)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.mse_loss(codec(feature), feature).backward()
        optimizer.step()
    codec.eval()
    unexplained = nn.functional.mse_loss(codec(feature), feature) / feature.var()
    assert unexplained < (0.45 if bits == 1 else 0.2)
    assert len(codec.quantise(codec.encode(feature)).unique()) >= 0.8 * 2**bits


def test_evaluation_moves_no_statistics() -> None:
    codec = FeatureCodec(6, 3, 1, 3).eval()
    before = {name: tensor.clone() for name, tensor in codec.state_dict().items()}
    codec(torch.randn(4, 6, 5, 5) + 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 4, 1, 0), "bits is 0; choose 1 to 8"),
        ((8, 4, 1, 9), "bits is 9; choose 1 to 8"),
        ((8, 9, 1, 4), "code_channels is 9 for a feature of 8 channels; choose 1 to 8"),
        ((8, 0, 1, 4), "code_channels is 0"),
        ((8, 4, 0, 4), "stride is 0"),
    ],
)
def test_impossible_codecs_are_refused(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        FeatureCodec(*arguments)


@pytest.mark.parametrize(
    ("shape", "stride", "message"),
    [
        ((8,), 1, "a vector, which is classification on the device"),
        ((8, 4, 4), 8, "stride 8 is larger than the 4x4 feature"),
        ((8, 4, 4), 4, "leaves 1x1 of the 4x4 feature, below 2x2"),
        ((8, 1, 1), 1, "below 2x2"),
        ((6, 8, 8), 1, "made for 8 channels"),
    ],
)
def test_features_that_cannot_be_coded_are_refused(shape: tuple[int, ...], stride: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        FeatureCodec(8, 4, stride, 4).code_shape(shape)


def test_a_feature_of_another_size_is_refused_not_bent() -> None:
    with pytest.raises(ModelError, match=r"restores \(4, 8, 8\) from a feature of \(4, 7, 7\)"):
        FeatureCodec(4, 2, 2, 4)(torch.randn(2, 4, 7, 7))
