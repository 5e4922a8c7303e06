"""Training behind a frozen head: its features of augmented images are computed once and kept, so that an epoch costs what lies behind the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.coinference import CoInference
from pipeline.data import Batches, Split
from pipeline.files import atomic_directory
from pipeline.losses import feature_loss, logits_loss
from pipeline.params import Finetune
from pipeline.training import Classifier, DataModule

COPIES = 3  # of the training images, each cropped and flipped in its own way; later epochs see them again in another order


class TailLesson(Classifier):
    """Codec and tail of a split taught by (features, labels, what the teacher says); its head is frozen."""

    def __init__(self, network: CoInference, settings: Finetune) -> None:
        super().__init__(network, settings, 0.0, (network.head,))
        self.split_settings = settings

    def loss(self, images: Tensor, labels: Tensor, original: Tensor | None = None) -> Tensor:
        network, settings = self.network, self.split_settings
        assert isinstance(network, CoInference)
        assert original is not None
        coded = network.codec(images)
        logits = network.tail(coded.decoded)
        loss = F.cross_entropy(logits, labels) + settings.distill_logits * logits_loss(logits, original, settings.temperature)
        return loss + coded.loss + settings.distill_feature * feature_loss(coded.decoded, images)


class FeatureData(DataModule):
    """Batches of (features of `head`, labels, what `teacher` says of the images), the features kept in `folder`; validation images as they are."""

    def __init__(
        self, head: nn.Module, teacher: Callable[[Tensor], Tensor], folder: Path, train: Split, validation: Split, settings: Finetune, seed: int
    ) -> None:
        super().__init__(train, validation, settings, seed)
        self.head, self.teacher, self.folder = head, teacher, folder

    def train_dataloader(self) -> Batches:
        batches = Batches(self.train, self.settings, self.seed, lambda: 0)
        return _FeatureBatches(self, len(batches) * batches.batch_size, batches.batch_size)  # type: ignore[return-value]

    def copy(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        """Features float16, labels and teacher's logits of one pass over the augmented training images."""
        folder = self.folder / f"{self.seed}-{number}"
        if not folder.exists():
            with atomic_directory(folder) as temporary, torch.no_grad():
                self._write(temporary, number)
        return tuple(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("features", "labels", "logits"))  # type: ignore[return-value]

    def _write(self, folder: Path, number: int) -> None:
        batches = Batches(self.train, self.settings, self.seed, lambda: number)
        start, features, labels, logits = 0, None, [], []
        head = self.head.eval()
        for images, truth in batches:
            found = head(images).half().numpy()
            if features is None:
                shape = (len(batches) * batches.batch_size, *found.shape[1:])
                features = np.lib.format.open_memmap(folder / "features.npy", mode="w+", dtype=np.float16, shape=shape)
            features[start : start + len(found)] = found
            start += len(found)
            labels.append(truth.numpy())
            logits.append(self.teacher(images).numpy())
        assert features is not None
        features.flush()
        np.save(folder / "labels.npy", np.concatenate(labels))
        np.save(folder / "logits.npy", np.concatenate(logits))

    @property
    def epoch(self) -> int:
        return self._epoch()


class _FeatureBatches:
    """One pass over a kept copy, in an order that is a function of (seed, epoch) alone."""

    def __init__(self, data: FeatureData, count: int, batch_size: int) -> None:
        self.data, self.count, self.batch_size = data, count, batch_size

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        epoch = self.data.epoch
        arrays = self.data.copy(epoch % COPIES)
        order = np.random.default_rng((self.data.seed, epoch)).permutation(self.count)
        for step, chosen in enumerate(np.split(order, len(self))):
            torch.manual_seed(int(np.random.default_rng((self.data.seed, epoch, step)).integers(2**31)))  # for dropout and noise
            features, labels, logits = (torch.from_numpy(array[chosen]) for array in arrays)
            features = features.float()
            yield features.contiguous(memory_format=torch.channels_last) if features.ndim == 4 else features, labels, logits
