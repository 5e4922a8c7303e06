"""The codec around the cut: what shrinks a feature on the device to something cheap to send, and restores it on the edge (METHODS 3)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import ModelError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
COUNTING_MOMENTUM = 0.05  # a batch holds thousands of symbols a channel
LEAST_FREQUENCY = 1e-3  # near what the coder's tables give a symbol never seen
FIRST_COUNT = 1e-4  # the first batch outweighs it
CONTEXT_PRIOR = 0.01  # symbols an image, by which a context leans on its channel's distribution


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


class NearestValue(nn.Module):
    """u -> index of the nearest of a learned scalar codebook's values, as uint8; the values are kept in ascending order."""

    def __init__(self, values: nn.Parameter) -> None:
        super().__init__()
        self.values = values

    def forward(self, u: Tensor) -> Tensor:
        ascending = self.values.sort().values
        between = (ascending[1:] + ascending[:-1]) / 2
        if torch.compiler.is_exporting():  # ONNX has no bucketize; this form of it takes 2^bits times the memory
            return (u.unsqueeze(-1) > between).sum(-1).to(torch.uint8)
        return torch.bucketize(u.detach().contiguous(), between.detach()).to(torch.uint8)


class ValueOf(nn.Module):
    """uint8 indices -> the codebook's values."""

    def __init__(self, values: nn.Parameter) -> None:
        super().__init__()
        self.values = values

    def forward(self, symbols: Tensor) -> Tensor:
        return self.values.sort().values[symbols.long()]


class Coded(NamedTuple):
    """What a codec makes of a batch of features: the restored features (B, C, H, W), and the codec's own term of the training loss, a scalar."""

    decoded: Tensor
    loss: Tensor


@dataclass(frozen=True)
class CodecSpec:
    """Which codec, how large, and how it is trained.

    Args:
        kind: a key of `models.codecs.CODECS`.
        code_channels: channels h of the code.
        stride: of the encoder, 1 for a vector.
        bits: of a symbol, 1 to 8; the jscc kinds take 8 or analogue ones, whatever this says.
        rate_weight: loss per coded bit of an image (`rate`).
        commitment: weight of the pull of the code towards its codebook (`codebook`), as in VQ-VAE (arXiv 1711.00937).
        noise: least and largest noise level of the channel (jscc kinds): sigma, or the probability to lose or flip a bit.
        points: (channels, bits) of each operating point, the most expensive first (`multi-rate`).

    Raises:
        ModelError: a value out of range.
    """

    kind: str
    code_channels: int
    stride: int
    bits: int
    rate_weight: float = 0.0
    commitment: float = 0.25
    noise: tuple[float, float] = (0.05, 0.3)
    points: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ModelError(f"codec: bits is {self.bits}; choose 1 to 8.")
        for name, value in (("rate_weight", self.rate_weight), ("commitment", self.commitment)):
            if not (math.isfinite(value) and value >= 0):
                raise ModelError(f"codec: {name} is {value}; choose 0 or more.")


class FeatureCodec(nn.Module):
    """Feature (B, C, H, W) or vector (B, C) -> code (B, h, H', W'), H' = ceil(H/stride), or (B, h, 1, 1) -> feature (B, R, H, W) or (B, R) (METHODS 3).

    `encode` (feature -> u in [0, 1]) is one convolution (1x1, or 3x3 with the stride), batch norm and a clamp, preceded by a wider 3x3 of
    stride 2, batch norm and ReLU where the stride is even and above 2; `decode` (what arrives -> feature) mirrors it with transposed
    convolutions. Both are linear for a vector. What lies between them is the subclass's.

    Args:
        spec: of the kind that this class is.
        shape: (C, H, W) or (C,) of the feature.
        restored_channels: R, where the edge half wants more channels than a pruned device half gives; C if left out.

    Raises:
        ModelError: a size that cannot be: a stride larger than the feature, a code below 2x2, more code channels than restored ones.
    """

    kind: ClassVar[str]

    def __init__(self, spec: CodecSpec, shape: Sequence[int], restored_channels: int | None = None) -> None:
        super().__init__()
        self.spec, self.feature_shape, self.restored_shape = spec, tuple(shape), (restored_channels or shape[0], *shape[1:])
        self.code_shape = self.size_code()
        self.encode, self.decode = self.build_encoder(), self.build_decoder()

    def size_code(self) -> tuple[int, int, int]:
        """(h, H', W')."""
        return code_shape(self.restored_shape, self.spec.code_channels, self.spec.stride)

    @property
    def uncoded_bits(self) -> int:
        """Of one image, were its code sent as it is."""
        return self.spec.bits * math.prod(self.code_shape)

    @property
    def noise_planes(self) -> int:
        """Planes that hold the noise level, which the encoder reads beside the feature."""
        return 0

    def build_encoder(self) -> nn.Module:
        channels, width = self.feature_shape[0] + self.noise_planes, self.code_shape[0]
        if len(self.feature_shape) == 1:
            return nn.Sequential(nn.Linear(channels, width, bias=False), nn.BatchNorm1d(width), Bounded(), nn.Unflatten(1, (width, 1, 1)))
        *before, (entering, leaving, stride) = self._steps(channels, width)
        layers: list[nn.Module] = []
        for wide_in, wide_out, step in before:
            layers += [nn.Conv2d(wide_in, wide_out, 3, step, 1, bias=False), nn.BatchNorm2d(wide_out), nn.ReLU()]
        kernel = 1 if stride == 1 else 3
        return nn.Sequential(*layers, nn.Conv2d(entering, leaving, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(leaving), Bounded())

    def build_decoder(self) -> nn.Module:
        width, (channels, *extents) = self.code_shape[0], self.restored_shape
        if not extents:
            return nn.Sequential(nn.Flatten(1), nn.Linear(width, channels, bias=False), nn.BatchNorm1d(channels))
        layers: list[nn.Module] = []
        for wide_out, wide_in, stride in self._steps(channels, width):
            # 2*stride - 1 is the support of linear interpolation: a transposed 3x3 would leave places between strides above 2 that no symbol reaches. The
            # output padding then restores every size from stride*(H'-1) + 1 to stride*H', which are just the sizes that the encoder turns into H'.
            padding = [(extent - 1) % stride for extent in extents]
            mirrored = nn.ConvTranspose2d(wide_in, wide_out, 2 * stride - 1, stride, stride - 1, output_padding=(padding[0], padding[1]), bias=False)
            layers = [mirrored, nn.BatchNorm2d(wide_out), *([nn.ReLU()] if layers else []), *layers]
            extents = [-(-extent // stride) for extent in extents]
        return nn.Sequential(*layers)

    def _steps(self, channels: int, width: int) -> list[tuple[int, int, int]]:
        """(channels in, channels out, stride) of each convolution of an encoder from `channels` to `width`, the feature's end first."""
        # Two steps where one would skip pixels. At the end of ResNet-20's first stage that gave 1.3 points more after an epoch, at 2 % fewer bits; at the end
        # of its second a layer of 64 between them 3 points more than one of 32. The bound keeps it small where a feature has hundreds of channels.
        stride, between = self.spec.stride, min(2 * channels, max(64, 2 * width))
        return [(channels, between, 2), (between, width, stride // 2)] if stride > 2 and stride % 2 == 0 else [(channels, width, stride)]

    def forward(self, x: Tensor) -> Coded:
        """Codes and restores `x`; gradients reach the encoder.

        Raises:
            ModelError: a feature of another shape than the codec was made for.
        """
        if tuple(x.shape[1:]) != self.feature_shape:
            raise ModelError(f"codec: made for a feature of {self.feature_shape}, got one of {tuple(x.shape[1:])}; build it for that shape.")
        return self.code(x)

    @abstractmethod
    def code(self, x: Tensor) -> Coded:
        """`forward` for a feature of the right shape."""


class SymbolCodec(FeatureCodec):
    """A codec whose code is integers: `quantise` turns u into uint8 symbols 0 .. 2^bits - 1, `dequantise` turns those into v, which the edge decodes."""

    quantise: nn.Module
    dequantise: nn.Module

    def code(self, x: Tensor) -> Coded:
        u = self.encode(x)
        symbols = self.quantise(u)
        v = self.dequantise(symbols)
        # v + (u - u), not u + (v - u): the decoder then trains on the very numbers that the edge will dequantise.
        return Coded(self.decode(v + (u - u.detach())), self.loss(u, symbols, v))

    def loss(self, u: Tensor, symbols: Tensor, v: Tensor) -> Tensor:
        """The codec's own term of the training loss, a scalar."""
        return u.new_zeros(())

    def received(self, symbols: Tensor) -> Tensor:
        """What arrives of `symbols`, uint8 (B, h, H', W'), at the operating point in force: the same shape."""
        return symbols


class UniformCodec(SymbolCodec):
    """2^bits evenly spaced levels, passed straight through in training."""

    kind = "uniform"

    def __init__(self, spec: CodecSpec, shape: Sequence[int], restored_channels: int | None = None) -> None:
        super().__init__(spec, shape, restored_channels)
        self.quantise, self.dequantise = Quantiser(spec.bits), Dequantiser(spec.bits)


class RateCodec(UniformCodec):
    """`uniform` whose loss also counts the coded bits of an image above `budget_bits`, times rate_weight.

    A symbol costs -log2 of its running frequency in its code channel and context, somewhat more than the coder will need, which knows more contexts.
    Between two levels the cost is interpolated, which gives u a gradient towards the cheaper one; the batch norm before the clamp can so narrow a channel
    to few levels or still it.
    """

    kind = "rate"
    counts: Tensor

    def __init__(self, spec: CodecSpec, shape: Sequence[int], restored_channels: int | None = None) -> None:
        super().__init__(spec, shape, restored_channels)
        self.budget_bits = 0.0
        # Counted, not learned by gradient: running counts are the best static distribution at once, at every rate_weight and learning rate.
        self.register_buffer("counts", torch.full((spec.code_channels, context_count(spec.bits), 2**spec.bits), FIRST_COUNT))

    def bits_of(self, symbols: Tensor) -> Tensor:
        """-log2 of the running frequency of each of `symbols`, uint8 (B, h, H', W')."""
        return self._costs()[self._rows(symbols), symbols.long()]

    def loss(self, u: Tensor, symbols: Tensor, v: Tensor) -> Tensor:
        rows = self._rows(symbols)
        if self.training:
            self._count(rows, symbols)
        costs, position = self._costs(), u * (2**self.spec.bits - 1)
        # a diverged training has no numbers left, which its loss will tell
        below = position.detach().nan_to_num().floor().clamp(0, 2**self.spec.bits - 2).long()
        slope = costs[rows, below + 1] - costs[rows, below]
        bits = costs[rows, symbols.long()] + slope * (position - position.detach())
        return self.spec.rate_weight * torch.relu(bits.sum() / len(u) - self.budget_bits)

    def _rows(self, symbols: Tensor) -> Tensor:
        return context_rows(symbols, 2**self.spec.bits, self.counts.shape[1])

    @torch.no_grad()
    def _count(self, rows: Tensor, symbols: Tensor) -> None:
        places = rows * self.counts.shape[2] + symbols
        seen = torch.bincount(places.flatten(), minlength=self.counts.numel()).reshape(self.counts.shape)
        self.counts.lerp_(seen.to(self.counts.dtype) / len(symbols), COUNTING_MOMENTUM)

    def _costs(self) -> Tensor:
        """Bits of each symbol in each row, (channels*contexts, levels)."""
        shares = self.counts.sum(1, keepdim=True)
        smoothed = self.counts + CONTEXT_PRIOR * shares / shares.sum(2, keepdim=True)
        return -(smoothed / smoothed.sum(2, keepdim=True)).clamp_min(LEAST_FREQUENCY).log2().flatten(0, 1)


def context_count(bits: int) -> int:
    """How many contexts a channel's symbols of `bits` bits have in training: one for each sum of two neighbours while those are few, and one for the first."""
    return min(2 << bits, 32)


def context_rows(symbols: Tensor, levels: int, contexts: int) -> Tensor:
    """The row channel*contexts + context of each of `symbols`, uint8 (B, h, H, W), int64 of that shape.

    The context is the last one for the first symbol of a channel, else (left + above) scaled to the other contexts, symbols of the same channel; at an edge
    of the plane the neighbour that is there counts twice. The coder's contexts (pipeline/runtime/context.py) are fitted once training is over.
    """
    values = symbols.long()
    left, above = torch.zeros_like(values), torch.zeros_like(values)
    left[..., 1:], above[..., 1:, :] = values[..., :-1], values[..., :-1, :]
    left[..., 0], above[..., 0, :] = above[..., 0], left[..., 0, :]
    context = (left + above) * (contexts - 1) // (2 * levels - 1)
    context[..., 0, 0] = contexts - 1
    return context + contexts * torch.arange(values.shape[1], device=values.device).reshape(-1, 1, 1)


class Embedding(nn.Module):
    """u in [0, 1] -> floor(256 u) as uint8, the first bits of which are a coarser quantisation of u."""

    def forward(self, u: Tensor) -> Tensor:
        return torch.clamp(torch.floor(u * 256), 0, 255).to(torch.uint8)


class Middle(nn.Module):
    """uint8 -> the middle of what it stands for, (symbol + 1/2)/256."""

    def forward(self, symbols: Tensor) -> Tensor:
        return (symbols.float() + 0.5) / 256


class MultiRateCodec(SymbolCodec):
    """One codec for several rates: each training batch is coded at an operating point drawn at random, in evaluation at `point` (the first unless set).

    A point (channels, bits) sends the most significant bits of the first channels only; the edge takes the middle for the rest, so one pair of halves
    serves all. The decoder has no batch norm, whose statistics would be another's at every point.
    """

    kind = "multi-rate"

    def __init__(self, spec: CodecSpec, shape: Sequence[int], restored_channels: int | None = None) -> None:
        super().__init__(spec, shape, restored_channels)
        if not spec.points or any(not (1 <= channels <= spec.code_channels and 1 <= bits <= 8) for channels, bits in spec.points):
            raise ModelError(f"codec multi-rate: points are {list(spec.points)}; give pairs of channels, 1 to {spec.code_channels}, and bits, 1 to 8.")
        self.quantise, self.dequantise, self.point = Embedding(), Middle(), 0

    def build_decoder(self) -> nn.Module:
        decoder = super().build_decoder()
        assert isinstance(decoder, nn.Sequential)
        return nn.Sequential(*(Shift(layer.num_features) if isinstance(layer, NORMS) else layer for layer in decoder))

    def code(self, x: Tensor) -> Coded:
        u = self.encode(x)
        point = int(torch.randint(len(self.spec.points), ()).item()) if self.training else self.point
        v = self.dequantise(self._sent(self.quantise(u), point))
        channels, _ = self.spec.points[point]
        sent = torch.arange(u.shape[1], device=u.device).reshape(-1, 1, 1) < channels
        return Coded(self.decode(v + (u - u.detach()) * sent), u.new_zeros(()))

    def received(self, symbols: Tensor) -> Tensor:
        return self._sent(symbols, self.point)

    def _sent(self, symbols: Tensor, point: int) -> Tensor:
        channels, bits = self.spec.points[point]
        middle = 128 >> bits
        kept = ((symbols[:, :channels] >> (8 - bits)) << (8 - bits)) | middle if bits < 8 else symbols[:, :channels]
        return torch.cat([kept, torch.full_like(symbols[:, channels:], 128)], dim=1)


class Shift(nn.Module):
    """x plus a learned number for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.reshape(-1, *[1] * (x.ndim - 2))


class CodebookCodec(SymbolCodec):
    """A learned scalar codebook of 2^bits values: each u becomes the nearest, which is drawn to it, and u to the value by `commitment`."""

    kind = "codebook"

    def __init__(self, spec: CodecSpec, shape: Sequence[int], restored_channels: int | None = None) -> None:
        super().__init__(spec, shape, restored_channels)
        self.values = nn.Parameter(torch.linspace(0, 1, 2**spec.bits))
        self.quantise, self.dequantise = NearestValue(self.values), ValueOf(self.values)

    def loss(self, u: Tensor, symbols: Tensor, v: Tensor) -> Tensor:
        return F.mse_loss(v, u.detach()) + self.spec.commitment * F.mse_loss(u, v.detach())


def code_shape(shape: Sequence[int], code_channels: int, stride: int) -> tuple[int, int, int]:
    """(h, H', W') of the code of a feature of `shape` (C, H, W), or (h, 1, 1) of a vector (C,), both without batch.

    Raises:
        ModelError: a feature that cannot be coded so: neither map nor vector, smaller than the stride, or a code below 2x2.
    """
    if len(shape) not in (1, 3):
        raise ModelError(f"codec: the feature at this cut has shape {tuple(shape)}, neither a map (C, H, W) nor a vector (C); choose another cut.")
    if stride < 1:
        raise ModelError(f"codec: stride is {stride}; choose 1 or more.")
    if not 1 <= code_channels <= shape[0]:
        raise ModelError(f"codec: code_channels is {code_channels} for a feature of {shape[0]} channels; choose 1 to {shape[0]}.")
    if len(shape) == 1:
        if stride > 1:
            raise ModelError(f"codec: stride is {stride}, but the feature at this cut is a vector of {shape[0]}; choose stride 1.")
        return code_channels, 1, 1
    height, width = shape[1:]
    if stride > min(height, width):
        raise ModelError(f"codec: stride {stride} is larger than the {height}x{width} feature at this cut; choose a smaller stride.")
    code = (code_channels, -(-height // stride), -(-width // stride))
    if min(code[1:]) < 2:
        choice = "a smaller stride" if stride > 1 else "another cut"
        raise ModelError(f"codec: stride {stride} leaves {code[1]}x{code[2]} of the {height}x{width} feature, below 2x2; choose {choice}.")
    return code
