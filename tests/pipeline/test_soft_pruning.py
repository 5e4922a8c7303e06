from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.channel_plan import ChannelPlan, rebuild
from models.cutting import cut_points, split
from models.pruning import Importance, Pruner
from pipeline.data import normalise
from pipeline.errors import ParamsError
from pipeline.params import Finetune
from pipeline.soft_pruning import SoftPruning
from pipeline.training import Classifier, DataModule, fit, weights_bytes
from tests.tiny import tiny_backbone

EXAMPLE = torch.zeros(1, 3, 16, 16)
SETTINGS = Finetune.model_validate({"epochs": 6, "learning_rate": 0.1, "batch_size": 16, "crop_padding": 1, "ema_decay": 0.9})
KEEP = {"stem.2": 0.5, "block1": 0.5, "down.2": 0.5, "block2": 0.25}


def coloured(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 120, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), labels] += 100
    return images, labels


class Watched(SoftPruning):
    """Notes at each step how many channels are silent."""

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        kept = self._plan.kept if self._plan is not None else {}
        self.seen = [*getattr(self, "seen", []), sum(16 - len(sides["out"]) for name, sides in kept.items() if name == "block2.conv1")]


def pruned(
    importance: Importance = "l1", folder: Path | None = None, break_at: int | None = None, keep: dict[str, float] = KEEP
) -> tuple[nn.Module, nn.Module, Watched]:
    torch.manual_seed(0)
    network = tiny_backbone(3, 16)
    head, _ = split(network, EXAMPLE, "block2")
    layers = {point.name: point.layers for point in cut_points(network, EXAMPLE) if point.name in KEEP}
    soft = Watched(head, Pruner(head, EXAMPLE, layers, cut_channels=True), keep, rounds=3, importance=importance)

    def log(row: dict[str, float]) -> None:
        if row["epoch"] == break_at:
            raise RuntimeError("power cut")

    data = DataModule(coloured(96), coloured(30), SETTINGS, 3)
    lesson = Classifier(network, SETTINGS, 0.0)
    fit(lesson, data, name="prune", epochs=6, checkpoint_dir=folder, threads=1, precision="fp32", log=log, callbacks=[soft])
    return network, head, soft


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor"])
def test_what_is_left_out_is_zero_in_the_end_so_removing_it_changes_nothing(importance: Importance) -> None:
    network, head, soft = pruned(importance)
    plan = soft.plan()
    assert len(plan.kept["block2.conv1"]["out"]) == 4
    assert len(plan.kept["stem.0"]["out"]) == 4
    images = normalise(coloured(30)[0])
    with torch.no_grad():
        whole, narrow = head.eval()(images), rebuild(head, plan).eval()(images)
    torch.testing.assert_close(narrow, whole[:, list(plan.kept["block2.bn2"]["out"])])
    right = (network.eval()(images).argmax(1) == coloured(30)[1]).float().mean()
    assert right > 0.8, "the rest learned to do without"


def test_a_block_that_goes_as_a_whole_is_silent_in_the_end() -> None:
    network, head, soft = pruned(keep={"block1": 0.0, "block2": 0.5})
    plan = soft.plan()
    assert plan.dropped == {f"block1.{layer}" for layer in ("conv1", "bn1", "conv2", "bn2")}
    images, labels = coloured(30)
    with torch.no_grad():
        torch.testing.assert_close(rebuild(head, plan).eval()(normalise(images)), head.eval()(normalise(images)))
    assert (network.eval()(normalise(images)).argmax(1) == labels).float().mean() > 0.8


def test_more_are_silenced_each_round_after_all_could_recover() -> None:
    _, _, soft = pruned()
    assert len(soft.seen) == 36, "6 epochs of 6 steps, in rounds of 12"
    rounds = [soft.seen[start : start + 12] for start in (0, 12, 24)]
    assert all(silent[:4] == [0] * 4 for silent in rounds), "a third of each round"
    assert all(len(set(silent[4:])) == 1 for silent in rounds)
    assert [silent[-1] for silent in rounds] == [8, 12, 12], "of 16: (1 - (2/3)^3) and (1 - (1/3)^3) of the 12 that go, and all of them"


@pytest.mark.parametrize("break_at", [1, 3, 5])
@pytest.mark.parametrize("importance", ["l1", "taylor"])
def test_an_interrupted_pruning_goes_on_bit_for_bit(tmp_path: Path, importance: Importance, break_at: int) -> None:
    network, _, soft = pruned(importance)
    with pytest.raises(RuntimeError, match="power cut"):
        pruned(importance, tmp_path, break_at)
    again, _, resumed = pruned(importance, tmp_path)
    assert weights_bytes(again) == weights_bytes(network)
    assert resumed.plan() == soft.plan() != ChannelPlan()


def test_too_few_steps_for_the_rounds_are_refused() -> None:
    network = tiny_backbone(3, 16)
    head, _ = split(network, EXAMPLE, "block2")
    layers = {point.name: point.layers for point in cut_points(network, EXAMPLE) if point.name in KEEP}
    soft = SoftPruning(head, Pruner(head, EXAMPLE, layers), KEEP, rounds=4, importance="taylor")
    data = DataModule(coloured(96), coloured(30), SETTINGS, 3)
    with pytest.raises(ParamsError, match=r"prune_rounds is 4, but prune_epochs make 6 steps; choose at most 2\."):
        fit(Classifier(network, SETTINGS, 0.0), data, name="prune", epochs=1, checkpoint_dir=None, threads=1, precision="fp32", log=print, callbacks=[soft])


def test_what_reads_a_silenced_channel_does_not_save_it() -> None:
    """A large weight that reads channel 0 outweighs it in the group's score, but not in its own."""
    head = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    with torch.no_grad():
        nn.init.ones_(head[0].weight)
        nn.init.ones_(head[2].weight)
        head[0].weight[0] = 0
        head[2].weight[:, 0] = 100
    pruner = Pruner(head, torch.zeros(1, 3, 4, 4), {"block": ("0", "2")})
    assert pruner.plan({"block": 0.75}, pruner.scores(head)).kept["0"]["out"] != (1, 2, 3)
    assert SoftPruning(head, pruner, {"block": 0.75}, 1, "l1").plan().kept["0"]["out"] == (1, 2, 3)


def test_a_finished_pruning_gives_its_plan_again(tmp_path: Path) -> None:
    _, _, soft = pruned(folder=tmp_path)
    _, _, again = pruned(folder=tmp_path)
    assert not hasattr(again, "seen"), "no step was taken"
    assert again.plan() == soft.plan()
