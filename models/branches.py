"""Residual branches of a traced network: the layers that a shortcut goes past, without which the rest still runs (METHODS 2)."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator

import torch
from torch import fx, nn

from pipeline.errors import ModelError

_SUMS = (operator.add, operator.iadd, torch.add)


def residual_branches(module: nn.Module) -> list[tuple[str, ...]]:
    """The layers with parameters on each residual branch of a traced `module`, in order: those whose output is added to what they were computed from."""
    if not isinstance(module, fx.GraphModule):
        return []
    return [tuple(_layers(module, nodes)) for _, _, nodes in _branches(module) if _layers(module, nodes)]


def drop_branches(module: nn.Module, layers: Collection[str]) -> None:
    """Take the residual branches that `layers` make up out of a traced `module`, in place: their sums become what the shortcut brings.

    Raises:
        ModelError: a layer that is on no branch made up by `layers`.
    """
    left, gone = set(layers), set(layers)
    if isinstance(module, fx.GraphModule) and layers:
        for node, shortcut, nodes in _branches(module):
            own = _layers(module, nodes)
            if own and gone.issuperset(own):
                node.replace_all_uses_with(shortcut)
                left.difference_update(own)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
    if left:
        raise ModelError(f"channel plan drops layer {min(left)}, which no shortcut of this network goes past; rebuild from the backbone it was made for.")


def _branches(module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node, set[fx.Node]]]:
    """(sum, shortcut, what else the sum is computed from): each sum of a value and something computed from it alone."""
    above: dict[fx.Node, set[fx.Node]] = {}
    for node in module.graph.nodes:
        above[node] = set().union(*({source} | above[source] for source in node.all_input_nodes))
    for node in module.graph.nodes:
        called = node.target in _SUMS if node.op == "call_function" else node.op == "call_method" and node.target in ("add", "add_")
        terms = [term for term in node.args if isinstance(term, fx.Node)]
        if not called or len(terms) != 2:
            continue
        for shortcut, branch in (terms, terms[::-1]):
            if shortcut in above[branch]:
                yield node, shortcut, ({branch} | above[branch]) - above[shortcut] - {shortcut}


def _layers(module: fx.GraphModule, nodes: set[fx.Node]) -> list[str]:
    """Those with parameters that `nodes` call; none if one of them is called elsewhere too."""
    calls = [node for node in module.graph.nodes if node.op == "call_module" and next(module.get_submodule(str(node.target)).parameters(), None) is not None]
    names = [str(node.target) for node in calls if node in nodes]
    return names if not set(names) & {str(node.target) for node in calls if node not in nodes} else []
