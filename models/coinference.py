"""Head, codec and tail as one trainable network, and as the two halves that are exported."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.codec import FeatureCodec
from models.cutting import split
from models.pruning import ChannelPlan, rebuild


class CoInference(nn.Module):
    """A backbone split at a cut with a codec between: images (B, 3, S, S) -> logits (B, classes), differentiable through the quantiser (METHODS 3)."""

    def __init__(self, head: nn.Module, codec: FeatureCodec, tail: nn.Module) -> None:
        super().__init__()
        self.head, self.codec, self.tail = head, codec, tail

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[2]

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The feature at the cut and what the codec makes of it, both (B, C, H, W), and the logits (B, classes): what distillation compares."""
        feature = self.head(x)
        decoded = self.codec(feature)
        return feature, decoded, self.tail(decoded)

    def device_half(self) -> nn.Module:
        """Images (B, 3, S, S) float32 -> uint8 symbols (B, h, H', W'); shares this network's parameters, and holds no others."""
        return self._half(self.head, self.codec.encode, self.codec.quantise)

    def edge_half(self) -> nn.Module:
        """uint8 symbols (B, h, H', W') -> logits (B, classes); shares this network's parameters, and holds no others."""
        return self._half(self.codec.dequantise, self.codec.decode, self.tail)

    def _half(self, *parts: nn.Module) -> nn.Module:
        half = nn.Sequential(*parts)
        half.training = self.training  # not .train(): the parts are shared and keep their own mode
        return half


def build_split(
    backbone: nn.Module,
    example: Tensor,
    cut: str,
    code_channels: int,
    stride: int,
    bits: int,
    plan: ChannelPlan | None = None,
) -> CoInference:
    """`backbone` split at `cut`, its head narrowed by `plan`, with a fresh codec between the halves.

    Head and tail are copies: `backbone` is usually the teacher too, and must not train along. `example` is a batch of images (B, 3, S, S).

    Raises:
        ModelError: an unknown cut, a plan of another network, or a codec that does not fit the feature at the cut.
    """
    head, tail = (copy.deepcopy(half) for half in split(backbone, example, cut))
    if plan is not None:
        head = rebuild(head, plan)
    with torch.no_grad():
        shape = tuple(copy.deepcopy(head).eval()(example[:1]).shape[1:])
    codec = FeatureCodec(shape[0], code_channels, stride, bits, (shape[1], shape[2]) if len(shape) == 3 else None)
    codec.code_shape(shape)
    return CoInference(head, codec, tail).train(backbone.training)
