"""Edge-only baselines: what a compressed image costs and how well the network sees it, as it came and further trained on such images."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from benchmarks.split_points import size
from benchmarks.three_step_training import SETTINGS, STATE, digest, named, recipe, teacher, train
from models.backbones import build_backbone
from pipeline.data import Sent, Split, load_card
from pipeline.distilling import Distiller
from pipeline.files import atomic_write_bytes
from pipeline.inference import accuracy
from pipeline.runtime.frame import OVERHEAD_BYTES
from pipeline.runtime.images import LOSSLESS, Format, container_bytes
from pipeline.training import weights_bytes

FORMATS: tuple[Format, ...] = ("webp", "jpeg", "jpeg-bare")
QUALITIES = (95, 85, 75, 60, 50, 40, 30, 20, 10)


@dataclass(frozen=True)
class ImagePoint:
    """`backbone` with `weights` (a safetensors file), after `epochs` on images sent as `image_format` at `quality`, on from `before` if there is one."""

    backbone: str
    weights: str
    image_format: Format
    quality: int
    epochs: int = 0
    before: ImagePoint | None = None

    @property
    def name(self) -> str:
        how = f"{self.image_format} q{self.quality}" if self.lossy else f"{self.image_format} lossless"
        return f"{self.backbone} {how}{', trained on it' if self.epochs else ''}"

    @property
    def lossy(self) -> bool:
        return self.image_format != "png" and self.quality < LOSSLESS

    def key(self) -> str:
        """Names everything the network depends on."""
        fields = asdict(self) | {"before": self.before.key() if self.before else None, "weights": digest(Path(self.weights))}
        return named(fields, recipe())

    def facts(self) -> dict[str, Any]:
        return {}

    def judged(self, split: Split) -> dict[str, Any]:
        """Accuracy and sizes on one split: payload bits without the container, and whole files in our frames."""
        arrived, files = Sent(self.image_format, self.quality).and_files(split[0])
        payload = [8 * (len(file) - container_bytes(file, self.image_format)) for file in files]
        return {
            "accuracy": accuracy(trained(self), (arrived, split[1])),
            "payload_bits": size(payload),
            "frame_bytes": size([len(file) + OVERHEAD_BYTES for file in files]),
        }


def trained(point: ImagePoint) -> nn.Module:
    """The network of `point`, trained now unless it was before; of `jpeg-bare` it is that of `jpeg`, which arrives as the same pixels."""
    point = _with_tables(point) if point.image_format == "jpeg-bare" else point
    card, file = load_card(), STATE / f"{point.key()}.safetensors"
    network = build_backbone(point.backbone, card.num_classes, card.image_size, Path(point.weights)).eval()
    if not point.epochs:
        return network
    if not file.exists():
        if point.before is not None:
            network = copy.deepcopy(trained(point.before))
        lesson = Distiller(network, teacher(), SETTINGS, 0.0)
        train(lesson, point.name, f"{point.key()}-all", point.epochs, view=Sent(point.image_format, point.quality))
        atomic_write_bytes(file, weights_bytes(network))
    network.load_state_dict(load_file(file))
    return network.eval()


def _with_tables(point: ImagePoint) -> ImagePoint:
    return replace(point, image_format="jpeg", before=_with_tables(point.before) if point.before else None)
