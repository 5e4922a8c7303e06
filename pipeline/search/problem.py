"""What a search has to choose from: the cuts of one backbone, the codecs that fit them, and the channels that may go."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

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
from pipeline.search.space import Space


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
        self._inside: dict[str, dict[str, frozenset[str]]] = {}

    def space(self) -> Space:
        """The candidates that can run: legal codecs for every cut, legal keep ratios for every group of channels to prune.

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
        return Space(
            codes,
            settings.bits,
            [(image_format, quality) for image_format, qualities in settings.images.items() for quality in qualities],
            self.legal_keep,
            settings.codecs,
            settings.rate_weights,
            settings.precision,
            list(zip(self.codec.shares, self.codec.bits, strict=True)),
            self.groups_inside,
        )

    @property
    def _raw(self) -> bool:
        """Whether features cross as they are: all channels, at every place. No other codec is then beside that one (`params.Search`)."""
        return self.settings.codecs[0].startswith("raw")

    def _coded_cuts(self) -> list[CutPoint]:
        """Where a codec fits: at maps, or at vectors where all are, since what pools a map to a vector on the device classifies there (METHODS 3)."""
        fitting = [point for point in self.cuts[1:-1] if _codec_fits(point.shape, 1, 1)]
        return [point for point in fitting if len(point.shape) == 3] or fitting

    def _check_settings(self) -> None:
        for kind in (kind for kind in self.settings.codecs if kind.startswith("jscc")):
            try:
                check_noise(kind, *self.codec.noise)
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
        for number, ratio in enumerate(self.settings.keep):
            if ratio == 1 or (chooser := self._pruner(whole)) is None:
                continue
            names = list(chooser[0].groups) if ratio else list(layers_up_to(self.cuts, whole))
            answers = [self._plan_of(whole, name, ratio) for name in names]
            refusals = [answer for answer in answers if isinstance(answer, ModelError)]
            if len(refusals) == len(answers) and refusals:
                raise ParamsError(f"search.keep.{number} is {ratio}, which suits no {'group' if ratio else 'block'}: {refusals[0]}")

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
        """For what of the device half up to `cut` can be pruned, in order of execution: the fractions that may stay, 1.0 last (see `Space`).

        Of fractions that come to the same channels, as the channel block rounds them, the largest is offered; a group that keeps all at any is not.
        """
        if self._raw and cut != self.cuts[-1].name:
            return {}
        if cut not in self._keep:
            self._choose_from(cut)
        return self._keep[cut]

    def groups_inside(self, cut: str) -> Mapping[str, Collection[str]]:
        """For each block that `legal_keep(cut)` lets go, the groups of which nothing is left without it."""
        self.legal_keep(cut)
        return self._inside.get(cut, {})

    def _choose_from(self, cut: str) -> None:
        keep = self._keep[cut] = {}
        inside = self._inside[cut] = {}
        ratios = [ratio for ratio in sorted(self.settings.keep) if 0 < ratio < 1]
        if not (ratios or 0 in self.settings.keep) or (known := self._pruner(cut)) is None:
            return
        block_of = known[0].groups
        for block, layers in layers_up_to(self.cuts, cut).items():
            without = self._plan_of(cut, block, 0) if 0 in self.settings.keep else None
            dropped = without.dropped if isinstance(without, ChannelPlan) else frozenset[str]()
            if dropped:
                keep[block], inside[block] = (0.0, 1.0), frozenset[str]()
            for group in sorted((name for name, its in block_of.items() if its == block), key=layers.index):
                plans = {ratio: plan for ratio in ratios if isinstance(plan := self._plan_of(cut, group, ratio), ChannelPlan) and plan.kept}
                if not plans:
                    continue
                largest = {plan.to_json(): ratio for ratio, plan in plans.items()}
                keep[group] = (*sorted(largest.values()), 1.0)
                if dropped.issuperset(next(iter(plans.values())).kept):
                    inside[block] |= {group}

    def _plan_of(self, cut: str, name: str, ratio: float) -> ChannelPlan | ModelError:
        """What stays when one block or group is pruned so, or why it cannot be."""
        try:
            return self.plan(cut, {name: ratio})
        except ModelError as error:
            return error

    def specs(self, cut: str) -> list[CodecSpec]:
        """The codecs that the space has at `cut`; none for kinds without weights to share."""
        space = self.space()
        if self._raw or cut not in space.codes:
            return []
        found = []
        for codec in space.codecs:
            asked = space.asked(cut, codec)
            for values in itertools.product(*asked.values()):
                code = _unpruned(space, cut, {"codec": codec, **dict(zip(asked, values, strict=True))})
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
        known = self._pruner(cut)
        if known is None:
            raise self._pruners[cut]  # type: ignore[misc]
        chooser, scores = known
        return chooser.plan(keep, scores)

    def _pruner(self, cut: str) -> tuple[Pruner, Scores] | None:
        """What chooses the channels of the half up to `cut`; None where Torch-Pruning cannot follow it."""
        if cut not in self._pruners:
            head = self.head(cut)
            try:
                chooser = pruner(head, self.example, self.cuts, cut, self.channel_block)
                self._pruners[cut] = chooser, chooser.scores(head)
            except ModelError as error:  # kept: finding out takes seconds, and is asked for every group
                self._pruners[cut] = error
        known = self._pruners[cut]
        return None if isinstance(known, ModelError) else known


def _unpruned(space: Space, cut: str, code: Mapping[str, Any]) -> Candidate:
    return space.suggest_at(cut, lambda name, choices: code.get(name, choices[-1]))


def _codec_fits(shape: tuple[int, ...], code_channels: int, stride: int) -> bool:
    try:
        code_shape(shape, code_channels, stride)
    except ModelError:
        return False
    return True
