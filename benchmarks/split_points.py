"""Points of a front: a backbone split at a cut with one codec, trained from the backbone or from the point before it, and what it then costs."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.noise import over_noise
from benchmarks.three_step_training import (
    CHOICE_IMAGES,
    FROZEN,
    LONG,
    PRUNE_ROUNDS,
    SETTINGS,
    STATE,
    STATISTICS_IMAGES,
    all_settings,
    alone,
    digest,
    fit_kept,
    named,
    recipe,
    teacher,
    train,
)
from models.backbones import build_backbone
from models.channel_plan import ChannelPlan, Silence, rebuild
from models.codec import CodecSpec, MultiRateCodec, SymbolCodec
from models.coinference import CoInference, build_split
from models.cutting import count_macs, cut_points
from models.jscc import ChannelCodec
from models.pruning import Pruner
from pipeline.data import Split, load_card, load_split
from pipeline.errors import ModelError
from pipeline.files import atomic_write_bytes, atomic_write_text
from pipeline.fingerprint import fingerprint
from pipeline.frozen_head import BehindHead, FeatureData
from pipeline.inference import accuracy, outputs, recalibrated
from pipeline.networks import coder_tables, layers_up_to
from pipeline.runtime import coder
from pipeline.runtime.frame import OVERHEAD_BYTES
from pipeline.soft_pruning import SoftPruning
from pipeline.split_distilling import SplitDistiller
from pipeline.training import weights_bytes

COSTS = (
    *(f"pipeline/runtime/{name}" for name in ("coder.py", "context.py", "rans_twin.py", "_rans.c", "frame.py", "images.py")),
    "pipeline/data.py",
    "pipeline/networks.py",
    "models/channels.py",
)
TABLE_IMAGES = 10_000
EXAMPLE = torch.zeros(1, 3, 32, 32)


@dataclass(frozen=True)
class Point:
    """What is trained: `weights` (a safetensors file) of `backbone`, split at `cut`, with `codec`, on from `before` if there is one.

    First codec and tail behind the frozen head, which may be that of `before`, for `frozen_epochs`; then, for `prune_epochs`, all, while residual blocks that
    compute at least `share` of the head's MACs are silenced and in the end dropped (with `evenly`: while every group of channels that stays on the device
    loses the same share); then all for `epochs`.
    """

    backbone: str
    weights: str
    cut: str
    codec: CodecSpec
    frozen_epochs: int
    epochs: int
    seed: int = 0
    before: Point | None = None
    share: float = 0.0
    prune_epochs: int = 0
    evenly: bool = False

    @property
    def name(self) -> str:
        codec = self.codec
        rate = f" {codec.rate_weight:g}" if codec.kind == "rate" else ""
        pruned = f", without {self.share:.0%} of the MACs{' evenly' if self.evenly else ''}" if self.prune_epochs else ""
        adapted = self.epochs or self.prune_epochs or (self.head_from and self.head_from.codec.kind != "raw-fp32")
        frozen = "" if adapted else ", head frozen"
        return f"{self.backbone} {self.cut} {codec.kind} {codec.code_channels}ch /{codec.stride} {codec.bits}bit{rate}{pruned}{frozen}, seed {self.seed}"

    @property
    def head_from(self) -> Point | None:
        """The last of the points before it that trained the head too."""
        if self.before is None or self.before.epochs or self.before.prune_epochs:
            return self.before
        return self.before.head_from

    def key(self) -> str:
        """Names everything its weights depend on."""
        fields = asdict(self) | {"before": self.before.key() if self.before else None, "weights": digest(Path(self.weights))}
        if not self.evenly:  # as in the keys of points trained before there was a choice
            del fields["evenly"]
        return named(fields, recipe())

    def facts(self) -> dict[str, Any]:
        """What does not depend on the images: MACs of head and encoder for one."""
        network = trained(self)
        head = count_macs(network.head, EXAMPLE)
        encoder = count_macs(network.codec.encode, torch.zeros(1, *network.codec.feature_shape))
        return {"head_macs": sum(head.values()), "encoder_macs": sum(encoder.values())}

    def judged(self, split: Split) -> dict[str, Any]:
        """Accuracy and sizes on one split."""
        network = trained(self)
        if isinstance(network.codec, ChannelCodec):
            found = over_noise(network, split)
            return {"channel_uses": network.codec.channel_uses, **found}
        if isinstance(network.codec, MultiRateCodec):
            return _judged_at_every_point(network, network.codec, split)
        return {"accuracy": accuracy(network, split), **cost(network, split[0])}


def _judged_at_every_point(network: CoInference, codec: MultiRateCodec, split: Split) -> dict[str, Any]:
    """The operating points, and as the row's own figures those of the first."""
    half, found = network.device_half(), []
    known, symbols = _symbols(half, load_split("train")[0][:TABLE_IMAGES]), _symbols(half, split[0])
    for number, point in enumerate(codec.spec.points):
        codec.point = number
        tables = coder.build_embedded_tables(known, *point)
        bits = [8 * (1 + len(coder.encode(code, tables))) for code in symbols]  # a byte says which point
        frames = [count // 8 + OVERHEAD_BYTES for count in bits]
        found.append({"accuracy": accuracy(network, split), "payload_bits": size(bits), "frame_bytes": size(frames)})
    codec.point = 0
    return {**found[0], "points": found}


def backbone_of(point: Point) -> nn.Module:
    card = load_card()
    return build_backbone(point.backbone, card.num_classes, card.image_size, Path(point.weights)).eval()


@lru_cache(maxsize=2)
def trained(point: Point) -> CoInference:
    """The network of `point`, trained now unless it was before; so are the points before it."""
    backbone = backbone_of(point)
    torch.manual_seed(point.seed)
    network = build_split(backbone, EXAMPLE, point.cut, point.codec)
    file, plan_file = STATE / f"{point.key()}.safetensors", STATE / f"{point.key()}.plan.json"
    with alone(point.key()):
        if not file.exists():
            atomic_write_bytes(file, weights_bytes(_train(network, backbone, point, plan_file)))
    if point.prune_epochs:
        network = CoInference(rebuild(network.head, ChannelPlan.from_json(plan_file.read_text())), network.codec, network.tail)
    network.load_state_dict(load_file(file))
    return network.eval()


def _train(network: CoInference, backbone: nn.Module, point: Point, plan_file: Path) -> CoInference:
    """`network` trained as `point` says, from the point before it."""
    if point.before is not None:
        _take_over(network, trained(point.before))
    if point.frozen_epochs:
        _train_behind(network, point)
    if point.prune_epochs:
        plan = _prune(network, backbone, point)
        network = CoInference(rebuild(network.head, plan), network.codec, network.tail)
        recalibrated(network.head, load_split("train")[0][:STATISTICS_IMAGES])
        atomic_write_text(plan_file, plan.to_json())
    settings = LONG[0] if point.epochs >= LONG[1] else SETTINGS
    train(SplitDistiller(network, teacher(), settings, 0.0), point.name, f"{point.key()}-all", point.epochs, point.seed)
    return network


def _train_behind(network: CoInference, point: Point) -> None:
    """Codec and tail of `network`; the features of its head are kept for every point that has the same."""
    whose = (point.backbone, digest(Path(point.weights)), point.cut, *([point.head_from.key()] if point.head_from else []))
    folder = STATE / f"features-{named(*whose, recipe())}"
    data = FeatureData(copy.deepcopy(network.head), (None, teacher()), folder, load_split("train"), load_split("validation"), FROZEN, point.seed)
    fit_kept(BehindHead(network, FROZEN, 0.0), data, f"{point.name}, head frozen", f"{point.key()}-frozen", point.frozen_epochs)


def _prune(network: CoInference, backbone: nn.Module, point: Point) -> ChannelPlan:
    """Trains `network` while the residual blocks that it needs least are silenced; what is left of its head then."""
    layers = layers_up_to(cut_points(backbone, EXAMPLE), point.cut)
    chooser = Pruner(network.head, EXAMPLE, layers)
    keep = _even(network.head, chooser, point.share) if point.evenly else dict.fromkeys(_least_needed(network, chooser, layers, point.share), 0.0)
    soft = SoftPruning(network.head, chooser, keep, PRUNE_ROUNDS, "l1")
    lesson = SplitDistiller(network, teacher(), SETTINGS, 0.0)
    train(lesson, f"{point.name}, pruning", f"{point.key()}-prune", point.prune_epochs, point.seed, callbacks=[soft])
    return soft.plan()


def _even(head: nn.Module, chooser: Pruner, share: float) -> dict[str, float]:
    """The largest of 15/16, 14/16, ... that, kept of every group, leaves at most 1 - `share` of the head's MACs."""
    scores = chooser.scores(head)
    whole = sum(count_macs(head, EXAMPLE).values())
    for sixteenths in range(15, 0, -1):
        keep = dict.fromkeys(chooser.groups, sixteenths / 16)
        if sum(count_macs(rebuild(head, chooser.plan(keep, scores)), EXAMPLE).values()) <= (1 - share) * whole:
            return keep
    raise ModelError(f"no even pruning removes {share:.0%} of the head's MACs; choose less.")


def _least_needed(network: CoInference, chooser: Pruner, layers: Mapping[str, Sequence[str]], share: float) -> list[str]:
    """The blocks without which, one at a time, most validation images are still classified right, until they compute `share` of the head's MACs."""
    images, labels = (part[:CHOICE_IMAGES] for part in load_split("validation"))
    macs, scores = count_macs(network.head, EXAMPLE), chooser.scores(network.head)
    found: list[tuple[float, str, int]] = []
    network.eval()
    for block in layers:
        with suppress(ModelError):
            silence = Silence(network.head, chooser.plan({block: 0.0}, scores))
            found.append((accuracy(network, (images, labels)), block, sum(macs.get(layer, 0) for layer in layers[block])))
            silence.lift()
    chosen: list[str] = []
    left = share * sum(macs.values())
    for _, block, spent in sorted(found, reverse=True):
        if left > 0:
            chosen.append(block)
            left -= spent
    if left > 0:
        raise ModelError(f"blocks with a shortcut compute less than {share:.0%} of the head's MACs; choose less.")
    return chosen


def reference(uncoded: Point) -> dict[str, Any]:
    """Accuracy of the best on validation of a backbone as its weights have it and after the trainings that end with `uncoded`.

    These are splits with codec raw-fp32, which changes nothing: taught like the others, first the tail behind the frozen head, then all.
    """
    validation, network = load_split("validation"), backbone_of(uncoded)
    found = {"as it came": accuracy(network, validation)}
    states = {"as it came": network.state_dict()}
    further: Point | None = uncoded
    while further is not None:
        halves, name = trained(further), f"after {epochs_of_all(further)} epochs"
        found[name], states[name] = accuracy(halves, validation), halves.head.state_dict() | halves.tail.state_dict()
        further = further.before
    best = max(found, key=lambda name: found[name])
    network.load_state_dict(states[best])
    atomic_write_bytes(reference_weights(uncoded), weights_bytes(network))
    return {"key": uncoded.key(), "better": best, "of": found, "validation": found[best], "test": accuracy(network, load_split("test"))}


def epochs_of_all(point: Point) -> int:
    """In which the whole network was trained, up to `point`."""
    return point.epochs + point.prune_epochs + (epochs_of_all(point.before) if point.before else 0)


def reference_weights(uncoded: Point) -> Path:
    """Where the reference's weights lie, once `reference` has run."""
    return STATE / f"reference-{named(asdict(uncoded), all_settings())}.safetensors"  # not by its key, which needs data: points are listed without


@torch.no_grad()
def _take_over(network: CoInference, before: CoInference) -> None:
    """Weights of `before`; of its code channels, where `network` has fewer, those that the decoder leans on most."""
    for part in ("head", "tail"):
        getattr(network, part).load_state_dict(getattr(before, part).state_dict())
    old, new = before.codec, network.codec
    if old.spec.kind == "raw-fp32":
        return
    count = new.code_shape[0]
    first = next(layer for layer in old.decode.modules() if isinstance(layer, (nn.ConvTranspose2d, nn.Conv2d)))
    by_code = first.weight if isinstance(first, nn.ConvTranspose2d) else first.weight.transpose(0, 1)
    chosen = by_code.flatten(1).norm(dim=1).argsort(descending=True)[:count].sort().values
    source, target = old.state_dict(), new.state_dict()
    for name, tensor in target.items():
        had = source.get(name)
        if had is None or had.ndim != tensor.ndim:
            continue
        for axis, (wide, narrow) in enumerate(zip(had.shape, tensor.shape, strict=True)):
            if wide != narrow and wide == old.code_shape[0]:
                had = had.index_select(axis, chosen)
        if had.shape == tensor.shape:
            tensor.copy_(had)


def cost(network: CoInference, images: Tensor) -> dict[str, Any]:
    """Sizes of the coded `images` uint8 (N, 3, S, S), by tables of the training images: bits by the real coder, frames, cross-entropy, uncoded."""
    codec = network.codec
    if not isinstance(codec, SymbolCodec):
        bits = codec.uncoded_bits
        return {"payload_bits": size([bits]), "uncoded_bits": bits}
    tables, symbols = tables_of(network), _symbols(network.device_half(), images)
    payloads, times = [], []
    for code in symbols:
        start = time.perf_counter()
        payload = coder.encode(code, tables)
        coder.decode(payload, code.shape, tables)
        times.append((time.perf_counter() - start) * 1e3)
        payloads.append(len(payload))
    return {
        "payload_bits": size([8 * size for size in payloads]),
        "frame_bytes": size([size + OVERHEAD_BYTES for size in payloads]),
        "cross_entropy_bits": float(np.mean([coder.entropy_bits(code, tables) for code in symbols])),
        "uncoded_bits": codec.uncoded_bits,
        "symbols": symbols[0].size,
        "coder_ms": float(np.median(times)),
    }


def tables_of(network: CoInference) -> coder.CodecTables:
    """The coder's tables of a split with symbols, from training images."""
    symbols = _symbols(network.device_half(), load_split("train")[0][:TABLE_IMAGES])
    return coder_tables(symbols, network.symbol_codec().spec.bits)


def costs_key() -> str:
    """Names the code that sizes are measured by: rows of another one are measured again, not trained again."""
    return named(fingerprint(COSTS, "")["files"], (Path(__file__).parent / "noise.py").read_text())


def _symbols(half: nn.Module, images: Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = outputs(half.eval(), images).numpy()
    return found


def size(values: list[int]) -> dict[str, float]:
    """Mean and 95th percentile."""
    return {"mean": float(np.mean(values)), "p95": float(np.percentile(values, 95))}
