"""Head, codec and tail as one trainable network, and as the two halves that are exported."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.channel_plan import ChannelPlan, rebuild
from models.codec import CodecSpec, FeatureCodec, SymbolCodec
from models.codecs import build_codec
from models.cutting import split
from pipeline.errors import ModelError


class Pass(NamedTuple):
    """One pass of images through a split network.

    `feature` at the cut, (B, C, H, W); `decoded`, what the codec makes of it, (B, R, H, W); `logits` (B, classes); and the codec's own loss, a scalar.
    """

    feature: Tensor
    decoded: Tensor
    logits: Tensor
    codec_loss: Tensor


class CoInference(nn.Module):
    """A backbone split at a cut with a codec between: images (B, 3, S, S) -> logits (B, classes), differentiable through the code (METHODS 3)."""

    def __init__(self, head: nn.Module, codec: FeatureCodec, tail: nn.Module) -> None:
        super().__init__()
        self.head, self.codec, self.tail = head, codec, tail

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x).logits

    def run(self, x: Tensor) -> Pass:
        """All that a loss may compare."""
        feature = self.head(x)
        coded = self.codec(feature)
        return Pass(feature, coded.decoded, self.tail(coded.decoded), coded.loss)

    def device_half(self) -> nn.Module:
        """Images (B, 3, S, S) float32 -> uint8 symbols (B, h, H', W'); shares this network's parameters, and holds no others.

        Raises:
            ModelError: the codec has no symbols.
        """
        codec = self.symbol_codec()
        return self._half(self.head, codec.encode, codec.quantise)

    def edge_half(self) -> nn.Module:
        """uint8 symbols (B, h, H', W') -> logits (B, classes); shares this network's parameters, and holds no others.

        Raises:
            ModelError: the codec has no symbols.
        """
        codec = self.symbol_codec()
        return self._half(codec.dequantise, codec.decode, self.tail)

    def symbol_codec(self) -> SymbolCodec:
        """The codec, which has symbols.

        Raises:
            ModelError: it has none.
        """
        if not isinstance(self.codec, SymbolCodec):
            raise ModelError(
                f"codec {self.codec.kind} sends no symbols a frame could carry and can only be evaluated; leave it out of search.codecs to export."
            )
        return self.codec

    def _half(self, *parts: nn.Module) -> nn.Module:
        half = nn.Sequential(*parts)
        half.training = self.training  # not .train(): the parts are shared and keep their own mode
        return half


def build_split(backbone: nn.Module, example: Tensor, cut: str, spec: CodecSpec, plan: ChannelPlan | None = None) -> CoInference:
    """`backbone` split at `cut`, its head narrowed by `plan`, with a fresh codec of `spec` between the halves.

    Head and tail are copies: `backbone` is usually the teacher too, and must not train along. `example` is a batch of images (B, 3, S, S).

    Raises:
        ModelError: an unknown cut, a plan of another network, or a codec that does not fit the feature at the cut.
    """
    whole, tail = (copy.deepcopy(half) for half in split(backbone, example, cut))
    head = whole if plan is None else rebuild(whole, plan)
    codec = build_codec(spec, _shape(head, example), _shape(whole, example)[0])
    return CoInference(head, codec, tail).train(backbone.training)


@torch.no_grad()
def _shape(head: nn.Module, example: Tensor) -> tuple[int, ...]:
    return tuple(copy.deepcopy(head).eval()(example[:1]).shape[1:])
