"""Training codec and edge half behind a frozen device half: its features are computed once, so that an epoch costs what lies behind the cut."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.coinference import CoInference
from pipeline.data import Batches, Split
from pipeline.files import atomic_directory
from pipeline.losses import feature_loss, label_loss, logits_loss
from pipeline.params import Finetune
from pipeline.training import Classifier, DataModule

COPIES = 3  # of the training images, each cropped and flipped in its own way; later epochs see them again in another order
MOST_BYTES = 8 << 30  # that kept features may take; larger ones are computed anew in each epoch


class BehindHead(Classifier):
    """Codec and tail of a split, its head frozen, taught as by `SplitDistiller`.

    A batch is (features (B, C, H, W), labels (B,), logits that the teacher gives (B, classes), the teacher's features (B, R, H, W)).
    """

    def __init__(self, network: CoInference, settings: Finetune, label_smoothing: float) -> None:
        super().__init__(network, settings, label_smoothing, (network.head,))
        self.distill_logits, self.distill_feature, self.temperature = settings.distill_logits, settings.distill_feature, settings.temperature

    def loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        network, (known, wanted) = self.network, more
        assert isinstance(network, CoInference)
        coded = network.codec(images)
        logits: Tensor = network.tail(coded.decoded)
        loss: Tensor = label_loss(logits, labels, self.label_smoothing) + coded.loss
        return loss + self.distill_logits * logits_loss(logits, known, self.temperature) + self.distill_feature * feature_loss(coded.decoded, wanted)


class FeatureData(DataModule):
    """Batches for `BehindHead`, and the validation images as they are.

    Args:
        head: the frozen device half, images -> features.
        teacher: (head, rest) of the unsplit teacher: images -> features, features -> logits; or (None, whole), where its features are those of `head`.
        folder: where features are kept, as float16.
    """

    def __init__(
        self, head: nn.Module, teacher: tuple[nn.Module | None, nn.Module], folder: Path, train: Split, validation: Split, settings: Finetune, seed: int
    ) -> None:
        super().__init__(train, validation, settings, seed)
        self.parts = [part.eval().to(memory_format=torch.channels_last) if part is not None else None for part in (head, *teacher)]
        self.folder = folder

    def train_dataloader(self) -> Batches:
        return _FeatureBatches(self)  # type: ignore[return-value]

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """Features, labels, teacher's logits and features of one pass over the augmented training images."""
        head, teacher_head, rest = self.parts
        assert head is not None
        assert rest is not None
        for images, labels in Batches(self.train, self.settings, self.seed, lambda: epoch):
            with torch.no_grad():
                features = head(images)
                wanted = features if teacher_head is None else teacher_head(images)
                logits = rest(images if teacher_head is None else wanted)
            yield features, labels, logits, wanted

    def kept(self, copy: int) -> list[NDArray[Any]]:
        """What `batches` gives, whole and mapped from files that are made the first time; without the teacher's features where they are the same."""
        folder = self.folder / f"{self.seed}-{copy}"
        names = ("features", "labels", "logits", "wanted")[: 3 if self.parts[1] is None else 4]
        if not folder.exists():
            with atomic_directory(folder) as temporary:
                self._keep(temporary, copy, names)
        return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]

    def _keep(self, folder: Path, copy: int, names: tuple[str, ...]) -> None:
        count = len(self.order(0))
        files: dict[str, NDArray[Any]] = {}
        for start, batch in zip(range(0, count, self.batch_size), self.batches(copy), strict=True):
            for name, tensor in zip(names, batch, strict=False):
                values = (tensor.half() if name in ("features", "wanted") else tensor).numpy()
                if name not in files:
                    path, shape = folder / f"{name}.npy", (count, *values.shape[1:])
                    files[name] = np.lib.format.open_memmap(path, mode="w+", dtype=values.dtype, shape=shape)
                    with path.open("r+b") as file:  # a disk that is full says so here; a mapped page without a place on it would end the process
                        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
                files[name][start : start + len(values)] = values
        for array in files.values():
            array.flush()  # type: ignore[attr-defined]

    @property
    def batch_size(self) -> int:
        return min(self.settings.batch_size, len(self.train[1]))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """In which the kept images come, a function of seed and epoch alone."""
        count = len(self.train[1]) // self.batch_size * self.batch_size
        return np.random.default_rng((self.seed, epoch)).permutation(count)

    def fits(self) -> bool:
        """Whether the features of all copies may be kept."""
        first = next(self.batches(0))
        elements = sum(math.prod(tensor.shape[1:]) for tensor in ((first[0],) if self.parts[1] is None else (first[0], first[3])))
        return COPIES * len(self.train[1]) * elements * 2 <= MOST_BYTES

    @property
    def epoch(self) -> int:
        return self._epoch()


class _FeatureBatches:
    """One pass each time it is iterated, a function of seed and epoch alone."""

    def __init__(self, data: FeatureData) -> None:
        self.data, self.keeps = data, data.fits()

    def __len__(self) -> int:
        return len(self.data.order(0)) // self.data.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        data, epoch = self.data, self.data.epoch
        if not self.keeps:
            yield from data.batches(epoch)
            return
        arrays = data.kept(epoch % COPIES)
        for step, chosen in enumerate(np.split(data.order(epoch), len(self))):
            torch.manual_seed(int(np.random.default_rng((data.seed, epoch, step)).integers(2**31)))  # for dropout and noise
            features, labels, logits, *wanted = (torch.from_numpy(array[chosen]) for array in arrays)
            maps = [tensor.float() for tensor in (features, *wanted)]
            maps = [tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor for tensor in maps]
            yield maps[0], labels, logits, maps[-1]
