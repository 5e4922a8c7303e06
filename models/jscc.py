"""Codecs that send their code over a noisy channel as it is: joint source-channel coding (METHODS 3; BottleNet++, arXiv 1910.14315)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.channels import SYMBOL_BITS, awgn, binary_erasure, binary_symmetric, check_noise, draw_noise
from models.codec import CodecSpec, Coded, FeatureCodec


class NoiseNoted(nn.Module):
    """Appends a plane (or number) that holds the noise level to a feature (B, C, H, W) or (B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x[:, :1], self.noise)], dim=1)


class ChannelCodec(FeatureCodec):
    """Joint source-channel coding: u goes over a noisy channel as it is, and the encoder knows the noise level (BottleNet++).

    In training the level is drawn afresh for each batch from `spec.noise`; in evaluation it is `noise`, at first the geometric mean of the two.
    """

    uses_per_symbol: ClassVar[int]  # real values for AWGN, bits for the others

    def __init__(self, spec: CodecSpec, shape: Sequence[int], restored_channels: int | None = None) -> None:
        super().__init__(spec, shape, restored_channels)
        check_noise(self.kind, *spec.noise)
        self.noise = math.sqrt(math.prod(spec.noise))

    @property
    def noise_planes(self) -> int:
        return 1

    @property
    def channel_uses(self) -> int:
        """Of one image."""
        return self.uses_per_symbol * math.prod(self.code_shape)

    @property
    def uncoded_bits(self) -> int:
        """The channel uses: a real number over AWGN counts as one bit."""
        return self.channel_uses

    def build_encoder(self) -> nn.Module:
        return nn.Sequential(NoiseNoted(), super().build_encoder())

    def at(self, noise: float) -> None:
        """Evaluate at this noise level from now on.

        Raises:
            ModelError: not a noise level of this channel.
        """
        check_noise(self.kind, noise, noise)
        self.noise = noise

    def code(self, x: Tensor) -> Coded:
        noise = draw_noise(*self.spec.noise) if self.training else self.noise
        assert isinstance(self.encode, nn.Sequential)
        noted = self.encode[0]
        assert isinstance(noted, NoiseNoted)
        noted.noise = noise
        return Coded(self.decode(self.send(self.encode(x), noise)), x.new_zeros(()))

    @abstractmethod
    def send(self, u: Tensor, noise: float) -> Tensor:
        """What arrives of u, with gradients."""


class AwgnCodec(ChannelCodec):
    """Analogue symbols over additive white Gaussian noise."""

    kind, uses_per_symbol = "jscc-awgn", 1

    def send(self, u: Tensor, noise: float) -> Tensor:
        return awgn(u, noise)


class ErasureCodec(ChannelCodec):
    """8-bit symbols over a binary erasure channel."""

    kind, uses_per_symbol = "jscc-bec", SYMBOL_BITS

    def send(self, u: Tensor, noise: float) -> Tensor:
        return binary_erasure(u, noise)


class BitFlipCodec(ChannelCodec):
    """8-bit symbols over a binary symmetric channel."""

    kind, uses_per_symbol = "jscc-bsc", SYMBOL_BITS

    def send(self, u: Tensor, noise: float) -> Tensor:
        return binary_symmetric(u, noise)
