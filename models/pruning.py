"""Structural pruning of the device half (METHODS 2); the only module that imports torch_pruning.

Torch-Pruning supplies the dependency graph (DepGraph, Fang et al., CVPR 2023, arXiv 2301.12900); which channels go, and the narrowing itself, are ours,
so that a network pruned now and one rebuilt later from its plan pass through the same code.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import skip_init

from models.branches import residual_branches
from models.channel_plan import CONVOLUTIONS, NORMS, ChannelPlan, depthwise, rebuild, width
from pipeline.errors import ModelError

_PASSED_THROUGH = (tp.ops.OPTYPE.CONCAT, tp.ops.OPTYPE.SPLIT, tp.ops.OPTYPE.ELEMENTWISE, tp.ops.OPTYPE.RESHAPE, tp.ops.OPTYPE.SLICE)

Importance = Literal["l1", "l2", "taylor"]
Scores = Mapping[str, Tensor]


class Pruner:
    """Chooses which channels of a device half go.

    Channels that must go together (residual sums, batch norms, squeeze-excitation, depthwise convolutions) form a group; a group is named by its first
    layer and belongs to that layer's block. Groups with members other than convolutions, linear layers and batch norms stay whole (attention, layer
    norm). So do those that reach the half's output, whose channels the edge half expects, unless `cut_channels`: a codec follows that restores them.

    Args:
        head: device half, image (B, 3, H, W) -> feature (B, C, h, w) or vector (B, C); untouched.
        example: one input of `head`.
        layers_of_block: block -> names of its layers, blocks and layers in order of execution.
        channel_block: kept counts are rounded up to a multiple of this.

    Raises:
        ModelError: Torch-Pruning cannot follow the half's channels, for the reason given.
    """

    def __init__(
        self, head: nn.Module, example: Tensor, layers_of_block: Mapping[str, Sequence[str]], channel_block: int = 1, *, cut_channels: bool = False
    ) -> None:
        self._traced = copy.deepcopy(head).requires_grad_(True)
        self._names = {module: name for name, module in self._traced.named_modules()}
        self._channel_block, self._blocks = channel_block, tuple(layers_of_block)
        self._branches = residual_branches(head)
        self._layers_of_block = {block: frozenset(layers) for block, layers in layers_of_block.items()}
        self._graph, groups, self._anchor = _free_groups(self._traced, example[:1], cut_channels)
        position = {name: (index, block) for index, (block, name) in enumerate((b, n) for b, layers in layers_of_block.items() for n in layers)}
        self._groups: dict[str, tuple[str, Any]] = {}
        for group in groups:
            members = {self._names[item.dep.target.module] for item in group if item.dep.target.module in self._names}
            if placed := sorted((position[name][0], name) for name in members if name in position):
                self._groups[placed[0][1]] = (position[placed[0][1]][1], group)

    @property
    def groups(self) -> dict[str, str]:
        """Name of each group that can be pruned -> its block."""
        return {name: block for name, (block, _) in self._groups.items()}

    def scores(self, head: nn.Module, importance: Importance = "l1", *, own: bool = False) -> Scores:
        """How much each group's channels matter in `head`, a half of the shape that this was made for, by its weights as they are now: group -> (channels,).

        Summed over the layers of the group: the l1 or l2 norm of what belongs to the channel, or `taylor`, |weight * gradient| (arXiv 1906.10771), for
        which `head` must hold gradients; add up the scores of several batches. With `own` only what computes a channel counts, not what reads it, so
        those that `Silence` holds score 0.

        Raises:
            ModelError: `taylor` without gradients.
        """
        return {name: self._importance(head, group, importance, own) for name, (_, group) in self._groups.items()}

    def plan(self, keep: Mapping[str, float], scores: Scores) -> ChannelPlan:
        """The channels to keep: of each group round(ratio*channels), rounded up to a multiple of the channel block, those that score highest.

        Args:
            keep: block or group -> kept fraction in (0, 1]; what is not named is kept whole, and a group's own ratio goes before its block's. 0 drops all
                that shortcuts go past in a block.

        Raises:
            ModelError: an unknown block, a ratio outside [0, 1], one that would leave a layer without channels, or 0 for what no shortcut goes past.
        """
        for name, ratio in keep.items():
            if name not in self._blocks and name not in self._groups:
                known = ", ".join(self._blocks) or "none"
                raise ModelError(f"keep names block {name}, which the device half does not have; choose among {known}.")
            if not 0 <= ratio <= 1:
                raise ModelError(f"keep ratio of block {name} is {ratio}; choose a fraction of at most 1, or 0 to drop a block that a shortcut goes past.")
        dropped = {layer for name, ratio in keep.items() if ratio == 0 for layer in self._droppable(name)}
        removed: dict[tuple[str, str], set[int]] = defaultdict(set)
        for name, (block, group) in self._groups.items():
            ratio = keep.get(name, keep.get(block, 1.0))
            indices = self._least_important(group, ratio, block, scores[name]) if 0 < ratio < 1 else []
            if not indices:
                continue
            # Asked again for the chosen channels only: channels of one layer may be tied to each other, which the group of all of them does not show.
            root = group[0].dep
            for item in self._graph.get_pruning_group(root.target.module, root.handler, indices):
                for side in _sides(self._graph, item.dep) if item.dep.target.module in self._names else ():
                    removed[self._names[item.dep.target.module], side].update(item.idxs)
        kept: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for (name, side), gone in sorted(removed.items()):
            rest = tuple(sorted(set(range(width(self._traced.get_submodule(name), side))) - gone))
            if not rest:
                raise ModelError(f"pruning would leave layer {name} without channels; raise its block's keep ratio.")
            kept[name][side] = rest
        return ChannelPlan({**kept, **{layer: {"out": ()} for layer in sorted(dropped)}})

    def feature_channels(self, plan: ChannelPlan) -> tuple[int, ...]:
        """The channels of the unpruned half's output that are left in a half made by `plan`, a plan of this pruner, in order."""
        gone: set[int] = set()
        for _, group in self._groups.values():
            root = group[0].dep
            sides = plan.kept.get(self._names[root.target.module], {})
            if out := sides.get("out"):
                removed = sorted(set(range(len(group[0].idxs))) - set(out))
                members = self._graph.get_pruning_group(root.target.module, root.handler, removed) if removed else ()
                gone.update(index for item in members if item.dep.target.module is self._anchor for index in item.idxs)
        width = self._anchor.in_features if isinstance(self._anchor, nn.Linear) else self._anchor.in_channels
        return tuple(index for index in range(width) if index not in gone)

    def _droppable(self, block: str) -> list[str]:
        """The layers of `block` that shortcuts go past."""
        layers = self._layers_of_block.get(block, frozenset[str]())
        found = [layer for branch in self._branches if layers.issuperset(branch) for layer in branch]
        if not found:
            raise ModelError(f"keep ratio of block {block} is 0, but no shortcut goes past its layers; choose a fraction above 0.")
        return found

    def _least_important(self, group: Any, ratio: float, block: str, scores: Tensor) -> list[int]:
        """Channels of the group's first layer that go, ascending."""
        channels = len(group[0].idxs)
        parts = math.lcm(*(_pattern(item.dep.target.module) for item in group))
        if channels % parts or channels == parts:
            return []
        units = channels // parts
        kept = math.floor(ratio * units + 0.5)
        if kept < 1:
            layer = self._names[group[0].dep.target.module]
            raise ModelError(
                f"keep ratio {ratio} of block {block} would leave layer {layer} ({units} channels) without channels; choose at least {1 / units:.3g}."
            )
        step = self._channel_block // math.gcd(self._channel_block, parts)
        kept = min(units, math.ceil(kept / step) * step)
        gone = torch.argsort(scores.reshape(parts, units).sum(0), stable=True)[: units - kept]
        return sorted(int(unit) + part * units for part in range(parts) for unit in gone)

    @torch.no_grad()
    def _importance(self, head: nn.Module, group: Any, importance: Importance, own: bool) -> Tensor:
        # Torch-Pruning's own magnitude importance passes over depthwise filters and misplaces the inputs of grouped convolutions.
        scores = torch.zeros(len(group[0].idxs), dtype=torch.float64)
        for item in group:
            traced = item.dep.target.module
            sides = _sides(self._graph, item.dep) if traced in self._names else ()
            if not sides or (own and "out" not in sides):
                continue
            layer = head.get_submodule(self._names[traced])
            worth = _worth(layer, sides[0], importance, self._names[traced])
            scores.index_add_(0, torch.tensor(item.root_idxs), worth[item.idxs].double().cpu())
        return scores


def prune_head(
    head: nn.Module,
    example: Tensor,
    keep: Mapping[str, float],
    layers_of_block: Mapping[str, Sequence[str]],
    channel_block: int = 1,
    *,
    cut_channels: bool = False,
) -> tuple[nn.Module, ChannelPlan]:
    """A narrower copy of `head` by l1 norms, and the plan that describes it; arguments as of `Pruner` and `Pruner.plan`.

    Raises:
        ModelError: see `Pruner` and `Pruner.plan`.
    """
    if all(ratio == 1 for ratio in keep.values()) and set(keep) <= set(layers_of_block):
        return copy.deepcopy(head), ChannelPlan()
    pruner = Pruner(head, example, layers_of_block, channel_block, cut_channels=cut_channels)
    plan = pruner.plan(keep, pruner.scores(head))
    pruned = rebuild(head, plan)
    _check_output(pruned, head, example[:1], cut_channels)
    return pruned, plan


def _free_groups(head: nn.Module, example: Tensor, cut_channels: bool) -> tuple[Any, list[Any], nn.Conv2d | nn.Linear]:
    """The dependency graph of `head`, the groups that may be pruned, and the layer added that reads its output; `head` is a copy that may be traced."""

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
            raise ModelError("this device half cannot be pruned: it shuffles channels or attends in windows, which Torch-Pruning cannot follow; keep it whole.")
        # not initialised: no random number may be drawn by a choice of channels
        anchor = skip_init(nn.Conv2d, feature.shape[1], 1, 1) if feature.ndim == 4 else skip_init(nn.Linear, feature.shape[-1], 1)
        try:
            graph = tp.DependencyGraph().build_dependency(Anchored(anchor), example_inputs=[example], verbose=False)
            groups = list(graph.get_all_groups(ignored_layers=[anchor]))
        except Exception as error:  # Torch-Pruning raises whatever an operation unknown to it leads to
            raise ModelError(f"this device half cannot be pruned: Torch-Pruning cannot follow its channels ({error}); keep its blocks whole.") from error

    def free(group: Any) -> bool:
        for item in group:
            layer = item.dep.target.module
            if layer is anchor:
                if not cut_channels:
                    return False
            elif isinstance(layer, CONVOLUTIONS):
                # Torch-Pruning takes any convolution with one filter a group for depthwise, also where filters read several channels each.
                if layer.groups == layer.out_channels > 1 and layer.in_channels != layer.out_channels:
                    return False
                if _pattern(layer) > 1 and list(item.idxs) != list(range(len(group[0].idxs))):
                    return False
            elif not isinstance(layer, (nn.Linear, *NORMS)) and item.dep.target.type not in _PASSED_THROUGH:
                return False
        return True

    return graph, [group for group in groups if free(group)], anchor


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
    return layer.groups if isinstance(layer, CONVOLUTIONS) and not depthwise(layer) else 1


def _sides(graph: Any, dependency: Any) -> tuple[str, ...]:
    """Which sides of the dependency's target it prunes; none where the target holds no channels of its own."""
    layer = dependency.target.module
    if isinstance(layer, NORMS):
        return ("out",)
    if not isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
        return ()
    if depthwise(layer):
        return ("out", "in")
    return ("out",) if graph.is_out_channel_pruning_fn(dependency.handler) else ("in",)


def _worth(layer: nn.Module, side: str, importance: Importance, name: str) -> Tensor:
    """What each channel on this side of a layer is worth, (channels,)."""
    if isinstance(layer, NORMS):
        if not layer.affine:
            return torch.zeros(layer.num_features)
        values = [_scored(layer.weight, importance, name)]
        if importance == "taylor":
            values.append(_scored(layer.bias, importance, name))
        return _norm(torch.stack(values, 1), importance)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    scored = _scored(weight, importance, name)
    if side == "out":
        return _norm(scored.flatten(1), importance)
    parts = _pattern(layer)
    by_input = scored.reshape(parts, weight.shape[0] // parts, weight.shape[1], -1).permute(0, 2, 1, 3)
    return _norm(by_input.flatten(0, 1).flatten(1), importance)


def _scored(weight: Tensor, importance: Importance, name: str) -> Tensor:
    if importance != "taylor":
        return weight.detach()
    if weight.grad is None:
        raise ModelError(f"taylor importance needs a gradient of layer {name}; call backward on a loss before planning, or take l1 or l2.")
    return weight.detach() * weight.grad


def _norm(values: Tensor, importance: Importance) -> Tensor:
    """Over the last axis: the l2 norm, else the l1 norm."""
    return values.norm(dim=-1) if importance == "l2" else values.abs().sum(-1)


@torch.no_grad()
def _check_output(pruned: nn.Module, whole: nn.Module, example: Tensor, cut_channels: bool) -> None:
    """The narrowed copy still runs and gives a feature of the same shape, but for its channels where those may go; no batch norm is moved."""
    try:
        found, expected = (copy.deepcopy(half).eval()(example).shape for half in (pruned, whole))
    except RuntimeError as error:
        raise ModelError(f"this device half cannot be pruned: its layers no longer fit ({str(error).splitlines()[0]}); keep its blocks whole.") from error
    if found != expected and not (cut_channels and (found[0], *found[2:]) == (expected[0], *expected[2:])):
        raise ModelError("this device half cannot be pruned: the shape of the feature it sends would change; keep its blocks whole.")
