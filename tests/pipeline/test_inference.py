from __future__ import annotations

import torch
from torch import nn

from pipeline.data import EVALUATION_BATCH, normalise
from pipeline.inference import accuracy, outputs, predict_logits


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()


def some_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_predictions_are_those_of_the_whole_batch_in_eval_mode_and_the_mode_stays() -> None:
    net, images = network(), some_images(EVALUATION_BATCH + 7)
    logits = predict_logits(net, images)
    assert net.training
    assert not logits.requires_grad
    assert torch.allclose(logits, net.eval()(normalise(images)), atol=1e-6)


def test_outputs_leave_batch_norm_in_the_mode_it_is_in() -> None:
    net = network()
    before = net[1].running_mean.clone()
    outputs(net, some_images(8))
    assert not torch.equal(before, net[1].running_mean)
    assert net.training


def test_accuracy_is_the_share_that_is_right() -> None:
    net, images = network(), some_images(300)
    right = predict_logits(net, images).argmax(1)
    wrong = (right + 1) % 4
    assert accuracy(net, (images, torch.where(torch.arange(300) < 225, right, wrong))) == 0.75
