"""A profile of a device that does not exist, whose kernels take time by a formula, so that predictions can be checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import nn

from models.codec import CodecSpec, UniformCodec
from models.operations import Operation, operations
from pipeline.costs.device_profile import DeviceProfile, WholeNetwork, backbone_key
from pipeline.costs.fused import kernel_calls
from pipeline.costs.kernel_call import KernelCall
from pipeline.costs.latency_model import RunTime
from pipeline.costs.measured_times import CoderTimes, ImageTimes, Spread
from tests.tiny import tiny_backbone

BLOCK = 8
CALL_MS = 0.01
KEY = backbone_key("tests.tiny:tiny_backbone", 16)
NETWORKS = 24


def exactly(ms: float) -> Spread:
    return Spread(ms, ms, ms)


def kernel_ms(call: KernelCall, ms_per_mmac: float) -> float:
    """Time by MACs (layers) or values (the rest), and as much again as half a microsecond each."""
    spent = math.prod(call.weights) * math.prod(call.output[2:]) if call.weights else math.prod(call.output) / 10
    return 5e-4 + ms_per_mmac * spent / 1e6


@cache
def _networks() -> tuple[tuple[KernelCall, ...], ...]:
    """Kernels of small convolutional networks of many widths, and of the tiny backbone, in both precisions."""
    return tuple(kernel_calls(traced, precision, block=BLOCK) for precision in ("fp32", "int8") for traced in (whole(), *_random()))  # type: ignore[arg-type]


def _random() -> Iterator[tuple[Operation, ...]]:
    random = np.random.default_rng(0)
    for number in range(NETWORKS):
        first, second, width = (int(n) for n in random.integers(1, 17, 3))
        stride = 1 + number % 2
        layers = [nn.Conv2d(3, first, 3, padding=1), nn.ReLU(), nn.Conv2d(first, second, 3, stride, 1), nn.ReLU()]
        codec = UniformCodec(CodecSpec("uniform", min(width, second), 1 + number % 3 % 2, 4), (second, 16 // stride, 16 // stride))
        yield operations(nn.Sequential(*layers, codec.encode, codec.quantise).eval(), torch.zeros(1, 3, 16, 16))
        yield operations(nn.Sequential(codec.dequantise, codec.decode).eval(), torch.zeros(1, *codec.code_shape, dtype=torch.uint8))


@cache
def whole() -> tuple[Operation, ...]:
    """The operations of the tiny backbone."""
    return operations(tiny_backbone(10, 16).eval(), torch.zeros(1, 3, 16, 16))


def toy_profile(ms_per_mmac: float = 1.0) -> DeviceProfile:
    """A device that takes `ms_per_mmac` for a million MACs, and 0.01 ms for a call; images of 16 x 16 and of 32 x 32, which take four times as long."""
    calls = {call: exactly(kernel_ms(call, ms_per_mmac)) for network in _networks() for call in network}
    runs = [(network, CALL_MS + sum(calls[call].median_ms for call in network)) for network in dict.fromkeys(_networks())]
    encode = {"webp": {30: 1.0, 90: 1.6, 100: 4.0}, "jpeg": {50: 0.2, 100: 0.4}, "png": {100: 2.0}}

    def images(factor: float) -> ImageTimes:
        codec = {name: {quality: exactly(factor * ms) for quality, ms in by_quality.items()} for name, by_quality in encode.items()}
        halved = {name: {quality: spread.scaled(0.5) for quality, spread in by_quality.items()} for name, by_quality in codec.items()}
        return ImageTimes(exactly(0.25 * factor), codec, halved)  # type: ignore[arg-type]

    return DeviceProfile(
        name="toy",
        runtime="onnxruntime 1",
        threads=1,
        machine={"cpu": "toy", "os": "Linux", "arch": "x86_64"},
        nchwc_block=BLOCK,
        channel_block=1,
        kernels=calls,
        runs=tuple(RunTime(network, ms, ms, ms) for network, ms in runs),
        images={16: images(1), 32: images(4)},
        networks={KEY: WholeNetwork(1_000_000, {"fp32": exactly(0.75)})},
        coder=CoderTimes("c", encode_fixed_ms=0.01, encode_per_symbol_ms=0.001, decode_fixed_ms=0.02, decode_per_symbol_ms=0.002),
    )
