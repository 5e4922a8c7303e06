from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import image_points
from benchmarks.image_points import ImagePoint, trained
from models.backbones import build_backbone
from pipeline.data import Sent
from pipeline.training import weights_bytes


def test_jpeg_without_tables_has_the_network_trained_on_jpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came, tuned = (build_backbone("resnet20", 10, 32) for _ in range(2))
    (tmp_path / "weights").write_bytes(weights_bytes(came))
    monkeypatch.setattr(image_points, "STATE", tmp_path)
    monkeypatch.setattr(image_points, "recipe", list)
    monkeypatch.setattr(image_points, "load_card", lambda: SimpleNamespace(num_classes=10, image_size=32))
    first = ImagePoint("resnet20", str(tmp_path / "weights"), "jpeg", 60, 4)
    jpeg = replace(first, quality=50, epochs=3, before=first)
    (tmp_path / f"{jpeg.key()}.safetensors").write_bytes(weights_bytes(tuned))
    bare = replace(jpeg, image_format="jpeg-bare", before=replace(first, image_format="jpeg-bare"))
    assert bare.name == "resnet20 jpeg-bare q50, trained on it"
    assert torch.equal(trained(bare).state_dict()["fc.weight"], tuned.state_dict()["fc.weight"])
    assert torch.equal(trained(replace(bare, epochs=0, before=None)).state_dict()["fc.weight"], came.state_dict()["fc.weight"])


def test_jpeg_arrives_as_the_same_pixels_without_tables_and_in_fewer_bytes() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8))
    for quality in image_points.QUALITIES:
        (whole, files), (bare, fewer) = (Sent(image_format, quality).and_files(images) for image_format in ("jpeg", "jpeg-bare"))
        assert torch.equal(whole, bare)
        assert sum(map(len, fewer)) < sum(map(len, files))
