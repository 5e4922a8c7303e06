"""What a search sees of one prunable group of channels, without the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """One prunable group of the device half: its first layer's shape, and weights and MACs of one image (of all its layers where it is a block)."""

    name: str
    kind: Literal["conv", "fc"]
    in_channels: int
    out_channels: int
    stride: int
    kernel: int
    weights: int
    macs: int
