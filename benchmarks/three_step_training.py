"""What all trainings of results/three_step.json share: their settings, the teacher, and where their state lies.

Trained weights and unfinished trainings lie under .coinfer/three-step/ of the example's folder, so a sweep goes on where it was stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save
from torch import Tensor, nn

from models.backbones import build_backbone
from pipeline.data import View, load_card, load_split
from pipeline.distilling import Distiller, Ensemble
from pipeline.files import atomic_write_bytes
from pipeline.frozen_head import COPIES
from pipeline.params import Finetune
from pipeline.training import Classifier, DataModule, computes_bf16, fit

STATE = Path(".coinfer/three-step")
RECIPE = 7  # to be raised with any change to what a training computes: points that were trained by another recipe are trained again
WEIGHTS = {"resnet20": "weights/resnet20-cifar10jpeg.safetensors", "resnet56": "weights/resnet56-cifar10jpeg.safetensors"}
THREADS = 1  # two sweeps side by side get more out of two cores than one with two threads
SETTINGS = Finetune(
    epochs=1,
    batch_size=128,
    learning_rate=0.01,
    weight_decay=5e-4,
    ema_decay=0.998,
    distill_logits=4.0,
    distill_feature=0.0,
    flip=True,
    crop_padding=4,
    cutmix=0.5,
)
FROZEN = SETTINGS.model_copy(update={"learning_rate": 0.05, "distill_feature": 0.2})  # behind a frozen head
LONG = SETTINGS.model_copy(update={"learning_rate": 0.02}), 10  # settings of trainings of as many epochs or more
PRUNE_ROUNDS = 3
STATISTICS_IMAGES, CHOICE_IMAGES = 1_024, 1_000


def recipe() -> list[Any]:
    return [all_settings(), load_card().sha256, {name: digest(Path(file)) for name, file in WEIGHTS.items()}]


def all_settings() -> list[Any]:
    """What of `recipe` is known without data."""
    return [RECIPE, SETTINGS.model_dump(), LONG[0].model_dump(), LONG[1], FROZEN.model_dump(), PRUNE_ROUNDS, STATISTICS_IMAGES, CHOICE_IMAGES, COPIES]


def named(*known: Any) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


class Remembered(nn.Module):
    """What `network` answers to each batch of images, computed once: all trainings see the same batches in the same epochs."""

    def __init__(self, network: nn.Module, folder: Path) -> None:
        super().__init__()
        self.network, self.folder = network.eval(), folder
        self.known: dict[str, Tensor] = {}
        self.fresh: dict[str, Tensor] = {}
        self.files: set[Path] = set()

    def forward(self, images: Tensor) -> Tensor:
        name = hashlib.blake2b(images.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
        if name not in self.known:
            self.look()
        if name not in self.known:
            with torch.autocast("cpu", torch.bfloat16, computes_bf16(self.network, "auto")):  # whoever asks first
                logits = self.network(images)
            self.known[name] = self.fresh[name] = logits.float().contiguous()
            if len(self.fresh) >= 25:
                self.keep()
        return self.known[name]

    def look(self) -> None:
        """For what a sweep side by side, or an earlier one, has kept."""
        for file in set(self.folder.glob("*.safetensors")) - self.files:
            self.known |= load_file(file)
            self.files.add(file)

    def keep(self) -> None:
        if self.fresh:
            atomic_write_bytes(self.folder / f"{next(iter(self.fresh))}.safetensors", save(self.fresh))
            self.fresh = {}


@cache
def teacher() -> Remembered:
    """Of every training: the mean of the trained backbones."""
    card = load_card()
    networks = [build_backbone(name, card.num_classes, card.image_size, Path(file)) for name, file in WEIGHTS.items()]
    return Remembered(Ensemble(networks).to(memory_format=torch.channels_last), STATE / f"teacher-{named(recipe()[-1])}")


def train(lesson: Distiller, name: str, folder: str, epochs: int, seed: int = 0, view: View | None = None, callbacks: Sequence[Callback] = ()) -> None:
    """Train what `lesson` holds, in place; state lies in `folder`."""
    fit_kept(lesson, DataModule(load_split("train"), load_split("validation"), lesson.settings, seed, view), name, folder, epochs, callbacks)


def fit_kept(lesson: Classifier, data: DataModule, name: str, folder: str, epochs: int, callbacks: Sequence[Callback] = ()) -> None:
    fit(
        lesson,
        data,
        name=name,
        epochs=epochs,
        checkpoint_dir=STATE / folder,
        threads=THREADS,
        precision=lesson.settings.precision,
        log=lambda row: print(time.strftime("%H:%M"), name, {key: round(value, 4) for key, value in row.items()}, flush=True),
        callbacks=callbacks,
    )
    teacher().keep()


def digest(path: Path) -> str:
    """Of a file; of what is trained here its name, which says all it depends on and is the same on every machine."""
    if path.parent == STATE:
        return path.stem
    return _digest(path, path.stat().st_mtime_ns)


@cache
def _digest(path: Path, changed_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def alone(name: str) -> Iterator[None]:
    """With `name` to itself: a sweep side by side that wants the same waits, and then finds it done."""
    STATE.mkdir(parents=True, exist_ok=True)
    with (STATE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
