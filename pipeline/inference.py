"""What a network answers to many images, batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.data import EVALUATION_BATCH, Split, normalise


@torch.no_grad()
def outputs(network: nn.Module, images: Tensor) -> Tensor:
    """What `network`, in the mode it is in, makes of `images` uint8 (N, 3, S, S): (N, ...)."""
    return torch.cat([network(normalise(part)) for part in torch.split(images, EVALUATION_BATCH)])


def predict_logits(network: nn.Module, images: Tensor) -> Tensor:
    """Logits float32 (N, classes) of `images` uint8 (N, 3, S, S), in eval mode and full precision; the network's mode is left as it was."""
    training = network.training
    try:
        return outputs(network.eval(), images)
    finally:
        network.train(training)


def accuracy(network: nn.Module, split: Split) -> float:
    """Top-1 share of `split` = (images uint8 (N, 3, S, S), labels (N,)) that `network` gets right."""
    images, labels = split
    return int((predict_logits(network, images).argmax(1) == labels).sum()) / len(labels)
