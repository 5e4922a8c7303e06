"""What `prepare`, `search` and `finetune` leave behind, made in a second from random weights and images."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from models.backbones import build_backbone
from models.channel_plan import ChannelPlan
from models.cutting import cut_points, split
from models.pruning import prune_head
from pipeline.networks import split_network
from pipeline.params import Params
from pipeline.paths import DATA, DATA_CARD, DevicePaths, split_file
from pipeline.search.candidate import Candidate
from pipeline.training import weights_bytes

SPLIT = Candidate(cut="block1", code_channels=4, stride=2, bits=3)
EDGE_ONLY = Candidate(cut="input", quality=75)
DEVICE_ONLY = Candidate(cut="output")
CLASSES = ["apple", "pear, green", "plum"]
COUNTS = {"train": 40, "validation": 12, "test": 9}
PREDICTED = {"device_ms": 5.0, "encode_ms": 0.5, "link_ms": 99.0, "decode_ms": 0.25, "edge_ms": 1.0, "total_ms": 105.75}


def write_finetuned(params: Params, candidate: Candidate) -> DevicePaths:
    """Write the inputs of `export` and `evaluate` for device `camera` under the current directory."""
    paths = DevicePaths("camera")
    for folder in (DATA, paths.chosen.parent, paths.split_weights.parent, paths.device_profile.parent):
        folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    size = params.data.image_size
    for name, count in COUNTS.items():
        images = np.kron(random.integers(0, 256, (count, 3, 4, 4), np.uint8), np.ones((1, 1, size // 4, size // 4), np.uint8))
        save_file({"images": torch.from_numpy(images), "labels": torch.arange(count) % len(CLASSES)}, split_file(name))
    DATA_CARD.write_text(json.dumps({"classes": CLASSES, "image_size": size, "sha256": {"all": "00"}}))

    torch.manual_seed(0)
    example = torch.zeros(2, 3, size, size)
    reference = build_backbone(params.backbone.name, len(CLASSES), size).eval()
    network, plan = reference, ChannelPlan()
    if candidate.keep:
        layers = {cut.name: cut.layers for cut in cut_points(reference, example)}
        network, plan = prune_head(split(reference, example, candidate.cut)[0], example, dict(candidate.keep), layers)
    if candidate.kind == "split":
        network = split_network(reference, example, candidate, plan)
    paths.split_weights.write_bytes(weights_bytes(network))
    paths.reference_weights.write_bytes(weights_bytes(reference))
    paths.split_spec.write_text(json.dumps({"candidate": candidate.to_dict(), "plan": plan.to_dict(), "reference": "pretrained"}))
    for profile in (paths.device_profile, paths.edge_profile):
        profile.write_text(json.dumps({"threads": 1}))
    paths.chosen.write_text(json.dumps({"chosen": _point(candidate), "device_only": _point(DEVICE_ONLY), "edge_only": _point(EDGE_ONLY)}))
    return paths


def _point(candidate: Candidate) -> dict[str, Any]:
    return {"feasible": True, "candidate": candidate.to_dict(), "measurement": {**PREDICTED, "device_macs": 1000, "device_params": 100}}
