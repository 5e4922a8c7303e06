"""Noisy channels for joint source-channel coding: what a receiver gets of u in [0, 1], with gradients for the sender (METHODS 3; arXiv 1910.14315).

Each takes u (B, h, H, W) and its noise level, and draws from torch's generator. The straight-through ones give u the gradient that the received value has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.errors import ModelError

SYMBOL_BITS = 8  # of the digital channels, as in BottleNet++


def awgn(u: Tensor, sigma: float) -> Tensor:
    """u + sigma N(0, 1): one real channel use a symbol, peak power 1, so a PSNR of -20 log10 sigma."""
    return u + sigma * torch.randn_like(u)


def binary_erasure(u: Tensor, probability: float) -> Tensor:
    """u in 8 bits, each lost with `probability`; a lost bit counts as its mean, one half. 8 channel uses a symbol; straight-through."""
    bits, weights = _bits(u)
    lost = torch.rand_like(bits) < probability
    return _straight_through(u, (torch.where(lost, 0.5, bits) * weights).sum(-1) / weights.sum())


def binary_symmetric(u: Tensor, probability: float) -> Tensor:
    """u in 8 bits, each flipped with `probability`. 8 channel uses a symbol; straight-through."""
    bits, weights = _bits(u)
    flipped = torch.rand_like(bits) < probability
    return _straight_through(u, (torch.where(flipped, 1 - bits, bits) * weights).sum(-1) / weights.sum())


def _bits(u: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of round(255 u) as 0. and 1. along a new last axis, and what each is worth."""
    powers = torch.arange(SYMBOL_BITS, device=u.device)
    symbols = torch.round(u.detach() * (2**SYMBOL_BITS - 1)).to(torch.int64)
    return ((symbols.unsqueeze(-1) >> powers) & 1).to(u.dtype), (2**powers).to(u.dtype)


def _straight_through(u: Tensor, received: Tensor) -> Tensor:
    return received + (u - u.detach())


def check_noise(kind: str, low: float, high: float) -> None:
    """Raise ModelError unless `low` <= `high` are noise levels of a `kind` channel: a sigma above 0, or a probability above 0 and at most one half."""
    most = math.inf if kind == "jscc-awgn" else 0.5
    unit = "standard deviations above 0 (the peak is 1)" if kind == "jscc-awgn" else "probabilities above 0 and at most .5"
    if not (0 < low <= high <= most and math.isfinite(high)):
        raise ModelError(f"codec {kind}: noise is {low} to {high}; give two {unit}, the smaller first.")


def draw_noise(low: float, high: float) -> float:
    """A noise level between `low` and `high`, even in decibels."""
    return float(low * (high / low) ** torch.rand(()).item())
