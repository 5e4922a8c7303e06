"""The trainings of a stage, one after the other, each taught by the same teacher."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from torch import nn

from models.channel_plan import ChannelPlan
from models.coinference import CoInference
from pipeline.data import Sent, load_split
from pipeline.distilling import Distiller
from pipeline.errors import Interrupted
from pipeline.fingerprint import TRAINING_CODE, fingerprint
from pipeline.frozen_head import BehindHead, FeatureData
from pipeline.params import Params, Section
from pipeline.paths import BACKBONE_WEIGHTS
from pipeline.split_distilling import SplitDistiller
from pipeline.training import Classifier, DataModule, checkpoint_folder, fit

if TYPE_CHECKING:
    from pipeline.tracking import Tracker


SAMPLE_IMAGES = 1024  # for batch-norm statistics: the classes take turns in the file


class Course:
    """The trainings of one stage: each kept when finished, so that an interrupted stage goes on where it was, and all logged."""

    def __init__(self, params: Params, device: str, tracker: Tracker, teacher: nn.Module, inputs: list[Any]) -> None:
        self.params, self.device, self.tracker, self.teacher = params, device, tracker, teacher
        own = [
            f"pipeline/{name}.py"
            for name in ("course", "frozen_head", "losses", "runtime/images", "runtime/preprocess", "soft_pruning", "split_distilling", "stages/finetune")
        ]
        code = fingerprint([*TRAINING_CODE, *own], params.backbone.name)
        sections = [params.run, params.codec, params.finetune, params.pretrain.label_smoothing, params.backbone.name]
        plain = [section.model_dump() if isinstance(section, Section) else section for section in sections]
        self.inputs = [*plain, *inputs, hashlib.sha256(BACKBONE_WEIGHTS.read_bytes()).hexdigest(), code]
        self.data = load_split("train"), load_split("validation")
        self.sample = self.data[0][0][:SAMPLE_IMAGES]
        self.folders: list[Path] = []
        self.features: set[Path] = set()
        self.curves: list[dict[str, Any]] = []

    def run(
        self,
        name: str,
        network: nn.Module,
        *,
        epochs: int,
        cut: tuple[nn.Module, nn.Module] | None = None,
        callbacks: Sequence[Callback] = (),
        further: Any = None,
        view: Sent | None = None,
    ) -> nn.Module:
        """Train `network` in place, taught by the teacher's logits and, given its halves as `cut`, its feature there; return it.

        With a `view` the network sees what that leaves of the images, and the teacher the images.
        """
        settings, smoothing = self.params.finetune, self.params.pretrain.label_smoothing
        lesson: Classifier
        if isinstance(network, CoInference):
            lesson = SplitDistiller(network, cut or copy.deepcopy(self.teacher), settings, smoothing)
        else:
            lesson = Distiller(network, copy.deepcopy(self.teacher), settings, smoothing)
        data = DataModule(*self.data, settings, self.params.run.seed, view)
        self._fit(name, lesson, data, epochs, self._folder(name, [epochs, further]), callbacks)
        return network

    def run_behind(self, name: str, network: CoInference, teacher: tuple[nn.Module | None, nn.Module], plan: ChannelPlan) -> None:
        """Train codec and tail of `network` in place, behind its frozen head, made by `plan`, whose features are kept; `teacher` as for `FeatureData`."""
        settings = self.params.finetune.model_copy(update={"learning_rate": self.params.finetune.frozen_learning_rate})
        epochs, head = settings.frozen_epochs, copy.deepcopy(network.head)
        folder = self._folder(name, [epochs, plan.to_dict()])
        self.features.add(features := self._folder("features", [plan.to_dict()]))
        data = FeatureData(head, teacher, features, *self.data, settings, self.params.run.seed)
        self._fit(name, BehindHead(network, settings, self.params.pretrain.label_smoothing), data, epochs, folder)

    def _folder(self, name: str, further: Any) -> Path:
        return checkpoint_folder(f"finetune-{self.device}", name, [*self.inputs, *further])

    def _fit(self, name: str, lesson: Classifier, data: DataModule, epochs: int, folder: Path, callbacks: Sequence[Callback] = ()) -> None:
        def log(row: dict[str, float]) -> None:
            self.curves.append({"training": name, **row})
            self.tracker.log_metrics({f"{name}_{key}": row[key] for key in ("loss", "accuracy_validation")}, step=int(row["epoch"]))

        try:
            fit(
                lesson,
                data,
                name=f"finetune {self.device}, {name}",
                epochs=epochs,
                checkpoint_dir=folder,
                threads=self.params.run.threads,
                precision=lesson.settings.precision,
                log=log,
                callbacks=callbacks,
            )
        except Interrupted as error:
            kept = f" What came before it ({', '.join(done.name.rpartition('-')[0] for done in self.folders)}) is finished and kept." if self.folders else ""
            raise Interrupted(f"{error}{kept}") from None
        self.folders.append(folder)
