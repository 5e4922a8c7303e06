"""The prepared splits as tensors, and the batches a training draws from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import DataError
from pipeline.files import read_json
from pipeline.params import Training
from pipeline.paths import DATA_CARD, split_file
from pipeline.runtime.images import Format, encode_image, open_encoded
from pipeline.runtime.preprocess import MEAN, STD, Preprocessing

EVALUATION_BATCH = 256
Split = tuple[Tensor, Tensor]
View = Callable[[Tensor], Tensor]  # uint8 (B, 3, S, S) -> uint8 (B, 3, S, S)


def load_split(name: str) -> Split:
    """Images uint8 (N, 3, S, S) and labels int64 (N,) of `train`, `validation`, `gate` or `test`.

    safetensors maps the file instead of reading it, so data larger than memory works: pages come in as batches ask for them.

    Raises:
        DataError: the file is missing, damaged, or not written by `prepare`.
    """
    path = split_file(name)
    try:
        tensors = load_file(path)
        return tensors["images"], tensors["labels"]
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run `dvc repro` to make it.") from None
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it and run `dvc repro` again.") from error


@dataclass(frozen=True)
class Card:
    """What the training stages need to know of artifacts/data/card.json."""

    num_classes: int
    image_size: int
    sha256: str


def load_card() -> Card:
    """The data card that `prepare` wrote.

    Raises:
        CoinferError: it is missing or not JSON.
    """
    fields = read_json(DATA_CARD, "the data card")
    return Card(len(fields["classes"]), int(fields["image_size"]), str(fields["sha256"]["all"]))


@dataclass(frozen=True)
class Sent:
    """uint8 images (B, 3, S, S) -> what is left of them when sent in an image format: the same shape and type."""

    image_format: Format
    quality: int

    def __call__(self, images: Tensor) -> Tensor:
        return self.and_files(images)[0]

    def and_files(self, images: Tensor) -> tuple[Tensor, list[bytes]]:
        """The images as they arrive, and the files that were sent."""
        files = [encode_image(image.numpy(), self.image_format, self.quality) for image in images]
        arrived = [np.asarray(open_encoded(file, self.image_format, self.quality).convert("RGB")).transpose(2, 0, 1) for file in files]
        return torch.from_numpy(np.stack(arrived)), files


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) -> float32 of the same shape in channels_last memory, by the arithmetic that the device uses too."""
    tensor = torch.from_numpy(Preprocessing(images.shape[-1], MEAN, STD).tensor(images.numpy()))
    return tensor.contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, chosen: Tensor, padding: int, flip: bool, rng: np.random.Generator) -> Tensor:
    """The `chosen` (B,) of `images` uint8 (N, 3, S, S), each with a crop and flip of its own: uint8 (B, 3, S, S).

    The crop is S x S out of the image with a reflected border of `padding` pixels. One gather does it all, so no padded copy is made.
    """
    if not padding and not flip:
        return images[chosen]
    size = images.shape[-1]
    rows, columns = (_reflect(np.arange(size) + rng.integers(-padding, padding + 1, (len(chosen), 1)), size) for _ in range(2))
    if flip:
        flipped = rng.random(len(chosen)) < 0.5
        columns[flipped] = columns[flipped, ::-1]
    gather = chosen[:, None, None, None], torch.arange(3)[:, None, None], torch.from_numpy(rows)[:, None, :, None], torch.from_numpy(columns)[:, None, None, :]
    return images[gather]


def cut_mixed(images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """CutMix (arXiv 1905.04899): in each of `images` (B, 3, S, S) a rectangle of its own is another's; `labels` (B, classes) in proportion to the areas."""
    count, size = len(images), images.shape[-1]
    side = size * np.sqrt(rng.random((count, 1)))
    within = [np.abs(np.arange(size) + 0.5 - size * rng.random((count, 1))) < side / 2 for _ in range(2)]
    inside = torch.from_numpy(within[0][:, :, None] & within[1][:, None, :])
    others = torch.from_numpy(rng.permutation(count))
    share = inside.float().mean((1, 2))[:, None]
    return torch.where(inside[:, None], images[others], images), torch.lerp(labels, labels[others], share)


def _reflect(positions: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Positions outside 0..size-1 mirrored at the border pixel, which is not repeated."""
    mirrored: np.ndarray[Any, Any] = size - 1 - np.abs(size - 1 - np.abs(positions))
    return mirrored


class Batches:
    """One pass over `split` each time it is iterated: (images float32 (B, 3, S, S), labels int64 (B,)), and with a `view` what that was given, as a third.

    `view` is what becomes of cropped and flipped uint8 images on their way to the network, such as a lossy format. With `cutmix`, labels are float32
    (B, classes) in every batch, the shares of each.

    Order, crops and flips, and torch's own generator (dropout) are a function of (seed, epoch, step) alone, so a training resumed at an
    epoch's start goes on bit for bit as if it had never stopped. The last, smaller batch is left out: batch statistics of a few images only hurt.
    """

    def __init__(self, split: Split, settings: Training, seed: int, epoch: Callable[[], int], view: View | None = None) -> None:
        self.images, self.labels = split
        self.settings, self.seed, self.epoch, self.view = settings, seed, epoch, view
        self.batch_size = min(settings.batch_size, len(self.labels))
        self.classes = int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.labels) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        epoch = self.epoch()
        order = torch.from_numpy(np.random.default_rng((self.seed, epoch)).permutation(len(self.labels)))
        for step, chosen in enumerate(torch.split(order[: len(self) * self.batch_size], self.batch_size)):
            rng = np.random.default_rng((self.seed, epoch, step))
            torch.manual_seed(int(rng.integers(2**31)))
            images, labels = augmented(self.images, chosen, self.settings.crop_padding, self.settings.flip, rng), self.labels[chosen]
            if self.settings.cutmix:
                labels = F.one_hot(labels, self.classes).float()
                if rng.random() < self.settings.cutmix:
                    images, labels = cut_mixed(images, labels, rng)
            yield (normalise(self.view(images)), labels, normalise(images)) if self.view else (normalise(images), labels)


class WholeSplit:
    """All of `split` in order: (images float32 (B, 3, S, S), labels int64 (B,))."""

    def __init__(self, split: Split) -> None:
        self.images, self.labels = split

    def __len__(self) -> int:
        return -(-len(self.labels) // EVALUATION_BATCH)

    def __iter__(self) -> Iterator[Split]:
        for images, labels in zip(torch.split(self.images, EVALUATION_BATCH), torch.split(self.labels, EVALUATION_BATCH), strict=True):
            yield normalise(images), labels
