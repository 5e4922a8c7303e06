"""Training on the labels and on all that a teacher knows (METHODS 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.losses import feature_loss, logits_loss
from pipeline.params import Finetune, Pretrain
from pipeline.training import Classifier


class Distiller(Classifier):
    """A `network` taught by an unsplit teacher: cross-entropy + `distill_logits` x `logits_loss`, and of a split `distill_feature` x `feature_loss` and
    the codec's own loss too (METHODS 3).

    `teacher` is (whole,), or (head, tail) of a teacher cut where `network`, then a `CoInference`, is. It stays in eval mode, is not trained and not saved.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: tuple[nn.Module] | tuple[nn.Module, nn.Module],
        settings: Pretrain | Finetune,
        label_smoothing: float,
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__(network, settings, label_smoothing, frozen)
        # A tuple, so that torch does not count the teacher among the weights that are trained, averaged and checkpointed.
        self.teacher = tuple(part.eval().to(memory_format=torch.channels_last) for part in teacher)
        self.distill_logits, self.temperature = settings.distill_logits, settings.temperature
        self.distill_feature = settings.distill_feature if isinstance(settings, Finetune) else 0.0

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            known = [images]
            for part in self.teacher:
                known.append(part(known[-1]))
        if len(self.teacher) == 1:
            logits, further = self.network(images), torch.zeros(())
        else:
            network: Any = self.network
            seen = network.run(images)
            logits, further = seen.logits, seen.codec_loss + self.distill_feature * feature_loss(seen.decoded, known[1])
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return loss + self.distill_logits * logits_loss(logits, known[-1], self.temperature) + further


class Ensemble(nn.Module):
    """The mean of the logits (B, classes) that `networks` give to images (B, 3, S, S): as a teacher better than each of them."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([network(x) for network in self.networks]).mean(0)
