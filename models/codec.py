"""The codec around the cut: what shrinks a feature to a few integer symbols on the device and restores it on the edge (METHODS 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError


class Bounded(nn.Module):
    """clamp(x/4 + 1/2, 0, 1): a batch-normed value to [0, 1], any shape."""

    # A clamp rather than a sigmoid: two standard deviations of the batch norm fill the whole range, so at 1 to 3 bits every level is used from the first step
    # and at 8 none is lost to flat tails; inside the range the gradient is constant, which the straight-through estimator wants; and it costs no exponential on
    # the device, whose rounding differs between runtimes. The scale sits here, not in the batch norm, where weight decay would wear it away.
    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x / 4 + 0.5, 0, 1)


class Quantiser(nn.Module):
    """u in [0, 1] -> round((2^bits - 1) u) as uint8, exactly 2^bits levels, ties to even as in ONNX Round."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.top = 2**bits - 1

    def forward(self, u: Tensor) -> Tensor:
        return torch.round(u * self.top).to(torch.uint8)


class Dequantiser(nn.Module):
    """uint8 symbols -> symbols/(2^bits - 1) as float32 in [0, 1]."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.top = 2**bits - 1

    def forward(self, symbols: Tensor) -> Tensor:
        return symbols.float() / self.top


class FeatureCodec(nn.Module):
    """Feature (B, C, H, W) -> symbols (B, h, H', W') -> feature (B, C, H, W), with H' = ceil(H/stride) (METHODS 3, learned source coding).

    Its four parts are modules to call:
        encode: feature -> u in [0, 1], a convolution (1x1, or 3x3 with the stride), batch norm and a clamp;
        quantise: u -> uint8 symbols 0 .. 2^bits - 1;
        dequantise: symbols -> v in [0, 1];
        decode: v -> feature, a transposed convolution and batch norm.

    Args:
        channels: C, of the feature.
        code_channels: h, of the code.
        size: (H, W) of the feature; left out, a multiple of the stride is restored.

    Raises:
        ModelError: bits outside 1..8, a stride or code_channels below 1, more code channels than channels.
    """

    def __init__(self, channels: int, code_channels: int, stride: int, bits: int, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise ModelError(f"codec: bits is {bits}; choose 1 to 8.")
        if stride < 1:
            raise ModelError(f"codec: stride is {stride}; choose 1 or more.")
        if not 1 <= code_channels <= channels:
            raise ModelError(f"codec: code_channels is {code_channels} for a feature of {channels} channels; choose 1 to {channels}.")
        self.channels, self.code_channels, self.stride, self.bits, self.size = channels, code_channels, stride, bits, size
        kernel = 1 if stride == 1 else 3
        self.encode = nn.Sequential(
            nn.Conv2d(channels, code_channels, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(code_channels),
            Bounded(),
        )
        self.quantise = Quantiser(bits)
        self.dequantise = Dequantiser(bits)
        # 2*stride - 1 is the support of linear interpolation: a transposed 3x3 would leave places between strides above 2 that no symbol reaches. The output
        # padding then restores every size from stride*(H'-1) + 1 to stride*H', which are just the sizes that the encoder turns into H'.
        padding = [(extent - 1) % stride for extent in size or (stride, stride)]
        mirrored = nn.ConvTranspose2d(code_channels, channels, 2 * stride - 1, stride, stride - 1, output_padding=(padding[0], padding[1]), bias=False)
        self.decode = nn.Sequential(mirrored, nn.BatchNorm2d(channels))

    def code_shape(self, feature_shape: Sequence[int]) -> tuple[int, int, int]:
        """(h, H', W') of the code of a feature (C, H, W), both without batch.

        Raises:
            ModelError: a feature this codec cannot code: a vector, other channels or size, smaller than the stride, or a code below 2x2.
        """
        if len(feature_shape) != 3:
            raise ModelError(
                f"codec: the feature at this cut has shape {tuple(feature_shape)}, a vector, which is classification on the device; cut before it."
            )
        channels, height, width = feature_shape
        if channels != self.channels or self.size not in (None, (height, width)):
            raise ModelError(
                f"codec: made for {self.channels} channels of size {self.size}, the feature at this cut is {tuple(feature_shape)}; build it for it."
            )
        if self.stride > min(height, width):
            raise ModelError(f"codec: stride {self.stride} is larger than the {height}x{width} feature at this cut; choose a smaller stride.")
        code = (self.code_channels, -(-height // self.stride), -(-width // self.stride))
        if min(code[1:]) < 2:
            raise ModelError(f"codec: stride {self.stride} leaves {code[1]}x{code[2]} of the {height}x{width} feature, below 2x2; choose a smaller stride.")
        return code

    def forward(self, x: Tensor) -> Tensor:
        """Codes and decodes `x` (B, C, H, W); gradients pass the quantiser straight through.

        Raises:
            ModelError: a feature of another size than the codec was made for.
        """
        u = self.encode(x)
        v = self.dequantise(self.quantise(u))
        # v + (u - u), not u + (v - u): the decoder then trains on the very numbers that the edge will dequantise.
        decoded: Tensor = self.decode(v + (u - u.detach()))
        if decoded.shape != x.shape:
            raise ModelError(f"codec: restores {tuple(decoded.shape[1:])} from a feature of {tuple(x.shape[1:])}; give the codec that size.")
        return decoded
