"""Deployments of the tiny backbone, for tests that need no measuring, and pictures that it can learn."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.costs.energy import board
from pipeline.costs.link import Link
from pipeline.search.costing import Deployment
from tests.pipeline.costs.profiles import toy_profile

DEVICE_MS_PER_MMAC, EDGE_MS_PER_MMAC = 20, 1


def deployment() -> Deployment:
    return Deployment(toy_profile(DEVICE_MS_PER_MMAC), toy_profile(EDGE_MS_PER_MMAC), Link(rate_mbps=1, rtt_ms=1), board("raspberry-pi-4"))


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten classes told apart by where a bright square lies: images uint8 (count, 3, 16, 16), labels (count,)."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.randint(0, 90, (count, 3, 16, 16), generator=rng, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[int(label) % 3, 5 * row : 5 * row + 4, 4 * column : 4 * column + 4] += 150
    return images, labels
