"""What a split is trained on: the labels, and all that its unsplit teacher knows (METHODS 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.coinference import CoInference
from pipeline.params import Training
from pipeline.training import Classifier


class Distiller(Classifier):
    """A `network` taught by an unsplit teacher: cross-entropy + `distill_logits` T^2 KL(teacher || student) + `distill_feature` MSE (METHODS 3).

    `teacher` is (head, tail) cut where the student is; a `CoInference` student's decoded feature is compared with the head's, any other
    student learns from the logits alone. The teacher stays in eval mode, is not trained and not saved.
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
        decoded, logits = self.network.features(images)[1:] if isinstance(self.network, CoInference) else (None, self.network(images))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        log_student, log_teacher = (F.log_softmax(values.float() / self.temperature, dim=1) for values in (logits, teacher_logits))
        loss = loss + self.distill_logits * self.temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
        return loss if decoded is None else loss + self.distill_feature * F.mse_loss(decoded, wanted)
