"""A device half as it computes in 8-bit integers, emulated in floating point (fake quantisation, arXiv 1712.05877), without making the ONNX half."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from pipeline.errors import ModelError

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_BOUNDS = (nn.ReLU, nn.ReLU6, F.relu, F.relu6, torch.relu, "relu", "relu_")
_POOLS = (nn.AvgPool2d, F.avg_pool2d)
_JOINS = (operator.add, operator.iadd, torch.add, "add", "add_", operator.mul, operator.imul, torch.mul, "mul", torch.cat, torch.concat)
LEVELS = 255
WEIGHT_TOP = 64  # of 7 bits


class Grid(nn.Module):
    """x rounded to 256 evenly spaced values, zero among them, from the least to the largest it saw while it was training."""

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.low, self.high = torch.minimum(self.low, x.min()), torch.maximum(self.high, x.max())
            return x
        scale = self.scale
        return torch.fake_quantize_per_tensor_affine(x, scale, round(-float(self.low) / scale), 0, LEVELS) if scale else x

    @property
    def scale(self) -> float:
        """The distance of two neighbouring values."""
        return float((self.high - self.low) / LEVELS)


@torch.no_grad()
def integer_half(half: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """`half`, images (B, 3, S, S) -> u before it is rounded to symbols, as ONNX Runtime's static quantisation of its exported twin computes it.

    Weights are rounded per channel, symmetric, and biases to the grid of their sums; what quantised layers, sums, products and concatenations read and
    give, per tensor, by what the `batches` of images show; batch norms are folded into the layer before them; the last layer stays in floating point
    (pipeline/quantising.py). Sums of products are not exact integers here: a value at the middle between two levels may go either way.

    Raises:
        ModelError: the half cannot be traced.
    """
    try:
        traced = fx.symbolic_trace(copy.deepcopy(half).eval())
    except Exception as error:  # the user's network may do anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the device half cannot be followed to judge it in int8 ({reason}); leave int8 out of the search.") from error
    _fold_norms(traced)
    layers = [node for node in traced.graph.nodes if isinstance(_called(traced, node), _LAYERS)]
    grids = _insert_grids(traced, _rounded(traced, layers))
    for inserted in grids:
        inserted.train()
    for batch in batches:
        traced(batch)
    for node in layers[:-1]:
        layer = _called(traced, node)
        assert isinstance(layer, _LAYERS)
        scale = (layer.weight.abs().flatten(1).amax(1) / WEIGHT_TOP).clamp_min(torch.finfo(torch.float32).tiny)
        zero = torch.zeros(len(scale), dtype=torch.int32)
        layer.weight.copy_(torch.fake_quantize_per_channel_affine(layer.weight, scale, zero, 0, -WEIGHT_TOP, WEIGHT_TOP))
        grid = _called(traced, node.all_input_nodes[0])
        if layer.bias is not None and isinstance(grid, Grid) and grid.scale:
            layer.bias.copy_(torch.round(layer.bias / (scale * grid.scale)) * scale * grid.scale)
    return traced.eval()


def _called(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is(traced: fx.GraphModule, node: fx.Node, kinds: tuple[object, ...]) -> bool:
    """Whether `node` calls one of `kinds`: classes of modules, functions, names of methods."""
    module = _called(traced, node)
    return type(module) in kinds if module is not None else node.op in ("call_function", "call_method") and node.target in kinds


def _fold_norms(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        norm = _called(traced, node)
        before = node.args[0] if isinstance(norm, _NORMS) else None
        layer = _called(traced, before) if isinstance(before, fx.Node) and len(before.users) == 1 else None
        if before is None or not isinstance(layer, _LAYERS):
            continue
        assert isinstance(norm, _NORMS)
        parent, _, name = str(before.target).rpartition(".")
        fused = fuse_linear_bn_eval(layer, norm) if isinstance(layer, nn.Linear) else fuse_conv_bn_eval(layer, norm)
        setattr(traced.get_submodule(parent), name, fused)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.recompile()


def _rounded(traced: fx.GraphModule, layers: list[fx.Node]) -> list[fx.Node]:
    """The nodes whose values are rounded, in order."""
    order = list(traced.graph.nodes)
    found: dict[fx.Node, None] = {}
    for node in order[: order.index(layers[-1])] if layers else ():
        sources = node.all_input_nodes
        if node in layers[:-1] or (_is(traced, node, _JOINS) and len(sources) > 1):
            found.update(dict.fromkeys([*sources, node]))
        elif (_is(traced, node, _BOUNDS) or _is(traced, node, _POOLS)) and sources[0] in found:
            # what is only read to be bounded is rounded after that, when the range is smaller
            if _is(traced, node, _BOUNDS) and len(sources[0].users) == 1:
                del found[sources[0]]
            found[node] = None
    return [node for node in order if node in found]


def _insert_grids(traced: fx.GraphModule, nodes: list[fx.Node]) -> list[Grid]:
    grids = []
    for number, node in enumerate(nodes):
        name, grid = f"grid{number}", Grid()
        traced.add_module(name, grid)
        with traced.graph.inserting_after(node):
            after = traced.graph.call_module(name, (node,))
        for user in [user for user in node.users if user is not after]:
            user.replace_input_with(node, after)
        grids.append(grid)
    traced.graph.lint()
    traced.recompile()
    return grids
