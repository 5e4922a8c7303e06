"""Pruning that gives channels a second chance: silence the least important, train the rest, let the silenced recover, each time more (METHODS 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from models.channel_plan import ChannelPlan, Silence
from models.pruning import Importance, Pruner
from pipeline.errors import ParamsError

STEPS_PER_ROUND = 3  # at least: one to recover, one to be silent
RECOVERY = 1 / 3  # share of a round in which all channels train


class SoftPruning(Callback):
    """Silences channels of `head` while the network it is part of trains, as the three-step paper does (arXiv 2006.02166, step 2).

    Each of `rounds` first lets all channels train, then scores them afresh and silences the least important until it ends; the share of channels
    silenced grows over the rounds to what `keep` leaves out, as 1 - (1 - r)^3 (arXiv 1710.01878); a block that goes as a whole does so in every round.
    `pruner` is made for `head`.
    """

    def __init__(self, head: nn.Module, pruner: Pruner, keep: Mapping[str, float], rounds: int, importance: Importance) -> None:
        self.head, self.pruner, self.keep, self.rounds, self.importance = head, pruner, dict(keep), rounds, importance
        self._round = -1  # the last one that silenced
        self._plan: ChannelPlan | None = None  # in force
        self._silence: Silence | None = None
        self._had: list[Tensor] | None = None
        self._scores: dict[str, Tensor] = {}

    def plan(self) -> ChannelPlan:
        """What the trained head keeps: in it, be it of this training or an earlier one that was kept, all else is zero."""
        return self.pruner.plan(self.keep, self.pruner.scores(self.head, own=True))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = int(trainer.estimated_stepping_batches)
        if steps < STEPS_PER_ROUND * self.rounds:
            raise ParamsError(f"finetune.prune_rounds is {self.rounds}, but prune_epochs make {steps} steps; choose at most {steps // STEPS_PER_ROUND}.")
        if self._plan is not None:
            self._silence = Silence(self.head, self._plan, self._had)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        total = int(trainer.estimated_stepping_batches)
        now, within = divmod(trainer.global_step * self.rounds, total)
        if within < RECOVERY * total:
            self._lift()
        elif now != self._round:
            self._lift()
            self._round = now
            share = 1 - (1 - (self._round + 1) / self.rounds) ** 3
            keep = {name: 1 - (1 - ratio) * share if ratio else 0.0 for name, ratio in self.keep.items()}
            self._plan = self.pruner.plan(keep, self._scores if self.importance == "taylor" else self.pruner.scores(self.head, self.importance))
            self._silence, self._scores = Silence(self.head, self._plan), {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.importance == "taylor" and self._silence is None:
            found = self.pruner.scores(self.head, "taylor")
            self._scores = {name: score + self._scores.get(name, 0.0) for name, score in found.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._silence is not None:
            self._silence.hold()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._silence is not None:  # averaged weights remember what the silenced channels had
            self._silence.hold()

    def _lift(self) -> None:
        if self._silence is not None:
            self._silence.lift()
            self._silence = self._plan = None

    def state_dict(self) -> dict[str, Any]:
        had = self._silence.had if self._silence is not None else None
        return {"round": self._round, "plan": self._plan.to_json() if self._plan is not None else None, "had": had, "scores": self._scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._round, self._had, self._scores = state_dict["round"], state_dict["had"], state_dict["scores"]
        self._plan = ChannelPlan.from_json(state_dict["plan"]) if state_dict["plan"] is not None else None
