from __future__ import annotations

import copy
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from models.channel_plan import ChannelPlan
from models.codec import CodecSpec
from models.coinference import CoInference, build_split
from models.cutting import cut_points, split
from models.pruning import Pruner
from pipeline import frozen_head
from pipeline.data import normalise
from pipeline.errors import CoinferError
from pipeline.frozen_head import COPIES, BehindHead, FeatureData
from pipeline.inference import accuracy
from pipeline.networks import layers_up_to
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


def prepared(backbone: nn.Module, folder: Path, keep: float = 1.0, settings: Finetune = SETTINGS) -> tuple[CoInference, FeatureData]:
    """A split, pruned where `keep` is below 1, and its data."""
    torch.manual_seed(0)
    backbone.eval()
    head, rest = split(backbone, EXAMPLE, "block1")
    layers = layers_up_to(cut_points(backbone, EXAMPLE), "block1")
    chooser = Pruner(head, EXAMPLE, layers, cut_channels=True)
    plan = chooser.plan(dict.fromkeys(layers, keep), chooser.scores(head)) if keep < 1 else ChannelPlan()
    network = build_split(backbone, EXAMPLE, "block1", CodecSpec("uniform", 4, 2, 4), plan)
    teacher = (None, backbone) if keep == 1 else (head, rest)
    return network, FeatureData(copy.deepcopy(network.head).eval(), teacher, folder, coloured(80), coloured(30), settings, 3)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_loss_behind_a_frozen_head_is_that_of_the_whole(tiny_backbone: nn.Module, tmp_path: Path, keep: float) -> None:
    network, data = prepared(tiny_backbone, tmp_path, keep)
    data.settings = data.settings.model_copy(update={"crop_padding": 0, "flip": False})
    features, labels, *more = (torch.tensor(array[:16]) for array in data.kept(0))
    images = coloured(80)[0]
    with torch.no_grad():
        known = network.head.eval()(normalise(images)).flatten(1)
    seen = normalise(images[torch.cdist(features.float().flatten(1), known).argmin(1)])
    teacher = tiny_backbone if keep == 1 else split(tiny_backbone, EXAMPLE, "block1")
    network.eval()
    with torch.no_grad():
        behind = BehindHead(network, SETTINGS, 0.1).loss(features.float(), labels, more[0], more[1].float() if keep < 1 else features.float())
        whole = SplitDistiller(network, teacher, SETTINGS, 0.1).loss(seen, labels)
    torch.testing.assert_close(behind, whole, rtol=1e-2, atol=1e-2)


def trained(network: CoInference, data: FeatureData, folder: Path | None = None, log: object = None) -> list[dict[str, float]]:
    lesson = BehindHead(network, SETTINGS, 0.0)
    return fit(lesson, data, name="behind", epochs=COPIES + 3, checkpoint_dir=folder, threads=1, precision="fp32", log=log or (lambda row: None))  # type: ignore[arg-type]


def test_it_trains_codec_and_tail_on_features_computed_once(tiny_backbone: nn.Module, tmp_path: Path) -> None:
    network, data = prepared(tiny_backbone, tmp_path)
    before, head = accuracy(network, coloured(30)), weights_bytes(network.head)
    history = trained(network, data)
    assert weights_bytes(network.head) == head
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["accuracy_validation"] == accuracy(network, coloured(30)) > before
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"3-{number}" for number in range(COPIES)]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    again, data = prepared(tiny_backbone, tmp_path)
    trained(again, data)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == made
    assert weights_bytes(again) == weights_bytes(network)


def test_features_too_large_to_keep_are_computed_each_time(tiny_backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_head, "MOST_BYTES", 1000)
    network, data = prepared(tiny_backbone, tmp_path)
    before = accuracy(network, coloured(30))
    assert trained(network, data)[-1]["accuracy_validation"] > before
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(tiny_backbone: nn.Module, tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a small disk takes the right to mount one")
    try:
        network, data = prepared(tiny_backbone, tmp_path / "features")
        with pytest.raises(CoinferError, match=r"cannot write .*features.*: No space left on device; free some space"):
            trained(network, data)
        assert not list(tmp_path.rglob("*.npy"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("cutmix", [0.0, 0.5])
def test_an_interrupted_training_behind_the_head_goes_on_bit_for_bit(tiny_backbone: nn.Module, tmp_path: Path, cutmix: float) -> None:
    settings = SETTINGS.model_copy(update={"cutmix": cutmix})

    def power_cut(row: dict[str, float]) -> None:
        if row["epoch"] == 4:
            raise RuntimeError("power cut")

    network, data = prepared(tiny_backbone, tmp_path / "features", settings=settings)
    trained(network, data)
    with pytest.raises(RuntimeError, match="power cut"):
        trained(*prepared(tiny_backbone, tmp_path / "features", settings=settings), tmp_path / "checkpoint", power_cut)
    again, data = prepared(tiny_backbone, tmp_path / "features", settings=settings)
    trained(again, data, tmp_path / "checkpoint")
    assert weights_bytes(again) == weights_bytes(network)
