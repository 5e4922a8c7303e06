"""What candidates cost, predicted: time by part, energy, MACs and memory of the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.channel_plan import rebuild
from models.codec import CodecSpec, SymbolCodec
from models.codecs import build_codec
from models.cutting import count_macs, split
from models.operations import Operation, chained, macs, operations
from models.pruned_operations import PrunedOperations
from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.energy import PowerModel, energy_mj
from pipeline.costs.latency import HalfCosts, predict
from pipeline.costs.link import Link, link_ms, mean_wire_bytes, reply_frame_bytes, wire_bytes
from pipeline.networks import codec_spec, layers_up_to
from pipeline.runtime.frame import OVERHEAD_BYTES
from pipeline.search.candidate import OUTPUT, Candidate, Measurement, Precision
from pipeline.search.layer import Layer
from pipeline.search.problem import Problem

# What coded symbols may take more than uncoded ones: the coder stays within a byte of the cross-entropy, which noise, coded by the tables of other images,
# may push a little above the uncoded bits; an operating point takes a byte.
BOUND_SHARE, BOUND_BYTES = 1 / 16, 8


@dataclass(frozen=True)
class Deployment:
    """Where a candidate would run: the two profiles, the link, and what the device draws."""

    device: DeviceProfile
    edge: DeviceProfile
    link: Link
    power: PowerModel


class _Codec(NamedTuple):
    """Of a codec for one feature shape: the operations of its two sides, what one image's code takes uncoded, and how many symbols the coder codes."""

    encoder: tuple[Operation, ...]
    decoder: tuple[Operation, ...]
    uncoded_bits: int
    symbols: int


class _Predicted(NamedTuple):
    """What is kept of a candidate: the parts of its latency with an empty frame, what its code takes uncoded, and the MACs of its device half."""

    parts: dict[str, float]
    uncoded_bits: int
    reply_bytes: float
    device_macs: int


class Costing:
    """Predicts what the candidates of `problem`, of `classes` classes, cost on `deployment`, without building or pruning a network.

    A candidate never asked for takes milliseconds, one asked for again nothing.
    """

    def __init__(self, problem: Problem, deployment: Deployment, classes: int) -> None:
        self.problem, self.deployment, self.classes = problem, deployment, classes
        self._points = {point.name: point for point in problem.cuts}
        self._heads: dict[str, PrunedOperations] = {}
        self._tails: dict[str, tuple[Operation, ...]] = {}
        self._codecs: dict[tuple[CodecSpec, tuple[int, ...], int], _Codec] = {}
        self._known: dict[Candidate, _Predicted] = {}
        self._sizes: dict[tuple[str, tuple[tuple[str, float], ...], Precision], tuple[int, int, int]] = {}

    def measurement(
        self, candidate: Candidate, accuracy: float, payload_sizes: Sequence[int], device_params: int, memory_bytes: int, bundle_bytes: int
    ) -> Measurement:
        """`candidate` with what was measured of it: its accuracy, the coded bytes of some images (none where nothing is sent), parameters, memory, bundle.

        Raises:
            ModelError: the candidate prunes a layer to nothing, or its codec does not fit the cut.
            ProfileError: a profile lacks the image format.
        """
        return self._measurement(self._predicted(candidate), accuracy, payload_sizes, device_params, memory_bytes, bundle_bytes)

    def least(self, narrowest: Candidate) -> Measurement:
        """What no candidate of this cut and code, however it is pruned, is measured to have less of; with all of the accuracy.

        `narrowest` keeps the least of each group. A code is counted as empty, and of a half that can be pruned its codec not at all: the half takes what its
        multiply-accumulates do at best (`DeviceProfile.least_ms`), since narrower is not always predicted to be faster. All else pruning does not reach.

        Raises:
            ModelError, ProfileError: as `measurement`.
        """
        known, example = self._predicted(replace(narrowest, keep=())), self.problem.example
        if narrowest.kind == "edge-only":
            return self._measurement(known, 1.0, [0], 0, 4 * example.numel(), 2 * weight_bytes(self.problem.backbone))
        if narrowest.keep:
            computed = macs(self._pruned(narrowest))
            fastest_ms = self.deployment.device.image(example.shape[-1]).preprocess.median_ms
            fastest_ms += self.deployment.device.least_ms(computed, narrowest.precision)
            total_ms = known.parts["total_ms"] - known.parts["device_ms"] + fastest_ms
            known = known._replace(parts=known.parts | {"device_ms": fastest_ms, "total_ms": total_ms}, device_macs=computed)
        payload = [] if narrowest.kind == "device-only" else [0]
        return self._measurement(known, 1.0, payload, *self._least_sizes(narrowest.cut, narrowest.keep, narrowest.precision))

    def _least_sizes(self, cut: str, keep: tuple[tuple[str, float], ...], precision: Precision) -> tuple[int, int, int]:
        """Parameters and memory of the half alone, and the bundle's bytes without a codec."""
        key = cut, keep, precision
        if key not in self._sizes:
            head = rebuild(self.problem.head(cut), self.problem.plan(cut, dict(keep)))
            bundle = weight_bytes(head, precision)
            if cut != OUTPUT:
                bundle += weight_bytes(split(self.problem.backbone, self.problem.example, cut)[1]) + weight_bytes(self.problem.backbone)
            self._sizes[key] = parameters(head), memory_bytes(head, self.problem.example, precision), bundle
        return self._sizes[key]

    def _measurement(
        self, known: _Predicted, accuracy: float, payload_sizes: Sequence[int], device_params: int, memory_bytes: int, bundle_bytes: int
    ) -> Measurement:
        frames = [size + OVERHEAD_BYTES for size in payload_sizes]
        frame_bytes = float(np.mean(frames)) if frames else 0.0
        parts = self._with_link(known, frame_bytes) if frames else known.parts
        return Measurement(
            accuracy=accuracy,
            **parts,
            payload_bits=8 * float(np.mean(payload_sizes)) if frames else 0.0,
            frame_bytes=frame_bytes,
            wire_bytes=float(np.mean([wire_bytes(frame) for frame in frames])) if frames else 0.0,
            energy_mj=energy_mj(parts, self.deployment.power, self.deployment.link.transmit_ms(mean_wire_bytes(frame_bytes)) if frames else 0.0),
            device_macs=known.device_macs,
            device_params=device_params,
            device_memory_mb=memory_bytes / 1e6,
            bundle_mb=bundle_bytes / 1e6,
        )

    def layers(self, cut: str) -> list[Layer]:
        """What can be pruned of the device half up to `cut`, in the order of `Problem.legal_keep`."""
        head = self.problem.head(cut)
        computed, in_block = count_macs(head, self.problem.example), layers_up_to(self.problem.cuts, cut)
        return [_layer(name, head, in_block.get(name, (name,)), computed) for name in self.problem.legal_keep(cut)]

    def feature_shape(self, cut: str) -> tuple[int, ...]:
        """(C, H, W) or (C,) of what crosses at `cut`, uncoded and unpruned."""
        return self._points[cut].shape

    def bound_ms(self, candidate: Candidate) -> float:
        """Predicted end-to-end latency with the code as large as uncoded: never below what is then measured; raises as `measurement`."""
        known = self._predicted(candidate)
        if candidate.kind == "device-only":
            return known.parts["total_ms"]
        payload = math.ceil(known.uncoded_bits / 8 * (1 + BOUND_SHARE)) + BOUND_BYTES
        return self._with_link(known, payload + OVERHEAD_BYTES)["total_ms"]

    def _with_link(self, known: _Predicted, frame_bytes: float) -> dict[str, float]:
        over_link_ms = link_ms(frame_bytes, known.reply_bytes, self.deployment.link)
        return known.parts | {"link_ms": over_link_ms, "total_ms": known.parts["total_ms"] - known.parts["link_ms"] + over_link_ms}

    def _predicted(self, candidate: Candidate) -> _Predicted:
        if candidate not in self._known:
            costs, uncoded_bits = self._costs(candidate)
            parts = predict(costs, self.deployment.device, self.deployment.edge, self.deployment.link)
            self._known[candidate] = _Predicted(parts, uncoded_bits, costs.reply_bytes, macs(costs.device))
        return self._known[candidate]

    def _costs(self, candidate: Candidate) -> tuple[HalfCosts, int]:
        """What latency needs, and the bits of an image's code uncoded."""
        image_size, reply_bytes = self.problem.example.shape[-1], reply_frame_bytes(self.classes)
        if candidate.quality is not None:
            assert candidate.image_format is not None
            image_bits = 8 * self.problem.example[0].numel()
            edge = self._pruned(Candidate(OUTPUT))
            return HalfCosts("edge-only", image_size, edge=edge, image=(candidate.image_format, candidate.quality), reply_bytes=reply_bytes), image_bits
        head = self._pruned(candidate)
        if candidate.kind == "device-only":
            return HalfCosts("device-only", image_size, device=head, precision=candidate.precision), 0
        codec = self._codec(candidate, head[-1].output[1:])
        costs = HalfCosts(
            "split",
            image_size,
            device=chained(head, codec.encoder),
            edge=chained(codec.decoder, self._tail(candidate.cut)),
            precision=candidate.precision,
            symbols=codec.symbols,
            reply_bytes=reply_bytes,
        )
        return costs, codec.uncoded_bits

    def _pruned(self, candidate: Candidate) -> tuple[Operation, ...]:
        if candidate.cut not in self._heads:
            self._heads[candidate.cut] = PrunedOperations(self.problem.head(candidate.cut), self.problem.example)
        return self._heads[candidate.cut].of(self.problem.plan(candidate.cut, dict(candidate.keep)))

    def _tail(self, cut: str) -> tuple[Operation, ...]:
        if cut not in self._tails:
            _, tail = split(self.problem.backbone, self.problem.example, cut)
            self._tails[cut] = operations(tail, torch.zeros(1, *self._points[cut].shape))
        return self._tails[cut]

    def _codec(self, candidate: Candidate, feature: tuple[int, ...]) -> _Codec:
        key = codec_spec(candidate, self.problem.codec), feature, self._points[candidate.cut].shape[0]
        if key not in self._codecs:
            with torch.random.fork_rng(devices=[]):  # its weights are drawn, and must not be from what a trial draws from
                codec = build_codec(*key).eval()
            coded = isinstance(codec, SymbolCodec)
            encode, decode = codec.encode, codec.decode
            code = torch.zeros(1, *codec.code_shape)
            if isinstance(codec, SymbolCodec):
                encode, decode, code = nn.Sequential(encode, codec.quantise), nn.Sequential(codec.dequantise, decode), code.to(torch.uint8)
            sides = operations(encode, torch.zeros(1, *feature)), operations(decode, code)
            self._codecs[key] = _Codec(*sides, codec.uncoded_bits, code.numel() if coded else 0)
        return self._codecs[key]


def _layer(name: str, head: nn.Module, members: Sequence[str], computed: dict[str, int]) -> Layer:
    found = [(member, layer) for member in members if isinstance(layer := head.get_submodule(member), (nn.Conv2d, nn.Linear))]
    _, first = found[0]
    weights, spent = sum(layer.weight.numel() for _, layer in found), sum(computed.get(member, 0) for member, _ in found)
    if isinstance(first, nn.Linear):
        return Layer(name, "fc", first.in_features, first.out_features, 1, 1, weights, spent)
    return Layer(name, "conv", first.in_channels, first.out_channels, first.stride[0], int(first.kernel_size[0]), weights, spent)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def weight_bytes(network: nn.Module, precision: Precision = "fp32") -> int:
    """What `network` holds of a bundle."""
    return parameters(network) * (1 if precision == "int8" else 4)


@torch.no_grad()
def memory_bytes(network: nn.Module, example: Tensor, precision: Precision = "fp32") -> int:
    """Weights and the largest tensor that enters or leaves a layer, for one image."""
    largest = 0

    def see(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        largest = max([largest, *(tensor.numel() for tensor in (*inputs, output) if isinstance(tensor, Tensor))])

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(see) for module in leaves]
    try:
        network(example)
    finally:
        for hook in hooks:
            hook.remove()
    return weight_bytes(network, precision) + 4 * largest
