"""What a search works on, as the stages before it left it."""

from __future__ import annotations

from dataclasses import fields

from models.backbones import build_backbone
from models.cutting import CutPoint
from pipeline.costs.device_profile import DeviceProfile
from pipeline.data import load_card
from pipeline.files import read_json
from pipeline.params import Params
from pipeline.paths import BACKBONE_WEIGHTS, DevicePaths
from pipeline.search.problem import Problem


def load_problem(params: Params, device: str) -> Problem:
    """The trained backbone with its cuts, and what may be chosen for `device`.

    Raises:
        CoinferError: an input is missing or does not fit.
    """
    paths, card = DevicePaths(device), load_card()
    rows = read_json(paths.cuts, "the list of cut points")
    cuts = [CutPoint.from_dict({field.name: row[field.name] for field in fields(CutPoint)}) for row in rows]
    backbone = build_backbone(params.backbone.name, card.num_classes, card.image_size, BACKBONE_WEIGHTS)
    return Problem(backbone, cuts, params.search, params.codec, DeviceProfile.load(paths.device_profile).channel_block)
