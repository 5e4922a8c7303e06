"""What a search has to choose from: the cuts of one backbone, the codecs that fit them, and the channels that may go."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from models.channel_plan import ChannelPlan
from models.channels import check_noise
from models.codec import CodecSpec, code_shape
from models.cutting import CutPoint, split
from models.pruning import Pruner, Scores
from pipeline.errors import ModelError, ParamsError
from pipeline.networks import codec_spec, layers_up_to, pruner
from pipeline.params import Codec, Search
from pipeline.search.candidate import Candidate
from pipeline.search.optuna import Space


class Problem:
    """One backbone, cut and pruned as the settings allow; nothing here is trained or measured.

    `backbone` is put into eval mode and not changed otherwise; `cuts` are its cut points, input first. Kept counts are rounded to `channel_block`.
    """

    def __init__(self, backbone: nn.Module, cuts: Sequence[CutPoint], settings: Search, codec: Codec, channel_block: int) -> None:
        self.backbone = backbone.eval().to(memory_format=torch.channels_last)
        self.cuts, self.settings, self.codec, self.channel_block = cuts, settings, codec, channel_block
        self.example = torch.zeros(1, *cuts[0].shape)
        self._heads: dict[str, nn.Module] = {}
        self._pruners: dict[str, tuple[Pruner, Scores] | ModelError] = {}
        self._keep: dict[str, dict[str, tuple[float, ...]]] = {}

    def space(self) -> Space:
        """The candidates that can run: legal codecs for every cut, legal keep ratios for every block with channels to prune.

        Raises:
            ParamsError: a width, stride or keep ratio that fits nowhere.
        """
        self._check_settings()
        codes = {}
        for point in self._coded_cuts():
            channels = [width for width in self.settings.code_channels if _codec_fits(point.shape, width, 1)]
            strides = [stride for stride in self.settings.strides if _codec_fits(point.shape, 1, stride)]
            if self._raw:
                channels, strides = [point.shape[0]], [1]
            if channels and strides:
                codes[point.name] = (channels, strides)
        settings = self.settings
        several = self.codec.kind == "multi-rate"
        return Space(
            codes,
            [8] if several or self._raw or self.codec.kind.startswith("jscc") else settings.bits,
            settings.webp_qualities,
            self.legal_keep,
            self.codec.kind,
            settings.rate_weights,
            settings.precision,
            list(zip(self.codec.shares, self.codec.bits, strict=True)) if several else (),
        )

    @property
    def _raw(self) -> bool:
        """Whether features cross as they are: all channels, at every place."""
        return self.codec.kind.startswith("raw")

    def _coded_cuts(self) -> list[CutPoint]:
        """Where a codec fits: at maps, or at vectors where all are, since what pools a map to a vector on the device classifies there (METHODS 3)."""
        fitting = [point for point in self.cuts[1:-1] if _codec_fits(point.shape, 1, 1)]
        return [point for point in fitting if len(point.shape) == 3] or fitting

    def _check_settings(self) -> None:
        if self.codec.kind.startswith("jscc"):
            try:
                check_noise(self.codec.kind, *self.codec.noise)
            except ModelError as error:
                raise ParamsError(f"codec.noise: {error}") from None
        shapes = [point.shape for point in self._coded_cuts()] if not self._raw else []
        for number, width in enumerate(self.settings.code_channels):
            if shapes and not any(_codec_fits(shape, width, 1) for shape in shapes):
                widest = max(shape[0] for shape in shapes)
                cut = "cut of 2x2 or more" if len(shapes[0]) == 3 else "cut"
                raise ParamsError(f"search.code_channels.{number} is {width}, but no {cut} has over {widest} channels; choose at most that.")
        for number, stride in enumerate(self.settings.strides):
            if shapes and not any(_codec_fits(shape, 1, stride) for shape in shapes):
                why = "leaves less than 2x2 of the feature at every cut" if len(shapes[0]) == 3 else "does not suit vectors, which all cuts give"
                raise ParamsError(f"search.strides.{number} is {stride}, which {why}; choose a smaller one.")
        whole = self.cuts[-1].name
        blocks = list(layers_up_to(self.cuts, whole))
        for number, ratio in enumerate(self.settings.keep):
            answers = [self._lost(whole, block, ratio) for block in blocks]
            refusals = [answer for answer in answers if isinstance(answer, ModelError)]
            if refusals and not isinstance(self._pruners[whole], ModelError) and not any(answer is True for answer in answers):
                raise ParamsError(f"search.keep.{number} is {ratio}, which suits no block: {refusals[0]}")

    def remarks(self) -> list[str]:
        """What of the settings comes to nothing with this backbone, a sentence each."""
        coded, whole = self._coded_cuts(), self.cuts[-1].name
        found = []
        if not coded:
            found.append("no cut gives a map or vector that a codec fits, so only sending the image and staying on the device are compared.")
        self.legal_keep(whole)
        if isinstance(reason := self._pruners.get(whole), ModelError):
            cuts = [point.name for point in (*coded, self.cuts[-1]) if not self.legal_keep(point.name)]
            found.append(f"search.keep comes to nothing for the device halves that end at {', '.join(cuts)}: {reason}")
        return found

    def legal_keep(self, cut: str) -> Mapping[str, Sequence[float]]:
        """For each block before `cut` that loses channels when pruned: the ratios that leave every layer some, and 1.0."""
        if self._raw and cut != self.cuts[-1].name:
            return {}
        if cut not in self._keep:
            ratios = [ratio for ratio in sorted(self.settings.keep) if ratio < 1]
            legal = {block: [ratio for ratio in ratios if self._lost(cut, block, ratio) is True] for block in layers_up_to(self.cuts, cut)}
            self._keep[cut] = {block: (*found, 1.0) for block, found in legal.items() if found}
        return self._keep[cut]

    def _lost(self, cut: str, block: str, ratio: float) -> bool | ModelError:
        """Whether the block loses channels when pruned so, or why it cannot be."""
        try:
            return bool(self.plan(cut, {block: ratio}).kept)
        except ModelError as error:
            return error

    def specs(self, cut: str) -> list[CodecSpec]:
        """The codecs that the space has at `cut`; none for kinds without weights to share."""
        space = self.space()
        if self._raw or cut not in space.codes:
            return []
        channels, strides = space.codes[cut]
        rates = self.settings.rate_weights if self.codec.kind == "rate" else [None]
        shares = list(zip(self.codec.shares, self.codec.bits, strict=True)) if self.codec.kind == "multi-rate" else []
        found = []
        for width, stride, bits, rate in itertools.product(channels, strides, space.bits, rates):
            points = tuple((max(1, round(share * width)), own_bits) for share, own_bits in shares)
            code = Candidate(cut, code_channels=width, stride=stride, bits=bits, codec=self.codec.kind, rate_weight=rate, points=points)
            found.append(codec_spec(code, self.codec))
        return found

    def feature_channels(self, cut: str, plan: ChannelPlan) -> tuple[int, ...] | None:
        """The channels of the feature at `cut` that `plan`, one of `plan` for this cut, leaves; None where that is all of them."""
        known = self._pruners.get(cut)
        if not plan.kept or known is None or isinstance(known, ModelError):
            return None
        channels = known[0].feature_channels(plan)
        point = next(point for point in self.cuts if point.name == cut)
        return channels if len(channels) < point.shape[0] else None

    def head(self, cut: str) -> nn.Module:
        """The device half of the backbone, sharing its weights."""
        if cut not in self._heads:
            self._heads[cut], _ = split(self.backbone, self.example, cut)
        return self._heads[cut]

    def plan(self, cut: str, keep: Mapping[str, float]) -> ChannelPlan:
        """Which channels stay, by l1 norms.

        Raises:
            ModelError: a ratio that leaves a layer nothing, or a half that Torch-Pruning cannot follow.
        """
        if not keep:
            return ChannelPlan()
        if cut not in self._pruners:
            head = self.head(cut)
            try:
                chooser = pruner(head, self.example, self.cuts, cut, self.channel_block)
                self._pruners[cut] = chooser, chooser.scores(head)
            except ModelError as error:  # kept: finding out takes seconds, and is asked for every block
                self._pruners[cut] = error
        known = self._pruners[cut]
        if isinstance(known, ModelError):
            raise known
        chooser, scores = known
        return chooser.plan(keep, scores)


def _codec_fits(shape: tuple[int, ...], code_channels: int, stride: int) -> bool:
    try:
        code_shape(shape, code_channels, stride)
    except ModelError:
        return False
    return True
