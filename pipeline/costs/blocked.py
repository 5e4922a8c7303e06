"""ONNX Runtime's layout of channels in blocks (NCHWc, nchwc_transformer.cc): which kernels take it, and where tensors are reordered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from models.operations import Shape
from pipeline.costs.onnx_graph import FUSED_WITH_CONV, Node

_ALIGNED = 4  # channels that a reorder moves at once
_KEEPING = {"Relu", "Sigmoid", "Tanh", "HardSigmoid", "Gelu", "QuickGelu"}
_FUSED = {"Relu", "Sigmoid", "Tanh", "HardSigmoid"}
_CONVS = ("Conv", "FusedConv")


def to_blocks(nodes: Sequence[Node], block: int) -> list[Node]:
    """`nodes` with their convolutions, and what else can be, in blocks of `block` channels; none of them if that is 0."""
    return _Blocks(nodes, block).rewritten()


class _Blocks:
    def __init__(self, nodes: Sequence[Node], block: int) -> None:
        self.nodes, self.block = list(nodes), block
        self.uses = Counter(source for node in nodes for source in node.inputs)
        self.uses[self.nodes[-1]] += 1
        self.out: list[Node] = []
        self.plain: dict[Node, Node] = {}  # of the given graph -> of the new one
        self.blocked: dict[Node, Node] = {}
        self.reordered: dict[Node, Node] = {}  # for convolutions alone: the rest goes on reading such a tensor as it was

    def rewritten(self) -> list[Node]:
        for node in self.nodes:
            if node.op == "HardSwish":
                self._hard_swish(node)
            elif not (self.block and self._blocks(node)) and not self._sums(node):
                self._keep(node)
        self._plain(self.nodes[-1])
        return self.out

    def _blocks(self, node: Node) -> bool:
        """Whether `node` was put in blocks."""
        if node.op in _CONVS:
            return self._conv(node)
        if node.op in ("MaxPool", "AveragePool", "GlobalAveragePool"):
            return self._pool(node)
        if not node.inputs or node.constant or any(source not in self.blocked for source in node.inputs):
            return False
        if node.op == "Concat":
            if any(source.shape[1] % self.block for source in node.inputs):
                return False
            self._add(node, "Concat", [self.blocked[source] for source in node.inputs])
            return True
        if node.op in ("Add", "Mul") and len(node.inputs) == 2 and node.inputs[0].shape == node.inputs[1].shape:
            if not (node.op == "Add" and self._sum_into_conv(node)):
                self._add(node, node.op, [self.blocked[source] for source in node.inputs])
            return True
        if node.op in _KEEPING:
            if not (node.op in _FUSED and self._fuse(node, node.op)):
                self._add(node, node.op, [self.blocked[node.inputs[0]]])
            return True
        if node.op == "BatchNormalization":
            channels = self._padded(node.shape[1])
            made = self._add(node, "nchwc.Conv", [self.blocked[node.inputs[0]]])
            made.weights, made.kernel, made.strides, made.groups = (channels, 1, 1, 1), (1, 1), (1, 1), channels
            return True
        return False

    def _sums(self, node: Node) -> bool:
        """Whether a convolution without blocks computes `node` as it writes: a sum, or the activation after one (conv_add_act_fusion.cc)."""
        if node.op == "Add" and len(node.inputs) == 2 and node.inputs[0].shape == node.inputs[1].shape:
            for source, other in (node.inputs, node.inputs[::-1]):
                conv = self._plain(source)
                if conv.op == "Conv" and conv.bias and self.uses[source] == 1 and source is not other:
                    conv.op, conv.inputs = "FusedConv", [*conv.inputs, self._plain(other)]
                    self._late(conv)
                    self.plain[node] = conv
                    return True
        if node.op in FUSED_WITH_CONV and self.uses[node.inputs[0]] == 1:
            conv = self._plain(node.inputs[0])
            if conv.op == "FusedConv" and len(conv.inputs) == 2 and not conv.activation:
                conv.activation = node.op
                self.plain[node] = conv
                return True
        return False

    def _conv(self, node: Node) -> bool:
        outputs, inputs = node.weights[:2]
        if len(node.kernel) != 2:
            return False
        block, groups, direct = self.block, node.groups, False
        if groups == 1:
            direct = inputs < block
            if not direct and inputs % _ALIGNED:
                return False
        elif inputs == 1 and outputs == groups:
            if outputs % _ALIGNED:
                return False
            groups = self._padded(outputs)
        elif inputs % block or outputs % groups or (outputs // groups) % block:
            return False
        source = self._plain(node.inputs[0]) if direct else self._in_blocks(node.inputs[0])
        made = self._add(node, "nchwc.Conv", [source])
        read = inputs if direct or node.groups > 1 else self._padded(inputs)
        made.weights, made.groups, made.activation = (self._padded(outputs), read, *node.kernel), groups, node.activation
        return True

    def _pool(self, node: Node) -> bool:
        if node.shape[1] % self.block:
            return False
        self._add(node, f"nchwc.{node.op}", [self._in_blocks(node.inputs[0])])
        return True

    def _sum_into_conv(self, node: Node) -> bool:
        """Lets the convolution that computes a term of the sum `node` add the other one; whether there is such a convolution."""
        for source, other in (node.inputs, node.inputs[::-1]):
            conv = self.blocked[source]
            if conv.op == "nchwc.Conv" and len(conv.inputs) == 1 and not conv.activation and self.uses[source] == 1 and self.blocked[other] is not conv:
                conv.inputs.append(self.blocked[other])
                self._late(conv)
                self.blocked[node] = conv
                return True
        return False

    def _fuse(self, node: Node, activation: str) -> bool:
        """Lets the convolution before `node` compute it; whether it can."""
        source = node.inputs[0]
        conv = self.blocked[source]
        if conv.op != "nchwc.Conv" or conv.activation or self.uses[source] != 1:
            return False
        conv.activation = activation
        self.blocked[node] = conv
        return True

    def _late(self, conv: Node) -> None:
        self.out.remove(conv)
        self.out.append(conv)

    def _hard_swish(self, node: Node) -> None:
        if node.inputs[0] in self.blocked and self._fuse(node, "HardSwish"):
            return
        if node.inputs[0] in self.blocked:
            gate = self._add(node, "HardSigmoid", [self.blocked[node.inputs[0]]])
            self._add(node, "Mul", [self.blocked[node.inputs[0]], gate])
            return
        source = self._plain(node.inputs[0])
        gate = Node("HardSigmoid", [source], node.shape)
        self.plain[node] = Node("Mul", [source, gate], node.shape)
        self.out += [gate, self.plain[node]]

    def _add(self, node: Node, op: str, inputs: list[Node]) -> Node:
        """`node` in blocks, as `op` of `inputs`."""
        made = Node(op, inputs, self._shape(node.shape), node.dtype, (), node.kernel, node.strides)
        self.out.append(made)
        self.blocked[node] = made
        return made

    def _keep(self, node: Node) -> None:
        made = replace(node, inputs=[self._plain(source) for source in node.inputs])
        self.out.append(made)
        self.plain[node] = made

    def _in_blocks(self, node: Node) -> Node:
        if node in self.blocked:
            return self.blocked[node]
        if node not in self.reordered:
            self.reordered[node] = Node("nchwc.ReorderInput", [self._plain(node)], self._shape(node.shape))
            self.out.append(self.reordered[node])
        return self.reordered[node]

    def _plain(self, node: Node) -> Node:
        if node not in self.plain:
            self.plain[node] = Node("nchwc.ReorderOutput", [self.blocked[node]], node.shape)
            self.out.append(self.plain[node])
        return self.plain[node]

    def _padded(self, channels: int) -> int:
        return -(-channels // self.block) * self.block

    def _shape(self, shape: Shape) -> Shape:
        return (shape[0], self._padded(shape[1]), *shape[2:])
