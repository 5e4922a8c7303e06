from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from benchmarks.frozen_head import COPIES, FeatureData, TailLesson
from models.codec import CodecSpec
from models.coinference import CoInference, build_split
from pipeline.data import normalise
from pipeline.inference import accuracy
from pipeline.params import Finetune
from pipeline.split_distilling import SplitDistiller
from pipeline.training import fit, weights_bytes

EXAMPLE = torch.zeros(1, 3, 16, 16)
SETTINGS = Finetune.model_validate(
    {"epochs": 4, "learning_rate": 0.05, "batch_size": 16, "crop_padding": 1, "ema_decay": 0.9, "distill_logits": 2.0, "distill_feature": 0.5}
)


def coloured(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    images[torch.arange(count), labels] += 100
    return images, labels


def prepared(backbone: nn.Module, folder: Path) -> tuple[CoInference, FeatureData]:
    torch.manual_seed(0)
    network = build_split(backbone, EXAMPLE, "block1", CodecSpec("uniform", 4, 2, 4))
    return network, FeatureData(copy.deepcopy(network.head).eval(), backbone.eval(), folder, coloured(80), coloured(30), SETTINGS, 3)


def test_the_loss_behind_a_frozen_head_is_that_of_the_whole(tiny_backbone: nn.Module, tmp_path: Path) -> None:
    network, data = prepared(tiny_backbone, tmp_path)
    plain = data.settings.model_copy(update={"crop_padding": 0, "flip": False})
    data.settings = plain
    features, labels, logits = (torch.tensor(array[:16]) for array in data.copy(0))
    images = coloured(80)[0]
    with torch.no_grad():
        known = network.head.eval()(normalise(images)).flatten(1)
    seen = normalise(images[torch.cdist(features.float().flatten(1), known).argmin(1)])
    network.eval()
    with torch.no_grad():
        behind = TailLesson(network, SETTINGS).loss(features.float(), labels, logits)
        whole = SplitDistiller(network, tiny_backbone, SETTINGS, 0.0, (network.head,)).loss(seen, labels)
    torch.testing.assert_close(behind, whole, rtol=1e-2, atol=1e-2)


def test_it_trains_codec_and_tail_on_features_computed_once(tiny_backbone: nn.Module, tmp_path: Path) -> None:
    network, data = prepared(tiny_backbone, tmp_path / "features")
    before, head = accuracy(network, coloured(30)), weights_bytes(network.head)
    history = fit(TailLesson(network, SETTINGS), data, name="behind", epochs=COPIES + 3, checkpoint_dir=None, threads=1, precision="fp32", log=lambda row: None)
    assert weights_bytes(network.head) == head
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["accuracy_validation"] == accuracy(network, coloured(30)) > before
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == [f"3-{number}" for number in range(COPIES)]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.npy")}
    again, data = prepared(tiny_backbone, tmp_path / "features")
    fit(TailLesson(again, SETTINGS), data, name="behind", epochs=COPIES + 3, checkpoint_dir=None, threads=1, precision="fp32", log=lambda row: None)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.npy")} == made
    assert weights_bytes(again) == weights_bytes(network)
