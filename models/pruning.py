"""Structural pruning of the device half (METHODS 2); the only module that imports torch_pruning.

Torch-Pruning supplies the dependency graph (DepGraph, Fang et al., CVPR 2023, arXiv 2301.12900); which channels go, and the narrowing itself, are ours,
so that a network pruned now and one rebuilt later from its plan pass through the same code.
"""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from pipeline.errors import ModelError

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PASSED_THROUGH = (tp.ops.OPTYPE.CONCAT, tp.ops.OPTYPE.SPLIT, tp.ops.OPTYPE.ELEMENTWISE, tp.ops.OPTYPE.RESHAPE, tp.ops.OPTYPE.SLICE)


@dataclass(frozen=True)
class ChannelPlan:
    """Which channels a pruned network kept, from which it is rebuilt before its weights load.

    `kept` maps a layer's name to {"out": indices, "in": indices}, indices of the unpruned network in ascending order; a side that is whole is left out,
    and so is a layer that is whole. A batch norm has only "out"; a depthwise convolution has both sides, equal.
    """

    kept: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)

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


def prune_head(
    head: nn.Module,
    example: Tensor,
    keep: Mapping[str, float],
    layers_of_block: Mapping[str, Sequence[str]],
    channel_block: int = 1,
) -> tuple[nn.Module, ChannelPlan]:
    """A narrower copy of `head`, and the plan that describes it.

    Channels that must go together (residual sums, batch norms, squeeze-excitation, depthwise convolutions) form a group; a group belongs to the block that
    holds its first layer and keeps round(ratio*channels), rounded up to a multiple of `channel_block`, the ones whose weights have the largest l1 norm summed
    over the group (METHODS 2). Groups that reach the head's output stay whole, so the edge half never changes; so do those with members other than
    convolutions, linear layers and batch norms (attention, layer norm), and a whole head that shuffles channels or attends in windows.

    Args:
        head: device half, image (B, 3, H, W) -> feature (B, C, h, w) or vector (B, C); untouched.
        example: one input of `head`.
        keep: block -> kept fraction in (0, 1]; blocks not named are kept whole.
        layers_of_block: block -> names of its layers, blocks and layers in order of execution.

    Raises:
        ModelError: an unknown block, a ratio outside (0, 1], or one that would leave a layer without channels.
    """
    for block, ratio in keep.items():
        if block not in layers_of_block:
            raise ModelError(f"keep names block {block}, which the device half does not have; choose among {', '.join(layers_of_block) or 'none'}.")
        if not 0 < ratio <= 1:
            raise ModelError(f"keep ratio of block {block} is {ratio}; choose a fraction above 0 and at most 1.")
    if all(ratio == 1 for ratio in keep.values()):
        return copy.deepcopy(head), ChannelPlan()

    traced = copy.deepcopy(head).requires_grad_(True)
    names = {module: name for name, module in traced.named_modules()}
    position = {name: (index, block) for index, (block, name) in enumerate((b, n) for b, layers in layers_of_block.items() for n in layers)}
    removed: dict[tuple[str, str], set[int]] = defaultdict(set)
    graph, groups = _free_groups(traced, example[:1])
    for group in groups:
        members = [names[item.dep.target.module] for item in group if item.dep.target.module in names]
        placed = sorted(position[name] for name in members if name in position)
        ratio = keep.get(placed[0][1], 1.0) if placed else 1.0
        if ratio == 1:
            continue
        root = group[0].dep
        indices = _least_important(group, ratio, f"block {placed[0][1]}", names[root.target.module], channel_block)
        if not indices:
            continue
        # Asked again for the chosen channels only: channels of one layer may be tied to each other, which the group of all of them does not show.
        for item in graph.get_pruning_group(root.target.module, root.handler, indices):
            for side in _sides(graph, item.dep):
                removed[names[item.dep.target.module], side].update(item.idxs)

    kept: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for (name, side), gone in sorted(removed.items()):
        rest = tuple(sorted(set(range(_width(traced.get_submodule(name), side))) - gone))
        if not rest:
            raise ModelError(f"pruning would leave layer {name} without channels; raise its block's keep ratio.")
        kept[name][side] = rest
    plan = ChannelPlan(dict(kept))
    pruned = rebuild(head, plan)
    _check_output(pruned, traced, example[:1])
    return pruned, plan


def rebuild(head: nn.Module, plan: ChannelPlan) -> nn.Module:
    """A copy of the unpruned `head` with the shapes of `plan`, weights taken by index; the state dict of the pruned head then fits.

    Raises:
        ModelError: a layer the head lacks, or channels that layer does not have.
    """
    pruned = copy.deepcopy(head)
    for name, sides in plan.kept.items():
        try:
            layer = pruned.get_submodule(name)
        except AttributeError as error:
            raise ModelError(
                f"channel plan names layer {name}, which this network does not have; rebuild from the backbone and cut it was made for."
            ) from error
        for side, indices in sides.items():
            if indices[-1] >= _width(layer, side):
                raise ModelError(
                    f"channel plan keeps channel {indices[-1]} ({side}) of layer {name}, which has {_width(layer, side)}; rebuild from the unpruned backbone."
                )
        _narrow(name, layer, sides)
    return pruned


def _free_groups(head: nn.Module, example: Tensor) -> tuple[Any, list[Any]]:
    """The dependency graph of `head` and the groups that may be pruned, `head` being a copy that may be traced."""

    class Anchored(nn.Module):
        """The head and one more layer that reads its output: whatever is coupled to that layer's input is coupled to the cut."""

        def __init__(self, anchor: nn.Module) -> None:
            super().__init__()
            self.head, self.anchor = head, anchor

        def forward(self, x: Tensor) -> Tensor:
            return self.anchor(self.head(x))

    with torch.enable_grad():
        feature = head.eval()(example)
        if _regroups(feature):
            return None, []
        anchor = nn.Conv2d(feature.shape[1], 1, 1) if feature.ndim == 4 else nn.Linear(feature.shape[-1], 1)
        try:
            graph = tp.DependencyGraph().build_dependency(Anchored(anchor), example_inputs=[example], verbose=False)
            groups = list(graph.get_all_groups(ignored_layers=[anchor]))
        except Exception as error:  # Torch-Pruning raises whatever an operation unknown to it leads to
            raise ModelError(f"this device half cannot be pruned: Torch-Pruning cannot follow its channels ({error}); keep its blocks whole.") from error

    def free(group: Any) -> bool:
        for item in group:
            layer = item.dep.target.module
            if layer is anchor:
                return False
            if isinstance(layer, _CONVOLUTIONS):
                # Torch-Pruning takes any convolution with one filter a group for depthwise, also where filters read several channels each.
                if layer.groups == layer.out_channels > 1 and layer.in_channels != layer.out_channels:
                    return False
                if _pattern(layer) > 1 and list(item.idxs) != list(range(len(group[0].idxs))):
                    return False
            elif not isinstance(layer, (nn.Linear, *_NORMS)) and item.dep.target.type not in _PASSED_THROUGH:
                return False
        return True

    return graph, [group for group in groups if free(group)]


def _regroups(feature: Tensor) -> bool:
    """Whether `feature` was computed through a view of five dimensions or more: channel shuffle, windows of attention.

    Torch-Pruning does not follow them: it fails on ShuffleNet and searches without end on Swin.
    """
    waiting, seen = [feature.grad_fn], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "View" in node.name() and len(getattr(node, "_saved_self_sym_sizes", ())) > 4:
            return True
        waiting.extend(source for source, _ in node.next_functions)
    return False


def _pattern(layer: nn.Module) -> int:
    """In how many equal parts the channels of a layer must be pruned alike: the groups of a grouped convolution that is not depthwise, else 1."""
    return layer.groups if isinstance(layer, _CONVOLUTIONS) and not _depthwise(layer) else 1


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _CONVOLUTIONS) and layer.groups == layer.in_channels == layer.out_channels > 1


def _sides(graph: Any, dependency: Any) -> tuple[str, ...]:
    """Which sides of the dependency's target it prunes; none where the target holds no channels of its own."""
    layer = dependency.target.module
    if isinstance(layer, _NORMS):
        return ("out",)
    if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        return ()
    if _depthwise(layer):
        return ("out", "in")
    return ("out",) if graph.is_out_channel_pruning_fn(dependency.handler) else ("in",)


def _width(layer: nn.Module, side: str) -> int:
    if isinstance(layer, _NORMS):
        return layer.num_features
    if isinstance(layer, nn.Linear):
        return layer.out_features if side == "out" else layer.in_features
    if isinstance(layer, _CONVOLUTIONS):
        return layer.out_channels if side == "out" else layer.in_channels
    raise ModelError(f"channel plan names a layer of type {type(layer).__name__}, which cannot be narrowed; rebuild from the backbone it was made for.")


def _least_important(group: Any, ratio: float, block: str, layer: str, channel_block: int) -> list[int]:
    """Channels of the group's first layer that go, ascending."""
    channels = len(group[0].idxs)
    parts = math.lcm(*(_pattern(item.dep.target.module) for item in group))
    if channels % parts or channels == parts:
        return []
    units = channels // parts
    kept = math.floor(ratio * units + 0.5)
    if kept < 1:
        raise ModelError(f"keep ratio {ratio} of {block} would leave layer {layer} ({units} channels) without channels; choose at least {1 / units:.3g}.")
    step = channel_block // math.gcd(channel_block, parts)
    kept = min(units, math.ceil(kept / step) * step)
    scores = _importance(group, channels).reshape(parts, units).sum(0)
    gone = torch.argsort(scores, stable=True)[: units - kept]
    return sorted(int(unit) + part * units for part in range(parts) for unit in gone)


@torch.no_grad()
def _importance(group: Any, channels: int) -> Tensor:
    """l1 norm of the weights that go with each channel, summed over the group: (channels,).

    Torch-Pruning's own magnitude importance passes over depthwise filters and misplaces the inputs of grouped convolutions.
    """
    scores = torch.zeros(channels, dtype=torch.float64)
    for item in group:
        layer = item.dep.target.module
        if isinstance(layer, _NORMS):
            norms = layer.weight.abs() if layer.affine else torch.zeros(layer.num_features)
        elif not isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
            continue
        elif "out" in _sides(group._DG, item.dep):
            norms = layer.weight.abs().flatten(1).sum(1)
        else:
            parts = _pattern(layer)
            norms = layer.weight.abs().reshape(parts, layer.weight.shape[0] // parts, layer.weight.shape[1], -1).sum(dim=(1, 3)).flatten()
        scores.index_add_(0, torch.tensor(item.root_idxs), norms[item.idxs].double().cpu())
    return scores


def _narrow(name: str, layer: nn.Module, sides: Mapping[str, tuple[int, ...]]) -> None:
    """Takes the channels of `sides` out of `layer`, in place."""

    def take(attribute: str, indices: Sequence[int], dim: int = 0) -> None:
        tensor = getattr(layer, attribute)
        if tensor is not None:
            chosen = tensor.detach().index_select(dim, torch.tensor(indices, device=tensor.device))
            setattr(layer, attribute, nn.Parameter(chosen, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else chosen)

    out, into = sides.get("out"), sides.get("in")
    if isinstance(layer, _NORMS):
        if out is not None:
            for attribute in ("weight", "bias", "running_mean", "running_var"):
                take(attribute, out)
            layer.num_features = len(out)
        return
    if isinstance(layer, _CONVOLUTIONS) and layer.groups > 1:
        for side, indices in sides.items():
            width = _width(layer, side) // layer.groups
            if not _depthwise(layer) and list(indices) != [i + g * width for g in range(layer.groups) for i in indices if i < width]:
                raise ModelError(f"channel plan prunes the groups of convolution {name} unequally; use the plan the pruning wrote.")
        if _depthwise(layer):
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


@torch.no_grad()
def _check_output(pruned: nn.Module, whole: nn.Module, example: Tensor) -> None:
    """The narrowed copy still runs and gives a feature of the same shape; both are run in eval mode, the batch norms of `pruned` untouched."""
    probe = copy.deepcopy(pruned).eval()
    try:
        same = probe(example).shape == whole.eval()(example).shape
    except RuntimeError as error:
        raise ModelError(f"this device half cannot be pruned: its layers no longer fit ({str(error).splitlines()[0]}); keep its blocks whole.") from error
    if not same:
        raise ModelError("this device half cannot be pruned: the shape of the feature it sends would change; keep its blocks whole.")
