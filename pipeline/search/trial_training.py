"""The short training that a trial gets: a fresh codec, and what of the backbone it moves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.coinference import CoInference
from pipeline.data import Split, normalise
from pipeline.inference import outputs, recalibrated
from pipeline.losses import feature_loss, logits_loss
from pipeline.search.problem import Problem

TEMPERATURE = 2.0
FEATURE_WEIGHT = 1.0
# The backbone is trained already and only adapts; the codec starts from nothing.
BACKBONE_RATE = 0.3
SAMPLE_IMAGES = 512  # for coder tables, batch-norm statistics, and of validation to be coded: means do not change beyond
FEATURE_CACHE_BYTES = 1 << 30


class TrialTraining:
    """Trains networks of `problem` on a seeded subset of `train` = (images uint8 (N, 3, S, S), labels int64 (N,)), taught by its backbone."""

    def __init__(self, problem: Problem, train: Split, seed: int) -> None:
        self.problem, self.settings = problem, problem.settings
        chosen = np.random.default_rng(seed).permutation(len(train[1]))[: self.settings.train_images]
        self.images, self.labels = (tensor[torch.from_numpy(chosen)] for tensor in train)
        self.teacher_logits = outputs(problem.backbone, self.images)
        self._features: dict[str, Tensor] = {}

    @property
    def sample(self) -> Tensor:
        """The images that coder tables and batch-norm statistics are taken from."""
        return self.images[:SAMPLE_IMAGES]

    def run(self, network: nn.Module, cut: str | None, trial_seed: int, *, pruned: bool) -> None:
        """A few one-cycle steps of Adam on cross-entropy, the teacher's logits and, for a split, its feature at the cut (METHODS 3)."""
        network.train().to(memory_format=torch.channels_last)
        split_network = network if isinstance(network, CoInference) else None
        whole_head = split_network is not None and not pruned
        codec = list(split_network.codec.parameters()) if split_network else []
        apart = {id(parameter) for parameter in [*codec, *(split_network.head.parameters() if split_network and whole_head else [])]}
        rates = [self.settings.learning_rate, self.settings.learning_rate * BACKBONE_RATE]
        groups = [(group, rate) for group, rate in zip((codec, [p for p in network.parameters() if id(p) not in apart]), rates, strict=True) if group]
        optimiser = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in groups])
        steps = self.settings.codec_steps
        # One-cycle divides by what lies between its phases, which very few steps leave empty.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [rate for _, rate in groups], total_steps=max(steps, 10))
        for chosen in itertools.islice(self._batches(trial_seed), steps):
            labels = self.labels[chosen]
            if split_network is not None:
                assert cut is not None
                feature = self._teacher_feature(cut, chosen)
                # A head that is not pruned stays as it is, so what it gives is known already: most of a step's time.
                decoded, loss = split_network.codec(feature if whole_head else split_network.head(normalise(self.images[chosen])))
                logits = split_network.tail(decoded)
                loss = loss + FEATURE_WEIGHT * feature_loss(decoded, feature)
            else:
                logits = network(normalise(self.images[chosen]))
                loss = torch.zeros(())
            loss = loss + F.cross_entropy(logits, labels) + logits_loss(logits, self.teacher_logits[chosen], TEMPERATURE)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
        trained = [split_network.codec, split_network.tail] if split_network and whole_head else [network]
        recalibrated(network, self.sample, trained)

    def _batches(self, trial_seed: int) -> Iterator[Tensor]:
        """Indices into the subset, epoch after epoch in a fresh order."""
        rng = np.random.default_rng(trial_seed)
        size = min(self.settings.batch_size, len(self.labels))
        while True:
            order = torch.from_numpy(rng.permutation(len(self.labels)))
            yield from torch.split(order[: len(order) // size * size], size)

    def _teacher_feature(self, cut: str, chosen: Tensor) -> Tensor:
        """The unsplit backbone's feature at `cut` for `chosen` images of the subset; kept from trial to trial while memory allows."""
        point = next(point for point in self.problem.cuts if point.name == cut)
        needed = 4 * point.elements * len(self.labels)
        if cut not in self._features:
            head = self.problem.head(cut)
            if needed > FEATURE_CACHE_BYTES:
                with torch.no_grad():
                    return head(normalise(self.images[chosen]))
            while self._features and sum(feature.nbytes for feature in self._features.values()) + needed > FEATURE_CACHE_BYTES:
                self._features.pop(next(iter(self._features)))
            self._features[cut] = outputs(head, self.images)
        return self._features[cut][chosen]
