"""What a network answers to many images, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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


def recalibrated(network: nn.Module, images: Tensor, parts: Sequence[nn.Module] = ()) -> nn.Module:
    """`network` in eval mode with the batch-norm statistics of its `parts` (all of it, if none are named) taken afresh from `images` (METHODS 5)."""
    network.eval()
    recalibrate(parts or [network], lambda: outputs(network, images))
    return network


def recalibrate(parts: Iterable[nn.Module], run: Callable[[], object]) -> None:
    """Take the batch-norm statistics of `parts`, in eval mode, afresh from what `run` sends through them."""
    norms = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over what follows
        layer.train()
    run()
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def accuracy(network: nn.Module, split: Split) -> float:
    """Top-1 share of `split` = (images uint8 (N, 3, S, S), labels (N,)) that `network` gets right."""
    images, labels = split
    return int((predict_logits(network, images).argmax(1) == labels).sum()) / len(labels)
