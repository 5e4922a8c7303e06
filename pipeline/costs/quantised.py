"""A half in 8-bit integers as ONNX Runtime runs it: what `pipeline.quantising` marks, turned into integer kernels that hold channels last."""

from __future__ import annotations

from collections.abc import Sequence

from models.operations import Shape
from pipeline.costs.onnx_graph import Node, merge, users

_LAYERS = {"Conv": "QLinearConv", "Gemm": "QGemm", "MatMul": "QLinearMatMul"}
_JOINS = {"Add": "QLinearAdd", "Mul": "QLinearMul", "Concat": "QLinearConcat"}
_POOLS = {"MaxPool": "MaxPool", "AveragePool": "QLinearAveragePool", "GlobalAveragePool": "QLinearGlobalAveragePool"}
_UNARY = {"Sigmoid": "QLinearSigmoid", "LeakyRelu": "QLinearLeakyRelu"}  # in integers where both what they read and what they give is
_MOVED = {"Reshape", "Transpose", "Gather", "Unsqueeze"}  # move integers as well as numbers
_FIRST = _MOVED | {"BatchNormalization", "QLinearAveragePool", "QLinearGlobalAveragePool", "Conv", "ConvTranspose", "GatherND"}  # read channels first


def to_integers(nodes: list[Node]) -> list[Node]:
    """`nodes`, batch norms folded, as `pipeline.quantising.quantise` and then the runtime make them: all layers but the last in integers."""
    nodes = _open_hard_swish(nodes)
    last = max((place for place, node in enumerate(nodes) if node.op in _LAYERS), default=0)
    read_by = users(nodes)
    # zero is the least integer after them, so that rounding already cuts what they would
    cut = {node for node in nodes[:last] if node.op in ("Relu", "Clip") and len(read_by[node.inputs[0]]) == 1}
    layer = nodes[last]
    nodes = merge(nodes, lambda node: node in cut)
    return _Integers(nodes, layer).rewritten()


def _open_hard_swish(nodes: list[Node]) -> list[Node]:
    """HardSwish as x * hardsigmoid(x), which the basic optimisations before quantising make of it."""
    opened = []
    for node in nodes:
        if node.op == "HardSwish":
            gate = Node("HardSigmoid", list(node.inputs), node.shape)
            opened.append(gate)
            node.op, node.inputs = "Mul", [node.inputs[0], gate]
        opened.append(node)
    return opened


class _Integers:
    def __init__(self, nodes: Sequence[Node], last: Node) -> None:
        self.nodes = list(nodes)
        self.kernels: dict[Node, str] = {}  # of the nodes that compute in integers
        self.integer: set[Node] = set()  # whose results are known as integers
        for node in self.nodes:
            kernel = _LAYERS.get(node.op) if node is not last else None
            kernel = kernel or (_JOINS.get(node.op) if not node.constant else None) or (_POOLS.get(node.op) if node.op != "MaxPool" else None)
            if kernel:
                self.kernels[node] = kernel
                self.integer |= {node, *node.inputs}
        for node in self.nodes:
            if node.op == "MaxPool" and node.inputs[0] in self.integer:
                self.integer.add(node)
                self.kernels[node] = "MaxPool"
            if node.op in _UNARY and {node, node.inputs[0]} <= self.integer:
                self.kernels[node] = _UNARY[node.op]
            if node.op in _MOVED and node.inputs[0] in self.integer:
                self.integer.add(node)
                self.kernels[node] = node.op
        self.out: list[Node] = []
        self.made: dict[Node, Node] = {}
        self.last_axis: set[Node] = set()  # of the new graph: channels last
        self.once: dict[tuple[Node, str], Node] = {}

    def rewritten(self) -> list[Node]:
        for node in reversed(self.nodes):
            # a mover whose result is wanted in integers moves them: rounding goes ahead of it
            if node.op in _MOVED and node in self.integer and node not in self.kernels:
                self.kernels[node] = node.op
                self.integer.add(node.inputs[0])
        for node in self.nodes:
            self._rewrite(node)
        output = self.nodes[-1]
        self._float(self._laid_out(self.made[output], False)) if output in self.integer else self._laid_out(self.made[output], False)
        return self.out

    def _rewrite(self, node: Node) -> None:
        kernel = self.kernels.get(node)
        sources = [self.made[source] for source in node.inputs]
        op = kernel or node.op
        image = len(node.shape) == 4 and all(len(source.shape) == 4 for source in sources)
        last = image and (op == "QLinearConv" or (op not in _FIRST and any(source in self.last_axis for source in sources)))
        if op == "MaxPool" and kernel and last:
            op = "NhwcMaxPool"
        # a transpose takes what comes in any layout: two in a row become one
        read = sources if op == "Transpose" else [self._laid_out(source, last) for source in sources]
        if not kernel:
            read = [self._float(source) if source.dtype == "uint8" and sources else source for source in read]
        made = self._emit(
            Node(op, read, _turned(node.shape, last), "uint8" if kernel else node.dtype, node.weights, node.kernel, node.strides, node.groups), last
        )
        if node in self.integer and not kernel:
            made = self._emit(Node("QuantizeLinear", [made], made.shape, "uint8"), last)
        self.made[node] = made

    def _emit(self, node: Node, last: bool) -> Node:
        self.out.append(node)
        if last:
            self.last_axis.add(node)
        return node

    def _laid_out(self, node: Node, last: bool) -> Node:
        """`node` with channels last or first, by a transpose if need be."""
        if len(node.shape) != 4 or (node in self.last_axis) == last:
            return node
        if (node, "Transpose") not in self.once:
            turned = _turned(node.shape, True) if last else _back(node.shape)
            self.once[node, "Transpose"] = self._emit(Node("Transpose", [node], turned, node.dtype), last)
        return self.once[node, "Transpose"]

    def _float(self, node: Node) -> Node:
        if (node, "DequantizeLinear") not in self.once:
            self.once[node, "DequantizeLinear"] = self._emit(Node("DequantizeLinear", [node], node.shape), node in self.last_axis)
        return self.once[node, "DequantizeLinear"]


def _turned(shape: Shape, last: bool) -> Shape:
    return (shape[0], *shape[2:], shape[1]) if last else shape


def _back(shape: Shape) -> Shape:
    return (shape[0], shape[-1], *shape[1:-1])
