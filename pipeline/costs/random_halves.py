"""Random halves of one backbone as a search would propose them, as ONNX models: pruned group by group, at several cuts, with encoders of several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from onnx.utils import Extractor
from torch import Tensor, nn

from models.channel_plan import ChannelPlan, rebuild
from models.codec import CodecSpec, UniformCodec, code_shape
from models.cutting import OUTPUT, CutPoint, split
from models.pruning import Pruner, Scores
from pipeline.errors import ModelError
from pipeline.onnx_export import canonical_bytes, export_model

CUTS = 8  # at most so many, evenly spread: each must be traced for its coupled channels
AT_ONCE = 10  # halves of one export: one by one they take longer, and so do very many at once
CODE_CHANNELS, STRIDES, BITS = (1, 2, 4, 6, 8, 12, 16, 24, 32), (1, 2, 4), 4
LEAST_KEPT = 0.2
WHOLE_SHARE, EVEN_SHARE, DROPPED_SHARE, ALIGNED_SHARE = 0.1, 0.3, 0.2, 0.7


def random_halves(
    model: nn.Module, example: Tensor, cuts: Sequence[CutPoint], counts: tuple[int, int], channel_block: int, seed: int = 0
) -> tuple[list[bytes], list[bytes]]:
    """As many device halves (image -> uint8 symbols, or logits at the last cut) and edge halves (symbols -> logits) as `counts` says, the latter no more.

    Most keep multiples of `channel_block` channels, the others any number; some keep all, some lose residual blocks. A network that cannot be pruned
    gives whole halves.

    Raises:
        ModelError: the network cannot be cut or exported.
    """
    maker = _Halves(model, example, cuts, channel_block, seed)
    on_device: list[bytes] = []
    on_edge: list[bytes] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, counts[0], AT_ONCE):
            pairs = [maker.pair(number) for number in range(start, min(start + AT_ONCE, counts[0]))]
            wanted = counts[1] - len(on_edge)
            for device, edge in _exported([(half, edge if number < wanted else None) for number, (half, edge) in enumerate(pairs)], example):
                on_device.append(device)
                on_edge += [edge] if edge else []
    return on_device, on_edge


class _Halves:
    def __init__(self, model: nn.Module, example: Tensor, cuts: Sequence[CutPoint], channel_block: int, seed: int) -> None:
        self.example, self.channel_block, self.random = example, channel_block, np.random.default_rng(seed)
        coded = [cut for cut in cuts[1:-1] if _strides(cut.shape)]
        coded = [cut for cut in coded if len(cut.shape) == 3] or coded
        chosen = sorted({round(place) for place in np.linspace(0, len(coded) - 1, min(CUTS, len(coded)))}) if coded else []
        self.cuts = [*(coded[index] for index in chosen), cuts[-1]]
        self.halves = {cut.name: tuple(half.eval() for half in split(model, example, cut.name)) for cut in self.cuts}
        layers = {cut.name: cut.layers for cut in cuts[1:]}
        names = [cut.name for cut in cuts[1:]]
        self.blocks = {cut.name: names[: names.index(cut.name) + 1] for cut in self.cuts}
        self.pruners: dict[str, tuple[Pruner, Scores] | None] = {}
        self.layers = {cut: {block: layers[block] for block in blocks} for cut, blocks in self.blocks.items()}

    def pair(self, number: int) -> tuple[nn.Module, nn.Module | None]:
        cut = self.cuts[number % len(self.cuts)]
        whole, tail = self.halves[cut.name]
        head = rebuild(whole, self.plan(cut.name))
        if cut.name == OUTPUT:
            return head, None
        with torch.no_grad():
            shape = tuple(head(self.example).shape[1:])
        stride = int(self.random.choice(_strides(cut.shape)))
        width = int(self.random.choice([width for width in CODE_CHANNELS if width <= cut.shape[0]]))
        codec = UniformCodec(CodecSpec("uniform", width, stride, BITS), shape, cut.shape[0])
        return nn.Sequential(head, codec.encode, codec.quantise).eval(), nn.Sequential(codec.dequantise, codec.decode, tail).eval()

    def plan(self, cut: str) -> ChannelPlan:
        """Random channels of the half up to `cut`."""
        if (known := self._pruner(cut)) is None or self.random.random() < WHOLE_SHARE:
            return ChannelPlan()
        chooser, scores = known
        even = self.random.uniform(LEAST_KEPT, 1) if self.random.random() < EVEN_SHARE else None
        step = self.channel_block if self.random.random() < ALIGNED_SHARE else 1
        keep = {name: self._ratio(len(scores[name]), step, even) for name in chooser.groups}
        if self.random.random() < DROPPED_SHARE:
            keep[str(self.random.choice(self.blocks[cut]))] = 0.0
        for attempt in (keep, {name: ratio for name, ratio in keep.items() if ratio > 0}):
            try:
                return chooser.plan(attempt, scores)
            except ModelError:  # no shortcut goes past that block, or a layer would have been left without channels
                continue
        return ChannelPlan()

    def _ratio(self, channels: int, step: int, even: float | None) -> float:
        ratio = self.random.uniform(LEAST_KEPT, 1) if even is None else even
        return min(1.0, max(step, round(ratio * channels / step) * step) / channels)

    def _pruner(self, cut: str) -> tuple[Pruner, Scores] | None:
        if cut not in self.pruners:
            head, _ = self.halves[cut]
            try:
                chooser = Pruner(head, self.example, self.layers[cut], cut_channels=cut != OUTPUT)
                self.pruners[cut] = chooser, chooser.scores(head)
            except ModelError:
                self.pruners[cut] = None
        return self.pruners[cut]


def _strides(shape: Sequence[int]) -> list[int]:
    """Those with which a codec fits the feature."""
    found = []
    for stride in STRIDES:
        try:
            code_shape(shape, 1, stride)
        except ModelError:
            continue
        found.append(stride)
    return found


class _Tree(nn.Module):
    """Several halves as one network with the result of each as an output: one export, which is slow, can then be cut at any of them."""

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module | None]]) -> None:
        super().__init__()
        self.device = nn.ModuleList(device for device, _ in pairs)
        self.edge = nn.ModuleList(edge or nn.Identity() for _, edge in pairs)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        results: list[Tensor] = []
        for device, edge in zip(self.device, self.edge, strict=True):
            results.append(device(x))
            if not isinstance(edge, nn.Identity):
                results.append(edge(results[-1]))
        return tuple(results)


def _exported(pairs: Sequence[tuple[nn.Module, nn.Module | None]], example: Tensor) -> Iterator[tuple[bytes, bytes]]:
    names = [name for number, (_, edge) in enumerate(pairs) for name in ([f"device{number}", f"edge{number}"] if edge else [f"device{number}"])]
    extractor = Extractor(export_model(_Tree(pairs).eval(), example, input_name="image", output_names=names))

    def cut(source: str, result: str) -> bytes:
        return canonical_bytes(extractor.extract_model([source], [result]))

    for number, (_, edge) in enumerate(pairs):
        yield cut("image", f"device{number}"), cut(f"device{number}", f"edge{number}") if edge else b""
