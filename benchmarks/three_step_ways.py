"""The ways to classify that results/three_step.json knows, as they would be deployed: candidates, and every baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import image_points, pruned_points
from benchmarks.end_to_end import INT8, PARTS, Way, frame_size
from benchmarks.image_points import ImagePoint
from benchmarks.pruned_points import PrunedPoint
from benchmarks.split_points import TABLE_IMAGES, Point, cost, tables_of, trained
from models.backbones import build_backbone
from models.baseline_codecs import RawByteCodec
from models.codec import CodecSpec
from models.coinference import CoInference, build_split
from models.cutting import cut_points, split
from models.operations import operations
from pipeline.costs.device_profile import DeviceProfile, Precision
from pipeline.costs.latency import HalfCosts, predict
from pipeline.costs.link import Link
from pipeline.data import Split, load_card
from pipeline.inference import accuracy, outputs
from pipeline.onnx_export import export_onnx
from pipeline.quantising import quantise
from pipeline.runtime import coder
from pipeline.runtime.bundle import open_session
from pipeline.runtime.context import ContextModel, Predictor, fit_contexts
from pipeline.runtime.preprocess import Preprocessing

OURS = ("uniform", "codebook", "rate", "multi-rate")
CALIBRATION_IMAGES = 1_000  # of raw 8-bit features
INT8_IMAGES = 256
BATCH = 250
STREAM_SYMBOLS = 4_096
EXAMPLE = torch.zeros(2, 3, 32, 32)


def of_split(point: Point, accuracy: float, frame_bytes: float) -> Way:
    """A trained split, which must have symbols."""
    return _with_symbols(trained(point), point.name, accuracy, frame_bytes, ours=point.codec.kind in OURS)


def in_int8(way: Way, train: Split, validation: Split) -> Way:
    """`way`, which sends symbols, with its device half in int8; accuracy and size are its own."""
    assert way.device is not None
    assert way.edge is not None
    preprocessing = Preprocessing(way.image_size)
    device = quantise(way.device, (preprocessing.tensor(image.numpy()) for image in torch.split(train[0][:INT8_IMAGES], 1)))
    device_session, edge_session = open_session(device, 2), open_session(way.edge, 2)

    def symbols_of(images: Tensor) -> NDArray[np.uint8]:
        parts = (preprocessing.tensor(part.numpy()) for part in torch.split(images, BATCH))
        return np.concatenate([device_session.run(None, {device_session.get_inputs()[0].name: part})[0] for part in parts])

    assert way.tables is not None
    known = symbols_of(train[0][:TABLE_IMAGES])
    tables = coder.build_tables(known, way.tables.bits, way.tables.model and fit_contexts(known))
    symbols = symbols_of(validation[0])
    logits = edge_session.run(None, {edge_session.get_inputs()[0].name: symbols})[0]
    right = float((logits.argmax(1) == validation[1].numpy()).mean())
    sizes = [len(coder.encode(code, tables)) for code in symbols]
    return replace(way, name=way.name + INT8, accuracy=right, frame_bytes=frame_size(sizes), device=device, tables=tables)


def device_only_in_int8(way: Way, train: Split, validation: Split) -> Way:
    """`way`, which sends nothing, in int8."""
    assert way.device is not None
    preprocessing = Preprocessing(way.image_size)
    device = quantise(way.device, (preprocessing.tensor(image.numpy()) for image in torch.split(train[0][:INT8_IMAGES], 1)))
    session = open_session(device, 2)
    logits = np.concatenate([session.run(None, {"image": preprocessing.tensor(part.numpy())})[0] for part in torch.split(validation[0], BATCH)])
    right = float((logits.argmax(1) == validation[1].numpy()).mean())
    return replace(way, name=way.name + INT8, accuracy=right, device=device)


def expected_ms(way: Way, profile: DeviceProfile, backbone: nn.Module, point: Point | ImagePoint | PrunedPoint | None) -> dict[str, float] | None:
    """The parts of `way`, which `point` made if one did, as the search would predict them from `profile`; None for what the search does not know."""
    if isinstance(point, PrunedPoint):
        return None
    precision: Precision = "int8" if way.name.endswith(INT8) else "fp32"
    if way.sent == "image":
        image = (way.image_format, way.quality)
        costs = HalfCosts("edge-only", way.image_size, edge=operations(backbone, EXAMPLE), frame_bytes=way.frame_bytes, image=image, reply_bytes=1)
    elif way.sent == "nothing":
        costs = HalfCosts("device-only", way.image_size, device=operations(backbone, EXAMPLE), precision=precision)
    elif isinstance(point, Point) and way.ours:
        network = trained(point)
        device, code = operations(network.device_half(), EXAMPLE), torch.zeros(1, *network.codec.code_shape, dtype=torch.uint8)
        edge = operations(network.edge_half(), code)
        costs = HalfCosts("split", way.image_size, device, edge, precision, math.prod(network.codec.code_shape), way.frame_bytes, reply_bytes=1)
    else:
        return None
    found = predict(costs, profile, profile, Link(1, 0))
    return {part: found[part] for part in PARTS}


def stream_cost(way: Way, images: Tensor) -> dict[str, float]:
    """Bits and cross-entropy of the symbols of `images`, in streams of STREAM_SYMBOLS or more: the coder's overhead without what ending a stream costs."""
    assert way.device is not None
    assert way.tables is not None
    session, (channels, height, width) = open_session(way.device, 2), way.shape
    symbols = session.run(None, {session.get_inputs()[0].name: Preprocessing(way.image_size).tensor(images.numpy())})[0]
    together = -(-STREAM_SYMBOLS // (channels * height * width))
    count = len(symbols) // together * together
    streams = symbols[:count].reshape(-1, together, channels, height, width).transpose(0, 2, 1, 3, 4).reshape(-1, channels, together * height, width)
    streams = np.ascontiguousarray(streams)
    tables = replace(way.tables, model=way.tables.model and _repeated(way.tables.model, together))
    return {
        "bits": float(sum(8 * len(coder.encode(stream, tables)) for stream in streams)),
        "cross_entropy_bits": float(sum(coder.entropy_bits(stream, tables) for stream in streams)),
    }


def _repeated(model: ContextModel, times: int) -> ContextModel:
    """For planes of `times` images, one below the other."""

    def higher(predictor: Predictor) -> Predictor:
        return replace(predictor, rows=tuple(row * times for row in predictor.rows))

    return replace(model, mean=higher(model.mean), spread=higher(model.spread))


def of_image(point: ImagePoint, accuracy: float, frame_bytes: float) -> Way:
    """Edge-only, with the network that belongs to the format."""
    edge = _whole(image_points.trained(point))
    return Way(point.name, accuracy, frame_bytes, False, False, "image", 32, edge=edge, image_format=point.image_format, quality=point.quality)


def of_pruned(point: PrunedPoint, accuracy: float, frame_bytes: float) -> Way:
    """A network pruned without a learned codec: all on the device, or cut and its feature sent in 8 bits."""
    if not point.cut:
        return device_only(pruned_points.trained(point), point.name, accuracy, ours=False)
    return _with_symbols(pruned_points.coded(point), point.name, accuracy, frame_bytes, ours=False)


def device_only(network: nn.Module, name: str, accuracy: float, *, ours: bool) -> Way:
    return Way(name, accuracy, 0.0, ours, False, "nothing", 32, device=_whole(network))


def raw_features(backbone: str, weights: str, train: Split, validation: Split) -> Iterator[Way]:
    """Neurosurgeon: the feature at every cut as it is, in 32 bits a value, and in 8 bits by our coder."""
    network = build_backbone(backbone, load_card().num_classes, 32, Path(weights)).eval()
    whole = accuracy(network, validation)
    for cut in cut_points(network, EXAMPLE)[1:-1]:
        head, tail = (half.eval() for half in split(network, EXAMPLE, cut.name))
        with torch.no_grad():
            feature = head(EXAMPLE)
        halves = {
            "device": export_onnx(head, EXAMPLE, input_name="image", output_name="feature"),
            "edge": export_onnx(tail, feature, input_name="feature", output_name="logits"),
        }
        yield Way(f"{backbone} {cut.name} raw-fp32", whole, frame_size([4 * cut.elements]), False, True, "floats", 32, shape=cut.shape, **halves)
        if len(cut.shape) == 3:
            coded = build_split(network, EXAMPLE, cut.name, CodecSpec("raw-8bit", cut.shape[0], 1, 8)).eval()
            assert isinstance(coded.codec, RawByteCodec)
            coded.codec.calibrate(outputs(coded.head, train[0][:CALIBRATION_IMAGES]))
            sizes = cost(coded, validation[0][:CALIBRATION_IMAGES])
            yield _with_symbols(coded, f"{backbone} {cut.name} raw-8bit", accuracy(coded, validation), sizes["frame_bytes"]["mean"], ours=False)


def _with_symbols(network: CoInference, name: str, accuracy: float, frame_bytes: float, *, ours: bool) -> Way:
    half = network.device_half().eval()
    with torch.no_grad():
        symbols = half(EXAMPLE)
    return Way(
        name,
        accuracy,
        frame_bytes,
        ours=ours,
        real_cut=True,
        sent="symbols",
        image_size=32,
        device=export_onnx(half, EXAMPLE, input_name="image", output_name="symbols"),
        edge=export_onnx(network.edge_half().eval(), symbols, input_name="symbols", output_name="logits"),
        tables=tables_of(network),
        shape=network.codec.code_shape,
    )


def _whole(network: nn.Module) -> bytes:
    return export_onnx(network.eval(), EXAMPLE, input_name="image", output_name="logits")
