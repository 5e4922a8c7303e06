"""Random small ONNX models that a device is measured with, so that kernels never measured can be foreseen (METHODS 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHAINS = 300


@dataclass(frozen=True)
class Chain:
    """A model of one float32 input (1, C, H, W) or (1, C), of a few nodes, and how a half like it would be run."""

    model: bytes
    precision: Literal["fp32", "int8"]


def random_chains(count: int = CHAINS, seed: int = 0) -> list[Chain]:
    """`count` chains over the kernels of classifiers' halves at 8 to 224 pixels; the same ones for the same seed."""
    raise NotImplementedError
