"""One set of codec weights for all sizes of code at a cut, trained once (slimmable networks, arXiv 1812.08928 and 1903.05134; METHODS 5)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from models.codec import CodecSpec, Coded, FeatureCodec
from models.codecs import build_codec
from pipeline.errors import ModelError

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class SlimmableCodec(nn.Module):
    """The codecs of many `specs` for one feature, which share weights: a code of h channels uses the first h of the widest.

    Shared are convolutions and linear layers, between all codecs of a stride, whose kernels differ from other strides'. Not shared, being small and what
    a width or rate is told by: what scales and shifts the decoder's channels, each width's own, since fewer channels explain less; the encoder's of codec
    `rate`, one for each number of bits and rate weight, by which a channel fills fewer levels or none; a codebook's values and the symbol counts of `rate`,
    one set for each number of bits. Running statistics of batch norms belong to none: recalibrate them in the codec that `at` gives.

    Args:
        specs: of one kind; any kind of `models.codecs.CODECS` that has weights.
        shape: (C, H, W) or (C,) of the unpruned feature, which is what all of them restore.

    Raises:
        ModelError: no spec, specs of several kinds, or one that does not fit the feature.
    """

    def __init__(self, specs: Sequence[CodecSpec], shape: Sequence[int]) -> None:
        super().__init__()
        self.specs, self.shape = tuple(dict.fromkeys(specs)), tuple(shape)
        if len({spec.kind for spec in self.specs}) != 1:
            raise ModelError(f"slimmable codec: {len(self.specs)} specs of several kinds or none; give those of one.")
        self._shells: dict[tuple[CodecSpec, int], FeatureCodec] = {}
        self.weights = nn.ParameterDict()
        for spec in sorted(self.specs, key=lambda spec: -spec.code_channels):  # the widest codec that has a tensor gives it its shape
            for name, tensor in _tensors(build_codec(spec, self.shape)):
                key = _key(spec, name, tensor)
                if isinstance(tensor, nn.Parameter) and key not in self.weights:
                    self.weights[key] = nn.Parameter(tensor.detach().clone())
                elif not isinstance(tensor, nn.Parameter) and key not in self._buffers:
                    self.register_buffer(key, tensor.clone())

    def code(self, spec: CodecSpec, x: Tensor, channels: Sequence[int] | None = None) -> Coded:
        """Code and restore `x` (B, c, H, W) or (B, c) as the codec of `spec` would, with batch statistics in training; gradients reach the shared weights.

        `channels` are the c channels of the unpruned feature that `x` holds, all of them unless given.

        Raises:
            ModelError: a spec that is none of `specs`.
        """
        shell = self._shell(spec, len(channels) if channels is not None else self.shape[0]).train(self.training)
        return functional_call(shell, self._slices(shell, channels), (x,))

    @torch.no_grad()
    def at(self, spec: CodecSpec, channels: Sequence[int] | None = None) -> FeatureCodec:
        """The ordinary codec of `spec` for a feature of `channels`, with a copy of its share of the weights; its batch norms want recalibration.

        Raises:
            ModelError: a spec that is none of `specs`.
        """
        codec = copy.deepcopy(self._shell(spec, len(channels) if channels is not None else self.shape[0]))
        slices = self._slices(codec, channels)
        for name, tensor in _tensors(codec):
            tensor.copy_(slices[name])
        return codec.eval()

    def _shell(self, spec: CodecSpec, width: int) -> FeatureCodec:
        """A codec of `spec` for a feature of `width` channels, whose own weights mean nothing."""
        if spec not in self.specs:
            raise ModelError(
                f"the supernet was not trained for codec {spec.kind} of {spec.code_channels} channels, stride {spec.stride} and {spec.bits} bits at this "
                "cut; choose among the values of search.code_channels, strides, bits and rate_weights it was trained with, or train it anew."
            )
        if (spec, width) not in self._shells:
            with torch.random.fork_rng(devices=[]):  # random weights are drawn for nothing
                self._shells[spec, width] = build_codec(spec, (width, *self.shape[1:]), self.shape[0])
        return self._shells[spec, width]

    def _slices(self, codec: FeatureCodec, channels: Sequence[int] | None) -> dict[str, Tensor]:
        """What `codec` has of the shared tensors, by its own names for them."""
        found: dict[str, Tensor] = {}
        reads_feature = next(name for name, tensor in codec.named_parameters() if tensor.ndim > 1)
        for name, own in _tensors(codec):
            key = _key(codec.spec, name, own)
            shared = self.weights[key] if key in self.weights else self.get_buffer(key)
            if channels is not None and name == reads_feature:
                # beyond the feature's channels lies what a codec adds to them, such as the noise level
                read = [*channels, *range(self.shape[0], shared.shape[1])]
                shared = shared.index_select(1, torch.tensor(read, device=shared.device))
            found[name] = shared[tuple(slice(size) for size in own.shape)]
        return found


def _tensors(codec: FeatureCodec) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a codec but the statistics of its batch norms."""
    yield from codec.named_parameters()
    yield from ((name, tensor) for name, tensor in codec.named_buffers() if name.rpartition(".")[2] not in _STATISTICS)


def _key(spec: CodecSpec, name: str, tensor: Tensor) -> str:
    """The shared tensor that a codec of `spec` knows as `name`."""
    owner = ["code", str(spec.stride)]
    if name == "values":
        owner.append(f"{spec.bits} bits")
    elif name == "counts" or (spec.kind == "rate" and tensor.ndim == 1 and name.startswith("encode")):
        owner.append(f"{spec.bits} bits {spec.rate_weight:g}".replace(".", ","))  # torch takes no points in names
    elif tensor.ndim == 1 and name.startswith("decode"):
        owner.append(f"{spec.code_channels} channels")
    return "/".join([*owner, *name.split(".")])
