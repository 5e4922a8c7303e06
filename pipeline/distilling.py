"""Training on the labels and on what a teacher says (METHODS 3)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipeline.losses import label_loss, logits_loss
from pipeline.params import Finetune, Pretrain
from pipeline.training import Classifier


class Distiller(Classifier):
    """A `network` taught by a `teacher` of its own inputs and outputs: cross-entropy + `distill_logits` x `logits_loss` (METHODS 3).

    The teacher stays in eval mode, is not trained and not saved. It sees the images as they were before a `DataModule.view`.
    """

    def __init__(self, network: nn.Module, teacher: nn.Module, settings: Pretrain | Finetune, label_smoothing: float) -> None:
        super().__init__(network, settings, label_smoothing)
        # A tuple, so that torch does not count the teacher among the weights that are trained, averaged and checkpointed.
        self._teacher = (teacher.eval().to(memory_format=torch.channels_last),)
        self.distill_logits, self.temperature = settings.distill_logits, settings.temperature

    def loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        return self.taught(self.network(images), labels, more[0] if more else images)

    def taught(self, logits: Tensor, labels: Tensor, given: Tensor) -> Tensor:
        """The loss of `logits` (B, classes) where the teacher is `given` its input."""
        with torch.no_grad():
            known = self._teacher[0](given)
        loss = label_loss(logits, labels, self.label_smoothing)
        return loss + self.distill_logits * logits_loss(logits, known, self.temperature)


class Ensemble(nn.Module):
    """The mean of the logits (B, classes) that `networks` give to images (B, 3, S, S): as a teacher better than each of them."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x) for network in self.networks]).mean(0)
