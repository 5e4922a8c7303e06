"""The operations of a pruned half, without pruning it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from models.channel_plan import ChannelPlan
from models.operations import Operation, Shape, operations
from pipeline.errors import ModelError

_LAYERS = ("conv", "conv_transpose", "linear", "batch_norm")


class PrunedOperations:
    """What `operations(rebuild(head, plan), example)` gives for any plan of `head`, in a millisecond or two: the unpruned half runs once.

    Args:
        head: the unpruned half, as `models.cutting.split` gives it, untouched.
        example: one input of it.
    """

    def __init__(self, head: nn.Module, example: Tensor) -> None:
        self.whole = operations(head, example)
        self._layers = {operation.layer for operation in self.whole}
        self._branches = _branches(self.whole)

    def of(self, plan: ChannelPlan) -> tuple[Operation, ...]:
        """The operations left by `plan`, in the order they run.

        Raises:
            ModelError: the plan is another network's, or drops what no shortcut goes past.
        """
        unknown = set(plan.kept) - self._layers
        if unknown:
            raise ModelError(f"channel plan names layer {min(unknown)}, which this network does not have; use the backbone and cut it was made for.")
        instead = self._shortcuts(plan)
        needed = self._needed(instead)
        place, shapes, left = {-1: -1}, dict[int, Shape](), list[Operation]()
        for index, operation in enumerate(self.whole):
            if index not in needed:
                continue
            read = [_resolved(source, instead) for source in operation.sources]
            inputs = tuple(shapes.get(source, before) for source, before in zip(read, operation.inputs, strict=True))
            sources = tuple(place[source] for source in read)
            if sources != operation.sources or inputs != operation.inputs or operation.layer in plan.kept:
                operation = _narrowed(operation, sources, inputs, plan.kept.get(operation.layer, {}))
            place[index], shapes[index] = len(left), operation.output
            left.append(operation)
        return tuple(left)

    def _shortcuts(self, plan: ChannelPlan) -> dict[int, int]:
        """Each sum that is gone, and the operation that it becomes."""
        left, instead = set(plan.dropped), dict[int, int]()
        for index, shortcut, layers in self._branches:
            if layers <= plan.dropped:
                instead[index] = shortcut
                left -= layers
        if left:
            raise ModelError(f"channel plan drops layer {min(left)}, which no shortcut of this network goes past; use the backbone it was made for.")
        return instead

    def _needed(self, instead: Mapping[int, int]) -> set[int]:
        needed, waiting = set[int](), [_resolved(len(self.whole) - 1, instead)]
        while waiting:
            index = waiting.pop()
            if index >= 0 and index not in needed:
                needed.add(index)
                waiting += [_resolved(source, instead) for source in self.whole[index].sources]
        return needed


def _resolved(index: int, instead: Mapping[int, int]) -> int:
    while index in instead:
        index = instead[index]
    return index


def _branches(whole: Sequence[Operation]) -> list[tuple[int, int, frozenset[str]]]:
    """(sum, its shortcut, the layers that the shortcut goes past), as `models.branches` finds them."""
    above: list[set[int]] = []
    found = []
    for index, operation in enumerate(whole):
        above.append(set().union(*({source} | (above[source] if source >= 0 else set()) for source in operation.sources)))
        if operation.kind != "add" or len(operation.sources) != 2:
            continue
        for shortcut, branch in (operation.sources, operation.sources[::-1]):
            if branch >= 0 and shortcut in above[branch]:
                past = ({branch} | above[branch]) - (above[shortcut] if shortcut >= 0 else set()) - {shortcut}
                layers = {whole[i].layer for i in past if whole[i].kind in _LAYERS}
                elsewhere = {other.layer for i, other in enumerate(whole) if i not in past and other.kind in _LAYERS}
                if layers and not layers & elsewhere:
                    found.append((index, shortcut, frozenset(layers)))
    return found


def _narrowed(operation: Operation, sources: tuple[int, ...], inputs: tuple[Shape, ...], kept: Mapping[str, Sequence[int]]) -> Operation:
    """`operation` on narrower inputs, with the channels `kept` of its layer."""
    first, before = inputs[0], operation.inputs[0]
    if operation.kind == "conv":
        depthwise = operation.groups == operation.weight[0] > 1 and operation.weight[1] == 1
        outputs = first[1] if depthwise else len(kept["out"]) if "out" in kept else operation.weight[0]
        groups = first[1] if depthwise else operation.groups
        weight = (outputs, first[1] // groups, *operation.weight[2:])
        return replace(operation, sources=sources, inputs=inputs, groups=groups, weight=weight, output=(first[0], outputs, *operation.output[2:]))
    if operation.kind == "linear":
        outputs = len(kept["out"]) if "out" in kept else operation.weight[1]
        return replace(operation, sources=sources, inputs=inputs, weight=(first[-1], outputs), output=(*operation.output[:-1], outputs))
    if operation.kind == "batch_norm":
        return replace(operation, sources=sources, inputs=inputs, weight=(first[1],), output=first)
    if inputs == operation.inputs:
        return replace(operation, sources=sources)
    output = list(operation.output)
    if operation.kind == "concat":
        axis = int(operation.values[0]) if operation.values else 0
        output[axis] = sum(shape[axis] for shape in inputs)
    elif operation.kind == "reshape":
        output[1] = output[1] * math.prod(first) // math.prod(before)
        if math.prod(output) != math.prod(first):
            raise _lost(operation)
    elif len(output) > 1 and output[1] == max(shape[1] for shape in operation.inputs if len(shape) > 1):
        output[1] = max(shape[1] for shape in inputs if len(shape) > 1)
    else:
        raise _lost(operation)
    return replace(operation, sources=sources, inputs=inputs, output=tuple(output))


def _lost(operation: Operation) -> ModelError:
    where = f" in {operation.layer}" if operation.layer else ""
    return ModelError(f"the latency of this pruned half cannot be foreseen: {operation.kind}{where} rearranges channels; keep its blocks whole.")
