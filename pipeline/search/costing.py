"""What candidates cost, predicted: time by part, energy, MACs and memory of the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from models.cutting import count_macs
from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.energy import PowerModel, energy_mj
from pipeline.costs.latency import HalfCosts, mean_wire_bytes, predict, reply_frame_bytes
from pipeline.costs.link import Link, wire_bytes
from pipeline.errors import ProfileError
from pipeline.networks import layers_up_to
from pipeline.runtime.frame import OVERHEAD_BYTES
from pipeline.search.candidate import Candidate, Measurement, Precision
from pipeline.search.problem import Problem


@dataclass(frozen=True)
class Deployment:
    """Where a candidate would run: the two profiles, the backbone's key in them, the link, and what the device draws."""

    backbone_key: str
    device: DeviceProfile
    edge: DeviceProfile
    link: Link
    power: PowerModel


class Costing:
    """Predicts what the candidates of `problem`, of `classes` classes, cost on `deployment`."""

    def __init__(self, problem: Problem, deployment: Deployment, classes: int) -> None:
        self.problem, self.deployment, self.classes = problem, deployment, classes
        self._whole_macs = count_macs(problem.backbone, problem.example)

    def half_costs(
        self,
        candidate: Candidate,
        block_macs: Mapping[str, float],
        *,
        encoder_macs: float = 0,
        decoder_macs: float = 0,
        symbols: int = 0,
        quality: int | None = None,
    ) -> Callable[[float], HalfCosts]:
        """All that latency needs but the mean frame size, which is still to come.

        Raises:
            ProfileError: an image format that profiles hold no times of.
        """
        if candidate.image_format not in (None, "webp"):
            raise ProfileError(
                f"search.images has {candidate.image_format}, but device profiles hold the times of webp alone, so its latency cannot be told; leave it out."
            )

        def with_frame(frame_bytes: float) -> HalfCosts:
            return HalfCosts(
                kind=candidate.kind,
                backbone_key=self.deployment.backbone_key,
                cut=candidate.cut,
                block_macs=block_macs,
                encoder_macs=encoder_macs,
                decoder_macs=decoder_macs,
                symbols=symbols,
                frame_bytes=frame_bytes,
                quality=quality,
                reply_bytes=reply_frame_bytes(self.classes),
            )

        return with_frame

    def measurement(
        self,
        costs_of: Callable[[float], HalfCosts],
        accuracy: float,
        payload_sizes: Sequence[int],
        device_params: int,
        memory_bytes: int,
        bundle_bytes: int,
    ) -> Measurement:
        frames = [size + OVERHEAD_BYTES for size in payload_sizes]
        frame_bytes = float(np.mean(frames)) if frames else 0.0
        costs = costs_of(frame_bytes)
        parts = predict(costs, self.deployment.device, self.deployment.edge, self.deployment.link)
        return Measurement(
            accuracy=accuracy,
            **parts,
            payload_bits=8 * float(np.mean(payload_sizes)) if frames else 0.0,
            frame_bytes=frame_bytes,
            wire_bytes=float(np.mean([wire_bytes(frame) for frame in frames])) if frames else 0.0,
            energy_mj=energy_mj(parts, self.deployment.power, self.deployment.link.transmit_ms(mean_wire_bytes(frame_bytes)) if frames else 0.0),
            device_macs=int(sum(costs.block_macs.values()) + costs.encoder_macs),
            device_params=device_params,
            device_memory_mb=memory_bytes / 1e6,
            bundle_mb=bundle_bytes / 1e6,
        )

    def block_macs(self, network: nn.Module, cut: str) -> dict[str, float]:
        """MACs of each device block: what it had, less what its layers lost. (Products outside layers, as in attention, are not pruned.)"""
        now, whole = count_macs(network, self.problem.example), self._whole_macs
        full = {after.name: after.macs - before.macs for before, after in itertools.pairwise(self.problem.cuts)}

        def lost(layer: str) -> int:
            return sum(macs - now.get(name, 0) for name, macs in whole.items() if name == layer or name.startswith(f"{layer}."))

        return {block: float(full[block] - sum(map(lost, layers))) for block, layers in layers_up_to(self.problem.cuts, cut).items()}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def weight_bytes(network: nn.Module, precision: Precision = "fp32") -> int:
    """What `network` holds of a bundle."""
    return parameters(network) * (1 if precision == "int8" else 4)


@torch.no_grad()
def memory_bytes(network: nn.Module, example: Tensor) -> int:
    """fp32 weights and the largest tensor that enters or leaves a layer, for one image."""
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
    return 4 * (parameters(network) + largest)
