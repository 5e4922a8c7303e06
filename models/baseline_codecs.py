"""What others put at the cut, to compare with: the raw feature, BottleNet++'s encoder, and that of the three-step paper's public code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.codec import CodecSpec, Coded, Dequantiser, FeatureCodec, Quantiser, SymbolCodec, UniformCodec
from pipeline.errors import ModelError


class RawFloatCodec(FeatureCodec):
    """The feature as it is, 32 bits a value, as Neurosurgeon sends it (ASPLOS 2017)."""

    kind = "raw-fp32"

    def __init__(self, spec: CodecSpec, shape: Sequence[int], restored_channels: int | None = None) -> None:
        _check_whole(spec, shape, restored_channels)
        super().__init__(spec, shape, restored_channels)

    @property
    def uncoded_bits(self) -> int:
        return 32 * math.prod(self.feature_shape)

    def build_encoder(self) -> nn.Module:
        return nn.Identity()

    def build_decoder(self) -> nn.Module:
        return nn.Identity()

    def code(self, x: Tensor) -> Coded:
        return Coded(x, x.new_zeros(()))


class Range(nn.Module):
    """The least and largest value that a calibration saw."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))


class ToUnit(nn.Module):
    """x -> [0, 1] by a `Range`, as a vector's or map's code."""

    def __init__(self, seen: Range, shape: Sequence[int]) -> None:
        super().__init__()
        self.range, self.vector = seen, len(shape) == 1

    def forward(self, x: Tensor) -> Tensor:
        u = torch.clamp((x - self.range.low) / (self.range.high - self.range.low).clamp_min(1e-12), 0, 1)
        return u[..., None, None] if self.vector else u


class FromUnit(nn.Module):
    """The inverse of `ToUnit`."""

    def __init__(self, seen: Range, shape: Sequence[int]) -> None:
        super().__init__()
        self.range, self.vector = seen, len(shape) == 1

    def forward(self, u: Tensor) -> Tensor:
        x = u * (self.range.high - self.range.low) + self.range.low
        return x.flatten(1) if self.vector else x


class RawByteCodec(SymbolCodec):
    """The feature in 256 levels between the extremes that `calibrate` saw."""

    kind = "raw-8bit"

    def __init__(self, spec: CodecSpec, shape: Sequence[int], restored_channels: int | None = None) -> None:
        _check_whole(spec, shape, restored_channels)
        super().__init__(spec, shape, restored_channels)
        if spec.bits != 8:
            raise ModelError(f"codec raw-8bit: bits is {spec.bits}; choose 8.")
        self.quantise, self.dequantise = Quantiser(8), Dequantiser(8)
        self.range = Range()
        self.encode, self.decode = ToUnit(self.range, self.feature_shape), FromUnit(self.range, self.feature_shape)

    def calibrate(self, feature: Tensor) -> None:
        """Widen the range to hold `feature` (B, C, H, W) or (B, C)."""
        self.range.low.copy_(torch.minimum(self.range.low, feature.detach().min()))
        self.range.high.copy_(torch.maximum(self.range.high, feature.detach().max()))

    def code(self, x: Tensor) -> Coded:
        if not torch.isfinite(self.range.low):
            raise ModelError("codec raw-8bit: its range is not known yet; calibrate it on features of training images.")
        return super().code(x)

    def build_encoder(self) -> nn.Module:
        return nn.Identity()

    def build_decoder(self) -> nn.Module:
        return nn.Identity()


class BottleNetCodec(UniformCodec):
    """BottleNet++ without its channel: convolution, batch norm, sigmoid and their mirror with ReLU, kernel 3 or, to shrink, the stride (arXiv 1910.14315)."""

    kind = "bottlenet++"

    def build_encoder(self) -> nn.Module:
        channels, width, stride = self.feature_shape[0], self.code_shape[0], self.spec.stride
        _check_map(self.kind, self.feature_shape, stride)
        shrink = nn.Conv2d(channels, width, 3, padding=1) if stride == 1 else nn.Conv2d(channels, width, stride, stride)
        return nn.Sequential(shrink, nn.BatchNorm2d(width), nn.Sigmoid())

    def build_decoder(self) -> nn.Module:
        channels, width, stride = self.restored_shape[0], self.code_shape[0], self.spec.stride
        grow = nn.Conv2d(width, channels, 3, padding=1) if stride == 1 else nn.ConvTranspose2d(width, channels, stride, stride)
        return nn.Sequential(grow, nn.BatchNorm2d(channels), nn.ReLU())


class HalfTanh(nn.Module):
    """(tanh x + 1)/2."""

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x) + 1) / 2


class PublicCodeCodec(UniformCodec):
    """The encoder of the three-step paper's public code at early cuts, with 2^n levels for its 2^n + 1: 3x3 convolution, tanh, 3x3 convolution, ELU."""

    kind = "public-code"

    def build_encoder(self) -> nn.Module:
        _check_map(self.kind, self.feature_shape, 1)
        _check_stride(self.spec)
        return nn.Sequential(nn.Conv2d(self.feature_shape[0], self.code_shape[0], 3, padding=1), HalfTanh())

    def build_decoder(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(self.code_shape[0], self.restored_shape[0], 3, padding=1), nn.ELU())


class PublicVectorCodec(UniformCodec):
    """The encoder of the three-step paper's public code at its fourth cut: two linear layers each way with dropout, a map becomes a vector of h numbers."""

    kind = "public-code-vector"

    def size_code(self) -> tuple[int, int, int]:
        _check_map(self.kind, self.feature_shape, 1)
        _check_stride(self.spec)
        return self.spec.code_channels, 1, 1

    def build_encoder(self) -> nn.Module:
        values, width = math.prod(self.feature_shape), self.code_shape[0]
        layers = [nn.Flatten(), nn.Linear(values, width), nn.ELU(), nn.Dropout(0.25), nn.Linear(width, width), HalfTanh()]
        return nn.Sequential(*layers, nn.Unflatten(1, self.code_shape))

    def build_decoder(self) -> nn.Module:
        width = self.code_shape[0]
        layers = [nn.Flatten(), nn.Linear(width, width), nn.ELU(), nn.Dropout(0.25), nn.Linear(width, math.prod(self.restored_shape)), nn.ELU()]
        return nn.Sequential(*layers, nn.Unflatten(1, self.restored_shape))


def _check_whole(spec: CodecSpec, shape: Sequence[int], restored_channels: int | None) -> None:
    if spec.stride != 1 or spec.code_channels != shape[0] or restored_channels not in (None, shape[0]):
        raise ModelError(f"codec {spec.kind}: sends all {shape[0]} channels of the feature as they are; choose code_channels {shape[0]}, stride 1, no pruning.")


def _check_stride(spec: CodecSpec) -> None:
    if spec.stride != 1:
        raise ModelError(f"codec {spec.kind}: stride is {spec.stride}; choose 1.")


def _check_map(kind: str, shape: Sequence[int], stride: int) -> None:
    if len(shape) != 3 or any(extent % stride for extent in shape[1:]):
        raise ModelError(f"codec {kind}: stride {stride} does not divide the feature {tuple(shape)}; choose a map and a stride that divides its sides.")
