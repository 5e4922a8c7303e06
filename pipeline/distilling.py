"""Training on the labels and on all that a teacher knows (METHODS 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.params import Training
from pipeline.training import Classifier


class Distiller(Classifier):
    """A `network` taught by an unsplit teacher: cross-entropy + `distill_logits` T^2 KL(teacher || student) + `distill_feature` MSE (METHODS 3).

    `teacher` is (head, tail). With `distill_feature` the network must be a `CoInference` cut where the teacher is, whose decoded feature is
    compared with the head's; without, it learns from the logits alone. The teacher stays in eval mode, is not trained and not saved.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: tuple[nn.Module, nn.Module],
        settings: Training,
        *,
        distill_logits: float,
        distill_feature: float,
        temperature: float,
        label_smoothing: float,
    ) -> None:
        super().__init__(network, settings, label_smoothing)
        # A tuple, so that torch does not count the teacher among the weights that are trained, averaged and checkpointed.
        self.teacher = tuple(part.eval().to(memory_format=torch.channels_last) for part in teacher)
        self.distill_logits, self.distill_feature, self.temperature = distill_logits, distill_feature, temperature

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        head, tail = self.teacher
        with torch.no_grad():
            wanted = head(images)
            teacher_logits = tail(wanted)
        network: Any = self.network
        decoded, logits = network.features(images)[1:] if self.distill_feature else (None, network(images))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        log_student, log_teacher = (F.log_softmax(values.float() / self.temperature, dim=1) for values in (logits, teacher_logits))
        loss = loss + self.distill_logits * self.temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return loss if decoded is None else loss + self.distill_feature * F.mse_loss(decoded, wanted)


class Ensemble(nn.Module):
    """The mean of the logits (B, classes) that `networks` give to images (B, 3, S, S): as a teacher better than each of them."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x) for network in self.networks]).mean(0)
