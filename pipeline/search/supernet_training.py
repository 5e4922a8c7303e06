"""Training a supernet: the widest, the narrowest and a random member share every batch, taught by the trained backbone (arXiv 1903.05134)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.channel_plan import ChannelPlan
from pipeline.data import Split, normalise
from pipeline.inference import outputs
from pipeline.losses import feature_loss, logits_loss
from pipeline.params import Supernet as Settings
from pipeline.params import Training
from pipeline.search.problem import Problem
from pipeline.search.supernet import SplitSupernet, feature_of, pruned_output
from pipeline.search.trial_training import BACKBONE_RATE, FEATURE_CACHE_BYTES, FEATURE_WEIGHT, TEMPERATURE
from pipeline.training import Classifier, DataModule

GRADIENT_NORM = 5.0  # a narrow member with most channels silenced now and then gives a step that the shared weights do not come back from


class Taught(DataModule):
    """Batches of training images as they are, in an order of each epoch's own, with what the teacher makes of them.

    A batch is (images float32 (B, 3, S, S), labels (B,), the teacher's logits (B, classes), a seed, the teacher's features at `cut` (B, C, H, W) if given).
    The features are kept from epoch to epoch where memory allows.
    """

    def __init__(self, problem: Problem, train: Split, teacher_logits: Tensor, settings: Settings, seed: int, cut: str | None = None) -> None:
        super().__init__(train, (train[0][:0], train[1][:0]), training(settings), seed)
        self.problem, self.teacher_logits, self.cut, self.epochs = problem, teacher_logits, cut, settings.epochs
        self.features: Tensor | None = None

    def train_dataloader(self) -> _Batches:  # type: ignore[override]
        if self.cut is not None and self.features is None and self.epochs > 1:
            point = next(point for point in self.problem.cuts if point.name == self.cut)
            if 4 * point.elements * len(self.train[1]) <= FEATURE_CACHE_BYTES:
                self.features = outputs(self.problem.head(self.cut), self.train[0])
        return _Batches(self)

    def val_dataloader(self) -> Any:
        return []  # batch norms know no member's statistics before they are recalibrated

    @property
    def epoch(self) -> int:
        return self._epoch()


class _Batches:
    """One pass each time it is iterated, a function of seed and epoch alone."""

    def __init__(self, data: Taught) -> None:
        self.data, self.size = data, min(data.settings.batch_size, len(data.train[1]))

    def __len__(self) -> int:
        return len(self.data.train[1]) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        data, (images, labels) = self.data, self.data.train
        order = torch.from_numpy(np.random.default_rng((data.seed, data.epoch)).permutation(len(labels)))
        for step, chosen in enumerate(torch.split(order[: len(self) * self.size], self.size)):
            seed = torch.tensor(int(np.random.default_rng((data.seed, data.epoch, step)).integers(2**31)))
            batch = normalise(images[chosen]), labels[chosen], data.teacher_logits[chosen], seed
            if data.cut is None:
                yield batch
            elif data.features is not None:
                yield *batch, data.features[chosen]
            else:
                with torch.no_grad():
                    yield *batch, data.problem.head(data.cut)(batch[0])


class Lesson(Classifier):
    """One-cycle Adam on the mean loss of a batch's members."""

    rates: Sequence[tuple[nn.Module, float]]  # parts of the network, and their share of the learning rate

    def __init__(self, network: nn.Module, settings: Settings) -> None:
        super().__init__(network, training(settings), 0.0)

    def configure_optimizers(self) -> Any:
        peaks = [self.settings.learning_rate * rate for _, rate in self.rates]
        optimizer = torch.optim.Adam([{"params": part.parameters(), "lr": peak} for (part, _), peak in zip(self.rates, peaks, strict=True)])
        # one-cycle divides by what lies between its phases, which very few steps leave empty
        steps = max(int(self.trainer.estimated_stepping_batches), 10)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_NORM)


class BodyLesson(Lesson):
    """The whole network: for half of a batch nothing is silenced, or all that the space can silence, for the other half a random plan of one of `cuts`."""

    def __init__(self, problem: Problem, network: nn.Module, cuts: Sequence[str], settings: Settings) -> None:
        super().__init__(network, settings)
        self.problem, self.cuts, self.rates = problem, cuts, [(network, BACKBONE_RATE)]

    def loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        known, seed = more
        rng = np.random.default_rng(int(seed))
        torch.manual_seed(int(seed))
        extreme = ChannelPlan() if rng.random() < 0.5 else narrowest(self.problem, self.cuts[-1])
        plans = [extreme, random_plan(self.problem, self.cuts[int(rng.integers(len(self.cuts)))], rng)]
        losses = []
        for plan, own in zip(plans, parts(len(labels), len(plans)), strict=False):
            losses.append(_taught(pruned_output(self.network, plan, images[own]), labels[own], known[own]))
        return torch.stack(losses).mean()


class SplitLesson(Lesson):
    """Codecs and edge half of a cut: the widest, the narrowest and a random one, for a third of a batch each, behind the whole device half or a pruned one.

    Each is as often of one kind of codec as of another, however many sizes of it there are.
    `head` is the device half that bears pruning, which stays as it is; None where nothing is pruned.
    """

    def __init__(self, problem: Problem, cut: str, network: SplitSupernet, head: nn.Module | None, settings: Settings) -> None:
        super().__init__(network, settings)
        self.problem, self.cut, self.members = problem, cut, network
        self._head: tuple[nn.Module, ...] = (head.train(),) if head is not None else ()  # a tuple, so that torch does not train it along
        self.rates = [(network.codecs, 1.0), (network.tail, BACKBONE_RATE)]
        kinds = [network.codec(kind).specs for kind in network.codecs]
        widths = sorted({spec.code_channels for spec in kinds[0]})  # which all of them have
        self.drawn_from = [[[spec for spec in specs if spec.code_channels in some] for specs in kinds] for some in (widths[-1:], widths[:1], widths)]

    def loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        known, seed, feature = more
        rng = np.random.default_rng(int(seed))
        torch.manual_seed(int(seed))  # for dropout and noise
        plan = ChannelPlan()
        if self._head:
            plan = narrowest(self.problem, self.cut) if rng.random() < 0.25 else random_plan(self.problem, self.cut, rng)
        channels = self.problem.feature_channels(self.cut, plan)
        losses = []
        for kinds, own in zip(self.drawn_from, parts(len(labels), len(self.drawn_from)), strict=False):
            specs = kinds[int(rng.integers(len(kinds)))]
            spec, given = specs[int(rng.integers(len(specs)))], feature[own]
            read: tuple[int, ...] | None = None
            # each behind either head: a width that only ever saw one of them fails behind the other
            if plan.kept and rng.random() < 0.5:
                with torch.no_grad():
                    given, read = feature_of(pruned_output(self._head[0], plan, images[own]), channels), channels
            coded = self.members.codec(spec.kind).code(spec, given, read)
            loss = _taught(self.members.tail(coded.decoded), labels[own], known[own])
            losses.append(loss + coded.loss + FEATURE_WEIGHT * feature_loss(coded.decoded, feature[own]))
        return torch.stack(losses).mean()


def parts(count: int, members: int) -> list[slice]:
    """A batch of `count` images shared out among `members`, fewer where there would be less than two images for each: as many steps, a fraction of the work."""
    ends = np.linspace(0, count, max(1, min(members, count // 2)) + 1).astype(int)
    return [slice(int(first), int(last)) for first, last in itertools.pairwise(ends)]


def _taught(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels) + logits_loss(logits, known, TEMPERATURE)


def random_plan(problem: Problem, cut: str, rng: np.random.Generator) -> ChannelPlan:
    """Each of what may be pruned before `cut` at a ratio of its own."""
    return problem.plan(cut, {name: float(rng.choice(ratios)) for name, ratios in problem.legal_keep(cut).items()})


def narrowest(problem: Problem, cut: str) -> ChannelPlan:
    """All that may be pruned before `cut` at its least ratio."""
    return problem.plan(cut, {name: min(ratios) for name, ratios in problem.legal_keep(cut).items()})


def training(settings: Settings) -> Training:
    """`settings` as every training has them."""
    return Training(
        epochs=settings.epochs, batch_size=settings.batch_size, learning_rate=settings.learning_rate, ema_decay=0, precision=settings.precision, crop_padding=0
    )
