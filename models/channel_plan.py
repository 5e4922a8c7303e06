"""The plan that describes a pruned network, and what is done by it: rebuilding the network narrower, or silencing channels for a while (METHODS 2)."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.branches import drop_branches
from pipeline.errors import ModelError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class ChannelPlan:
    """Which channels a pruned network kept, from which it is rebuilt before its weights load.

    `kept` maps a layer's name to {"out": indices, "in": indices}, indices of the unpruned network in ascending order; a side that is whole is left out,
    and so is a layer that is whole. A batch norm has only "out"; a depthwise convolution has both sides, equal. A layer of {"out": []} is gone, and so
    are all others between the ends of the shortcut around it.
    """

    kept: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def dropped(self) -> frozenset[str]:
        """The layers that are gone."""
        return frozenset(name for name, sides in self.kept.items() if sides.get("out") == ())

    def to_dict(self) -> dict[str, dict[str, list[int]]]:
        return {name: {side: list(indices) for side, indices in sides.items()} for name, sides in self.kept.items()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ChannelPlan:
        """Raises ModelError where `fields` is not a plan."""
        kept: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, sides in fields.items():
            if not isinstance(sides, Mapping) or not sides or not set(sides) <= {"out", "in"}:
                raise ModelError(f'channel plan, layer {name}: expected {{"out": [...], "in": [...]}}, found {sides!r}; use the plan the pruning wrote.')
            if sides == {"out": []}:
                kept[name] = {"out": ()}
                continue
            for side, indices in sides.items():
                ints = isinstance(indices, Sequence) and all(type(i) is int and i >= 0 for i in indices)
                if not (ints and indices and list(indices) == sorted(set(indices))):
                    raise ModelError(f'channel plan, layer {name}: "{side}" must be ascending channel numbers, at least one; use the plan the pruning wrote.')
            kept[name] = {side: tuple(indices) for side, indices in sides.items()}
        return cls(kept)

    @classmethod
    def from_json(cls, text: str) -> ChannelPlan:
        """Raises ModelError where `text` is not a plan."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ModelError(f"channel plan is not JSON ({error}); use the plan the pruning wrote.") from error
        if not isinstance(fields, dict):
            raise ModelError("channel plan is not a JSON object; use the plan the pruning wrote.")
        return cls.from_dict(fields)


def rebuild(head: nn.Module, plan: ChannelPlan) -> nn.Module:
    """A copy of the unpruned `head` with the shapes of `plan`, weights taken by index; the state dict of the pruned head then fits.

    Raises:
        ModelError: a layer the head lacks, channels that layer does not have, or a layer to be dropped that no shortcut goes past.
    """
    pruned = copy.deepcopy(head)
    drop_branches(pruned, plan.dropped)
    for name, sides in plan.kept.items():
        if name in plan.dropped:
            continue
        try:
            layer = pruned.get_submodule(name)
        except AttributeError as error:
            raise ModelError(
                f"channel plan names layer {name}, which this network does not have; rebuild from the backbone and cut it was made for."
            ) from error
        for side, indices in sides.items():
            if indices[-1] >= width(layer, side):
                raise ModelError(
                    f"channel plan keeps channel {indices[-1]} ({side}) of layer {name}, which has {width(layer, side)}; rebuild from the unpruned backbone."
                )
        _narrow(name, layer, sides)
    return pruned


class Silence:
    """Channels of a network held at zero, as if they were gone, until `lift` gives them back what they had (soft pruning, METHODS 2).

    Filters, biases, scales and shifts of the channels that `plan` leaves out are zero, so no batch norm lets beta - gamma*mu/sigma through. What an
    optimiser does to them meanwhile (momentum, weight decay) `hold` undoes; call it after every step. `had` is what they had, in a fixed order, to go
    on from a checkpoint.
    """

    def __init__(self, network: nn.Module, plan: ChannelPlan, had: Sequence[Tensor] | None = None) -> None:
        self._silent: list[tuple[Tensor, Tensor]] = []  # a tensor of the network, and the silenced indices of its first axis
        for name, sides in plan.kept.items():
            if "out" not in sides:
                continue
            layer = network.get_submodule(name)
            if not sides["out"]:
                whole = (*layer.parameters(), *(buffer for buffer in layer.buffers() if buffer.ndim))
                self._silent += [(tensor, torch.arange(len(tensor))) for tensor in whole]
                continue
            silent = torch.ones(width(layer, "out"), dtype=torch.bool)
            silent[list(sides["out"])] = False
            tensors = (getattr(layer, attribute, None) for attribute in ("weight", "bias", "running_mean", "running_var"))
            self._silent += [(tensor, silent.nonzero().flatten()) for tensor in tensors if tensor is not None]
        self.had = list(had) if had is not None else [tensor.detach()[indices].clone() for tensor, indices in self._silent]
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Silence them again."""
        for tensor, indices in self._silent:
            if isinstance(tensor, nn.Parameter):
                tensor[indices] = 0

    @torch.no_grad()
    def lift(self) -> None:
        """Let them speak as before they were silenced."""
        for (tensor, indices), had in zip(self._silent, self.had, strict=True):
            tensor[indices] = had


def silenced(network: nn.Module, plan: ChannelPlan) -> dict[str, Tensor]:
    """The parameters of `network` that `plan` concerns, by name, with zeros for the channels it leaves out, as `Silence` would leave them.

    For `torch.func.functional_call`: `network` itself stays as it is, and gradients reach what is not silent.
    """
    found: dict[str, Tensor] = {}
    for name, sides in plan.kept.items():
        if "out" not in sides:
            continue
        for own, parameter in network.get_submodule(name).named_parameters():
            speaks = torch.zeros(len(parameter), device=parameter.device)
            speaks[list(sides["out"])] = 1
            found[f"{name}.{own}"] = parameter * speaks.reshape(-1, *[1] * (parameter.ndim - 1))
    return found


def depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def width(layer: nn.Module, side: str) -> int:
    if isinstance(layer, NORMS):
        return layer.num_features
    if isinstance(layer, nn.Linear):
        return layer.out_features if side == "out" else layer.in_features
    if isinstance(layer, CONVOLUTIONS):
        return layer.out_channels if side == "out" else layer.in_channels
    raise ModelError(f"channel plan names a layer of type {type(layer).__name__}, which cannot be narrowed; rebuild from the backbone it was made for.")


def _narrow(name: str, layer: nn.Module, sides: Mapping[str, tuple[int, ...]]) -> None:
    """Takes the channels of `sides` out of `layer`, in place."""

    def take(attribute: str, indices: Sequence[int], dim: int = 0) -> None:
        tensor = getattr(layer, attribute)
        if tensor is not None:
            chosen = tensor.detach().index_select(dim, torch.tensor(indices, device=tensor.device))
            setattr(layer, attribute, nn.Parameter(chosen, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else chosen)

    out, into = sides.get("out"), sides.get("in")
    if isinstance(layer, NORMS):
        if out is not None:
            for attribute in ("weight", "bias", "running_mean", "running_var"):
                take(attribute, out)
            layer.num_features = len(out)
        return
    if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
        for side, indices in sides.items():
            per_group = width(layer, side) // layer.groups
            if not depthwise(layer) and list(indices) != [i + g * per_group for g in range(layer.groups) for i in indices if i < per_group]:
                raise ModelError(f"channel plan prunes the groups of convolution {name} unequally; use the plan the pruning wrote.")
        if depthwise(layer):
            if out is None or out != into:
                raise ModelError(f"channel plan must keep the same inputs and outputs of depthwise convolution {name}; use the plan the pruning wrote.")
            layer.groups = layer.in_channels = len(out)
            into = None
    if into is not None:
        per_filter = layer.weight.shape[1] if isinstance(layer.weight, Tensor) else 0
        take("weight", [i for i in into if i < per_filter], dim=1)
        setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(into))
    if out is not None:
        take("weight", out)
        take("bias", out)
        setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", len(out))
