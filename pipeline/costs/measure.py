"""Measuring a DeviceProfile on this machine: every block through a real ONNX Runtime session of its own."""

from __future__ import annotations

import gc
import io
import itertools
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx.utils import Extractor
from PIL import Image
from torch import Tensor, nn

from models.backbones import build_backbone
from models.codec import CodecSpec, UniformCodec
from models.cutting import CutPoint, count_macs, cut_points, segment_modules
from models.pruning import prune_head
from pipeline.costs.device_profile import BackboneProfile, Block, CoderTimes, DeviceProfile, Point, Spread, backbone_key, shape_key
from pipeline.errors import Interrupted, ModelError, ProfileError
from pipeline.machine import cpu_name
from pipeline.params import Params
from pipeline.paths import DATA_CARD, profile_file
from pipeline.runtime import coder
from pipeline.runtime.bundle import open_session
from pipeline.runtime.context import fit_contexts
from pipeline.runtime.frame import Kind, pack, unpack
from pipeline.runtime.images import encode_image
from pipeline.runtime.preprocess import Preprocessing

CODER_BITS = 4
CODER_CHANNELS, CODER_IMAGES = 16, 64


@dataclass(frozen=True)
class MeasurePlan:
    """How a machine is measured: profiles/measure.json.

    Each of `rounds` visits every session in turn, runs it `warmup` times untimed and `repeats` times timed, so a slow minute touches all alike.
    `keep` are the kept fractions blocks are pruned to, `code_channels` x `strides` the codecs, `coder_symbols` two sizes of a code.
    """

    threads: int
    rounds: int
    repeats: int
    warmup: int
    keep: tuple[float, ...]
    code_channels: tuple[int, ...]
    strides: tuple[int, ...]
    coder_symbols: tuple[int, int]
    webp_qualities: tuple[int, ...]

    @classmethod
    def load(cls, path: Path) -> MeasurePlan:
        """Read and check `path`.

        Raises:
            ProfileError: the plan is missing, or one of its numbers cannot be used.
        """
        try:
            given = json.loads(path.read_text())
            plan = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})  # type: ignore[arg-type]
        except FileNotFoundError:
            raise ProfileError(f"the measuring plan {path} is missing; take it from the repository.") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ProfileError(f"the measuring plan {path} is wrong ({error}); it holds {', '.join(f.name for f in fields(cls))}.") from None
        try:
            plan._check()
        except (TypeError, ValueError) as error:
            raise ProfileError(f"the measuring plan {path} is wrong ({error}); compare it with the one in the repository.") from None
        return plan

    def _check(self) -> None:
        counts = (self.threads, self.rounds, self.repeats, self.warmup + 1, *self.code_channels, *self.strides, *self.coder_symbols, *self.webp_qualities)
        if any(not isinstance(count, int) or count < 1 for count in counts):
            raise ValueError("counts are whole numbers of 1 or more, warmup of 0 or more")
        if 1 not in self.keep or not all(0 < ratio <= 1 for ratio in self.keep):
            raise ValueError("keep lists fractions above 0 and at most 1, and has 1")
        if len(self.coder_symbols) != 2 or self.coder_symbols[0] >= self.coder_symbols[1]:
            raise ValueError("coder_symbols are a smaller and a larger number")
        if not (self.code_channels and self.strides and self.webp_qualities):
            raise ValueError("code_channels, strides and webp_qualities name at least one each")


def measure_into(params: Params, path: Path) -> DeviceProfile:
    """Measure this machine for the backbone in `params` and merge the result into the profile at `path`.

    Where no data were prepared the network gets 10 classes, which only the last layer's width shows.

    Raises:
        ProfileError: `path` holds another machine's profile, or is not a profile.
    """
    plan = MeasurePlan.load(profile_file("measure"))
    known = DeviceProfile.load(path) if path.exists() else None
    if known:
        known.merged(replace(known, **_machine(plan)))  # refused now rather than after minutes of measuring
    classes = len(json.loads(DATA_CARD.read_text())["classes"]) if DATA_CARD.exists() else 10
    image_size = params.data.image_size
    model = build_backbone(params.backbone.name, classes, image_size).eval()
    example = torch.zeros(1, 3, image_size, image_size)
    profile = measure_profile(path.stem, params.backbone.name, model, example, cut_points(model, example, params.search.cuts), plan)
    merged = known.merged(profile) if known else profile
    merged.save(path)
    return merged


def _machine(plan: MeasurePlan) -> dict[str, Any]:
    return {
        "runtime": f"onnxruntime {ort.__version__}",
        "threads": plan.threads,
        "machine": {"cpu": cpu_name(), "os": platform.system(), "arch": platform.machine()},
    }


def measure_profile(name: str, backbone_name: str, model: nn.Module, example: Tensor, cuts: Sequence[CutPoint], plan: MeasurePlan) -> DeviceProfile:
    """Measure `model` (in eval mode) at the shape of `example` (1, 3, S, S), block by block, and all else a candidate needs.

    A ratio to which the network cannot be pruned gives no points.

    Raises:
        ModelError: the network cannot be exported or cut.
        Interrupted: Ctrl-C.
    """
    bench = _Bench(plan)
    image_size = example.shape[-1]
    image = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    bench.session("nothing", _nothing(), torch.zeros(1, 1))
    parts: dict[str, _Part] = {}
    for ratio in sorted(plan.keep):
        parts |= _blocks(model, image, cuts, ratio)
    for cut in {cut.shape: cut for cut in cuts[1:-1] if len(cut.shape) == 3}.values():
        key = _block_key(1, cut)
        parts |= _codecs(key, parts[key].value, plan)
    extractor = _export(parts, image)
    macs = {}
    for key, part in parts.items():
        value = image if part.source is None else parts[part.source].value
        bench.session(key, extractor.extract_model([part.source or "image"], [key]), value)
        macs[key] = sum(count_macs(part.module, value).values())
    bench.session("full", extractor.extract_model(["image"], [_block_key(1, cuts[-1])]), image)
    _add_image(bench, image_size)
    _add_coder(bench)
    try:
        times = bench.run()
    except KeyboardInterrupt:
        raise Interrupted("measuring was interrupted; nothing is kept, run it again.") from None

    call = times["nothing"]

    def points(*prefix: str) -> tuple[Point, ...]:
        keys = [key for key in parts if tuple(key.split(" ")[:2]) == prefix]
        return _rising([Point(macs[key], *(max(ms - call.median_ms, 0.0) for ms in times[key])) for key in keys])

    def grid(side: str) -> dict[str, tuple[Point, ...]]:
        return {shape: points(side, shape) for shape in dict.fromkeys(key.split(" ")[1] for key in parts if key.startswith(side))}

    blocks = tuple(Block(cut.name, tuple(cut.shape), points("block", cut.name)) for cut in cuts[1:])
    webp = {quality: times[f"webp encode {quality}"] for quality in plan.webp_qualities}
    measured = BackboneProfile(
        call_overhead=call,
        blocks=blocks,
        full=Point(cuts[-1].macs, *times["full"]),
        encoder=grid("encoder"),
        decoder=grid("decoder"),
        preprocess=times["preprocess"],
        webp_encode=webp,
        webp_decode=times["webp decode"],
    )
    return DeviceProfile(
        name=name,
        **_machine(plan),
        coder=_coder_times(times, plan),
        backbones={backbone_key(backbone_name, image_size): measured},
    )


class _Bench:
    """Named calls, timed in interleaved rounds; those `beside` the network each after a call of it, which leaves the caches as they are in use."""

    def __init__(self, plan: MeasurePlan) -> None:
        self.plan = plan
        self.calls: dict[str, Callable[[], object]] = {}
        self.beside: dict[str, Callable[[], object]] = {}
        self.random = np.random.default_rng(0)

    def session(self, key: str, model: onnx.ModelProto, value: Tensor) -> None:
        """Add a call of `model`, which has one input, on `value`."""
        session = open_session(model.SerializeToString(), self.plan.threads)
        feed = {model.graph.input[0].name: value.numpy()}
        self.calls[key] = lambda: session.run(None, feed)

    def run(self) -> dict[str, Spread]:
        calls, network = self.calls | self.beside, self.calls["full"]
        samples: dict[str, list[int]] = {key: [] for key in calls}
        gc.collect()
        gc.disable()  # a collection would land on whichever call is running
        try:
            for _ in range(self.plan.rounds):
                for key in self.random.permutation(list(calls)):
                    call, into = calls[key], samples[key]
                    for _ in range(self.plan.warmup):
                        call()
                    for _ in range(self.plan.repeats):
                        if key in self.beside:
                            network()
                        start = perf_counter_ns()
                        call()
                        into.append(perf_counter_ns() - start)
        finally:
            gc.enable()
        return {key: _spread(values) for key, values in samples.items()}


def _spread(nanoseconds: Sequence[int]) -> Spread:
    low, median, high = np.percentile(np.asarray(nanoseconds) / 1e6, [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def _rising(points: Sequence[Point]) -> tuple[Point, ...]:
    """`points` by MACs; those of equal MACs become one, at their mean."""
    by_macs: dict[int, list[Point]] = {}
    for point in points:
        by_macs.setdefault(point.macs, []).append(point)
    return tuple(Point(macs, *(float(ms) for ms in np.mean([point[1:] for point in same], axis=0))) for macs, same in sorted(by_macs.items()))


@dataclass(frozen=True)
class _Part:
    """A module to time, fed by the part called `source` (None: the image), whose output for the example is `value`."""

    source: str | None
    module: nn.Module
    value: Tensor


class _Tree(nn.Module):
    """All parts as one network with every result as an output: one export, which is slow, can then be cut at any of them."""

    def __init__(self, parts: Mapping[str, _Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(part.module for part in parts.values())
        order = list(parts)
        self.sources = [None if part.source is None else order.index(part.source) for part in parts.values()]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        for part, source in zip(self.parts, self.sources, strict=True):
            outputs.append(part(x if source is None else outputs[source]))
        return tuple(outputs)


def _export(parts: Mapping[str, _Part], image: Tensor) -> Extractor:
    """What extracts any part from the exported tree; tensors are called by their part's name, the image `image`."""
    with torch.no_grad():
        program = torch.onnx.export(_Tree(parts).eval(), (image,), dynamo=True, input_names=["image"], output_names=list(parts), verbose=False)
    assert program is not None
    return Extractor(program.model_proto)


def _nothing() -> onnx.ModelProto:
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "nothing", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def _blocks(model: nn.Module, image: Tensor, cuts: Sequence[CutPoint], ratio: float) -> dict[str, _Part]:
    """The blocks of `model` pruned to `ratio`, each fed by the one before; none if it cannot be pruned so far."""
    layers = {cut.name: cut.layers for cut in cuts[1:]}
    if ratio < 1:
        try:
            model, _ = prune_head(model, image, dict.fromkeys(layers, ratio), layers)
        except ModelError:
            return {}
    parts: dict[str, _Part] = {}
    value, source = image, None
    for cut, module in zip(cuts[1:], segment_modules(model, image, cuts), strict=True):
        with torch.no_grad():
            value = module(value)
        key = _block_key(ratio, cut)
        parts[key] = _Part(source, module, value)
        source = key
    return parts


def _block_key(ratio: float, cut: CutPoint) -> str:
    return f"block {cut.name} {ratio:g}"


def _codecs(source: str, feature: Tensor, plan: MeasurePlan) -> dict[str, _Part]:
    """An encoder and a decoder per code width and stride that the feature of part `source` admits."""
    parts: dict[str, _Part] = {}
    shape = tuple(feature.shape[1:])
    for size in itertools.product(plan.code_channels, plan.strides):
        try:
            codec = UniformCodec(CodecSpec("uniform", *size, CODER_BITS), shape).eval()
        except ModelError:
            continue
        encoder, decoder = nn.Sequential(codec.encode, codec.quantise), nn.Sequential(codec.dequantise, codec.decode)
        key = f"{shape_key(shape)} {size}"
        with torch.no_grad():
            symbols = encoder(feature)
            parts[f"encoder {key}"] = _Part(source, encoder, symbols)
            parts[f"decoder {key}"] = _Part(f"encoder {key}", decoder, decoder(symbols))
    return parts


def _add_image(bench: _Bench, image_size: int) -> None:
    """Add preprocessing and WebP both ways, each as the runtime does them for pixels of the right size."""
    image = Image.fromarray(_photo(image_size))
    preprocessing = Preprocessing(image_size)
    pixels = preprocessing.pixels(image)
    bench.beside["preprocess"] = lambda: preprocessing.tensor(pixels[None])
    for quality in bench.plan.webp_qualities:
        bench.beside[f"webp encode {quality}"] = partial(encode_image, pixels, "webp", quality)
    middle = encode_image(pixels, "webp", sorted(bench.plan.webp_qualities)[len(bench.plan.webp_qualities) // 2])
    bench.beside["webp decode"] = lambda: preprocessing.pixels(Image.open(io.BytesIO(middle)))


def _add_coder(bench: _Bench) -> None:
    """Add coding and framing of two sizes of code, with symbols as unevenly spread as features', by tables with contexts."""
    for count in bench.plan.coder_symbols:
        channels = math.gcd(count, CODER_CHANNELS)
        height = next(side for side in range(math.isqrt(count // channels), 0, -1) if count // channels % side == 0)
        shape = CODER_IMAGES, channels, height, count // channels // height
        known = np.minimum(np.random.default_rng(0).geometric(0.3, shape) - 1, 2**CODER_BITS - 1).astype(np.uint8)
        tables, symbols = coder.build_tables(known, CODER_BITS, fit_contexts(known)), known[0]
        frame = pack(coder.encode(symbols, tables), b"\0\0\0\0", Kind.SYMBOLS)
        bench.beside[f"coder encode {count}"] = partial(_encode, symbols, tables)
        bench.beside[f"coder decode {count}"] = partial(_decode, frame, symbols.shape, tables)


def _encode(symbols: np.ndarray[Any, Any], tables: coder.CodecTables) -> bytes:
    return pack(coder.encode(symbols, tables), b"\0\0\0\0", Kind.SYMBOLS)


def _decode(frame: bytes, shape: tuple[int, int, int], tables: coder.CodecTables) -> np.ndarray[Any, Any]:
    return coder.decode(unpack(frame).payload, shape, tables)


def _coder_times(times: Mapping[str, Spread], plan: MeasurePlan) -> CoderTimes:
    few, many = plan.coder_symbols

    def line(side: str) -> tuple[float, float]:
        at_few, at_many = (times[f"coder {side} {count}"].median_ms for count in (few, many))
        per_symbol = max((at_many - at_few) / (many - few), 0.0)
        return max(at_few - per_symbol * few, 0.0), per_symbol

    return CoderTimes("c" if coder.HAVE_C else "python", *line("encode"), *line("decode"))


def _photo(image_size: int) -> np.ndarray[Any, Any]:
    """A smooth scene with grain, uint8 (S, S, 3): WebP's work depends on content, and neither noise nor a flat field is like a photograph."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse, np.float32) + random.normal(0, 6, (image_size, image_size, 3)), 0, 255).astype(np.uint8)
