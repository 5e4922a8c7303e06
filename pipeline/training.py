"""Training with Lightning: what is minimised, how it is stepped, and how an interrupted training goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pipeline.data import Batches, Split, View, WholeSplit
from pipeline.errors import CoinferError, DataError, Interrupted, ParamsError
from pipeline.files import atomic_path, atomic_write_bytes, atomic_write_text
from pipeline.losses import label_loss
from pipeline.params import Precision, Training
from pipeline.paths import CHECKPOINTS, split_file

History = list[dict[str, float]]


class Classifier(LightningModule):
    """`network` (B, 3, S, S) -> logits (B, classes), trained on cross-entropy by one-cycle SGD with Nesterov momentum .9.

    Weight decay acts on matrices and filters only, not on biases and batch norms. `frozen` parts of the network keep their weights and, being in eval
    mode, their batch-norm statistics.
    """

    def __init__(self, network: nn.Module, settings: Training, label_smoothing: float, frozen: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.network, self.settings, self.label_smoothing, self.frozen = network, settings, label_smoothing, tuple(frozen)
        self._losses: list[Tensor] = []
        self._correct = self._seen = 0

    def loss(self, images: Tensor, labels: Tensor, *more: Tensor) -> Tensor:
        """Of a batch: images or what stands for them, labels, and what else the data module gives."""
        return label_loss(self.network(images), labels, self.label_smoothing)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        self._losses.append(loss.detach())
        return loss

    def on_train_epoch_start(self) -> None:
        for part in self.frozen:
            part.eval()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self._correct += int((self.network(images).argmax(1) == labels).sum())
        self._seen += len(labels)

    def take_epoch(self) -> dict[str, float]:
        """Mean training loss and validation accuracy since the last call."""
        row = {"loss": float(torch.stack(self._losses).float().mean()), "accuracy_validation": self._correct / max(self._seen, 1)}
        self._losses, self._correct, self._seen = [], 0, 0
        return row

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.settings.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.settings.learning_rate, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.settings.learning_rate, total_steps=steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DataModule(LightningDataModule):
    """Training batches by `settings` and `seed`, and the validation split as it is; both seen through `view`, if there is one (`Batches`).

    Raises:
        DataError: there is no training image.
        ParamsError: the crop's border is as wide as the image.
    """

    def __init__(self, train: Split, validation: Split, settings: Training, seed: int, view: View | None = None) -> None:
        super().__init__()
        size = train[0].shape[-1]
        if not len(train[1]):
            raise DataError(f"{split_file('train')} holds no image; check data.path and data.validation_fraction in params.yaml.")
        if settings.crop_padding >= size:
            raise ParamsError(f"crop_padding is {settings.crop_padding}, but the images have {size} pixels a side; choose less in params.yaml.")
        self.train, self.settings, self.seed, self.view = train, settings, seed, view
        self.validation = (view(validation[0]), validation[1]) if view else validation

    def train_dataloader(self) -> Batches:
        return Batches(self.train, self.settings, self.seed, self._epoch, self.view)

    def val_dataloader(self) -> WholeSplit:
        return WholeSplit(self.validation)

    def _epoch(self) -> int:
        assert self.trainer is not None
        return self.trainer.current_epoch


class _Averaging(WeightAveraging):
    """Exponential moving average of weights and batch-norm statistics; what is validated and kept.

    The decay grows as (1 + n) / (10 + n) up to `decay`, or a short training would still remember its first steps at the end.
    """

    def __init__(self, decay: float) -> None:
        def average(averages: Sequence[Tensor], currents: Sequence[Tensor], steps: Tensor | int) -> None:
            share = 1 - min(decay, (1 + int(steps)) / (10 + int(steps)))
            if averages[0].is_floating_point():
                torch._foreach_lerp_(list(averages), list(currents), share)
            else:
                torch._foreach_copy_(list(averages), list(currents))

        super().__init__(multi_avg_fn=torch.no_grad()(average))


class _Watch(Callback):
    """Progress bar, a row {epoch, loss, accuracy_validation} per epoch for `log`, and a checkpoint after each but the last."""

    def __init__(self, name: str, epochs: int, checkpoint: Path | None, log: Callable[[dict[str, float]], None]) -> None:
        self.name, self.epochs, self.checkpoint = name, epochs, checkpoint
        self._report = log  # not `log`: Lightning sets that on callbacks
        self.history: History = []
        self.kept = 0
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn()
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        self.task = self.bar.add_task(name, total=None, note="")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.update(self.task, total=int(trainer.estimated_stepping_batches), completed=trainer.global_step)
        for row in self.history:
            self._report(row)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.bar.update(self.task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        row = {"epoch": len(self.history) + 1, **pl_module.take_epoch()}
        if not math.isfinite(row["loss"]):
            raise CoinferError(f"{self.name}: the loss is {row['loss']} in epoch {row['epoch']}; choose a smaller learning_rate in params.yaml.")
        self.history.append(row)
        if self.checkpoint is not None and len(self.history) < self.epochs:  # Lightning would not load the averages of a run that has ended
            with atomic_path(self.checkpoint) as temporary:
                trainer.save_checkpoint(temporary)
            self.kept = len(self.history)
        self.bar.update(self.task, note=f"loss {row['loss']:.3f}, validation {row['accuracy_validation']:.1%}")
        self._report(row)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]
        self.kept = len(self.history)


def fit(
    module: Classifier,
    data: DataModule,
    *,
    name: str,
    epochs: int,
    checkpoint_dir: Path | None,
    threads: int,
    precision: Precision,
    log: Callable[[dict[str, float]], None],
    callbacks: Sequence[Callback] = (),
) -> History:
    """Train `module.network` in place for `epochs` and return a row {epoch, loss, accuracy_validation} for each.

    The network ends with the averaged weights of the last step, not those of the best epoch: one-cycle ends at its best, and choosing an epoch
    by validation accuracy would make that figure flatter. After each epoch a checkpoint is left in `checkpoint_dir`, from which the next
    call goes on bit for bit; once trained, the weights lie there as safetensors, and a further call only loads them, until `forget`.
    `log` gets each row, those of epochs before an interruption included; `callbacks` are Lightning's. `name` is what the user sees.

    Raises:
        Interrupted: Ctrl-C; the message says what is kept.
        CoinferError: the loss is not finite, or a checkpoint cannot be written or read.
    """
    torch.set_num_threads(threads)
    if not epochs:
        return []
    finished = checkpoint_dir / "finished.safetensors" if checkpoint_dir else None
    if finished and finished.exists():
        history = _restore(module.network, finished)
        for row in history:
            log(row)
        return history
    checkpoint = checkpoint_dir / "last.ckpt" if checkpoint_dir else None
    watch = _Watch(name, epochs, checkpoint, log)
    averaging = [_Averaging(module.settings.ema_decay)] if module.settings.ema_decay else []
    module.train().to(memory_format=torch.channels_last)
    try:
        with _quiet(), _without_gradients(module.frozen), watch.bar:
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                precision="bf16-mixed" if computes_bf16(module.network, precision) else "32-true",
                max_epochs=epochs,
                callbacks=[*averaging, *callbacks, watch],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
            )
            resume = checkpoint if checkpoint and checkpoint.exists() else None
            if resume:
                _check(resume)
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into sys.exit(1)
        raise Interrupted(_what_is_kept(name, watch.kept, epochs, checkpoint)) from None
    module.to(memory_format=torch.contiguous_format).eval()
    if finished and checkpoint:
        atomic_write_bytes(finished, weights_bytes(module.network, {"history": json.dumps(watch.history)}))
        checkpoint.unlink(missing_ok=True)
    return watch.history


def _what_is_kept(name: str, done: int, epochs: int, checkpoint: Path | None) -> str:
    if not done:
        return f"{name} was interrupted before its first epoch was kept; `dvc repro` starts it over."
    return f"{name} was interrupted: {done} of {epochs} epochs are kept in {checkpoint}; `dvc repro` goes on from there."


def _check(checkpoint: Path) -> None:
    try:
        torch.load(checkpoint, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CoinferError(f"{checkpoint} cannot be read ({error}); delete it and run `dvc repro` again.") from error


def _restore(network: nn.Module, finished: Path) -> History:
    try:
        with safe_open(finished, framework="pt") as file:
            history: History = json.loads(file.metadata()["history"])
        network.load_state_dict(load_file(finished))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CoinferError(f"{finished} cannot be read ({error}); delete it and run `dvc repro` again.") from error
    network.eval()
    return history


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks on hardware, loaders and its makers' products: users see our progress bar only."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero", category=UserWarning)  # nothing to validate by
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning 2.6 on torch 2.15
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_gradients(parts: Iterable[nn.Module]) -> Iterator[None]:
    wanted = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad = False
        yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad = flag


def computes_bf16(network: nn.Module, precision: Precision) -> bool:
    """Whether to train in bfloat16: as told, or for `auto` where the processor multiplies it natively and no convolution is grouped.

    Without native units bfloat16 is emulated and twice as slow as fp32; grouped (depthwise) convolutions have no fast kernel either way.
    """
    if precision != "auto":
        return precision == "bf16"
    grouped = any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in network.modules())
    return not grouped and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def checkpoint_folder(stage: str, name: str, inputs: Any) -> Path:
    """Where the training `name` of `stage` (`pretrain`, `finetune-DEVICE`) keeps its state: a folder of its own for each value of `inputs` (JSON)."""
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return CHECKPOINTS / stage / f"{name}-{digest[:12]}"


def forget(folders: Iterable[Path]) -> None:
    """Remove the state of trainings whose stage has written its outs."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def weights_bytes(network: nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    """The state dict of `network` as a safetensors file."""
    return save({name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in network.state_dict().items()}, metadata)


def write_curves(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ("epoch", "loss", "accuracy_validation")) -> None:
    """`rows` as CSV with a header, numbers to six places."""
    lines = [",".join(f"{row[name]:.6f}" if isinstance(row[name], float) else str(row[name]) for name in columns) for row in rows]
    atomic_write_text(path, "\n".join([",".join(columns), *lines]) + "\n")
