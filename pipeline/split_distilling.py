"""Training a split on what an unsplit teacher says, and on its feature at the cut (METHODS 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.coinference import CoInference
from pipeline.distilling import Distiller
from pipeline.losses import feature_loss
from pipeline.params import Finetune


class SplitDistiller(Distiller):
    """A split taught by the logits of `teacher`: the loss of `Distiller` + the codec's own + `distill_feature` x `feature_loss`.

    `teacher` is a whole network, or the (head, tail) of one cut where `network` is. The feature that a whole one cannot show is the split's own.
    """

    def __init__(self, network: CoInference, teacher: nn.Module | tuple[nn.Module, nn.Module], settings: Finetune, label_smoothing: float) -> None:
        head, rest = teacher if isinstance(teacher, tuple) else (None, teacher)
        super().__init__(network, rest, settings, label_smoothing)
        self._head = (head.eval().to(memory_format=torch.channels_last),) if head else ()
        self.distill_feature = settings.distill_feature

    def loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        network, whole = self.network, more[0] if more else images
        assert isinstance(network, CoInference)
        with torch.no_grad():
            known = self._head[0](whole) if self._head else whole
        seen = network.run(images)
        wanted = known if self._head else seen.feature.detach()
        return self.taught(seen.logits, labels, known) + seen.codec_loss + self.distill_feature * feature_loss(seen.decoded, wanted)
