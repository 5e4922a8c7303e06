"""A hand-made profile of the tiny backbone, and its deployment, for tests that need no measuring."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from models.cutting import CutPoint
from pipeline.costs.device_profile import BackboneProfile, Block, CoderTimes, DeviceProfile, Point, Spread, backbone_key, shape_key
from pipeline.costs.energy import board
from pipeline.costs.link import Link
from pipeline.search.costing import Deployment

KEY = backbone_key("tests.tiny:tiny_backbone", 16)


def profile(cuts: Sequence[CutPoint], ms_per_mmac: float) -> DeviceProfile:
    """Every module takes time in proportion to its MACs; calls cost 0.01 ms."""

    def point(macs: float) -> Point:
        return Point(int(macs), *[macs / 1e6 * ms_per_mmac] * 3)

    call, image = Spread(0.01, 0.01, 0.01), Spread(0.1, 0.1, 0.1)
    macs = [after.macs - before.macs for before, after in itertools.pairwise(cuts)]
    blocks = tuple(Block(cut.name, cut.shape, (point(n / 4), point(n))) for cut, n in zip(cuts[1:], macs, strict=True))
    full = Point(sum(macs), *[sum(macs) / 1e6 * ms_per_mmac + 0.01] * 3)
    codec = {shape_key(cut.shape): (point(1e3), point(1e6)) for cut in cuts}
    backbone = BackboneProfile(call, blocks, full, codec, codec, image, {100: image, 30: image}, image)
    return DeviceProfile("toy", "none", 1, {}, CoderTimes("c", 0.01, 1e-5, 0.01, 1e-5), {KEY: backbone})


def deployment(cuts: Sequence[CutPoint]) -> Deployment:
    return Deployment(KEY, profile(cuts, 20), profile(cuts, 1), Link(rate_mbps=1, rtt_ms=1), board("raspberry-pi-4"))


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten classes told apart by where a bright square lies: images uint8 (count, 3, 16, 16), labels (count,)."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.randint(0, 90, (count, 3, 16, 16), generator=rng, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 4)
        image[int(label) % 3, 5 * row : 5 * row + 4, 4 * column : 4 * column + 4] += 150
    return images, labels
