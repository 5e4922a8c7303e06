"""The graph that a half is exported as, and what ONNX Runtime fuses in it whatever the layout: the first steps of `pipeline.costs.fused`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from models.operations import Operation, Shape
from pipeline.costs.kernel_call import KernelCall

FUSED_WITH_CONV = {"Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "Clip"}
FUSED_WITH_GEMM = {"Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "Elu"}
LAYERS = {"Conv", "ConvTranspose", "Gemm"}
_ONNX = {
    "conv": "Conv",
    "conv_transpose": "ConvTranspose",
    "linear": "Gemm",
    "batch_norm": "BatchNormalization",
    "clamp": "Clip",
    "max_pool": "MaxPool",
    "avg_pool": "AveragePool",
    "mean": "ReduceMean",
    "hardswish": "HardSwish",
    "hardsigmoid": "HardSigmoid",
    "leaky_relu": "LeakyRelu",
    "mm": "MatMul",
    "bmm": "MatMul",
    "select": "Gather",
    "index": "Gather",
    "native_layer_norm": "LayerNormalization",
}
_TYPES = {"float32": "float"}


@dataclass(eq=False)
class Node:
    """A node of an ONNX graph; `shape` and `dtype` are those of what it gives, laid out as it gives it. `Input` is the graph's input."""

    op: str
    inputs: list[Node]
    shape: Shape
    dtype: str = "float"
    weights: Shape = ()
    kernel: Shape = ()
    strides: Shape = ()
    groups: int = 1
    activation: str = ""
    layer: str = field(default="", repr=False)
    constant: bool = False  # whether it also reads a constant
    bias: bool = False

    def call(self) -> KernelCall:
        inputs = tuple(node.shape for node in self.inputs)
        return KernelCall(self.op, inputs, self.shape, self.weights, self.kernel, self.strides, self.groups, self.activation, self.inputs[0].dtype)


def exported(operations: Sequence[Operation]) -> list[Node]:
    """The exporter's graph of `operations`, in their order, the input first; its last node gives the output."""
    image = operations[0].inputs[0] if operations else ()
    given = {-1: Node("Input", [], image, dtype=_input_type(operations))}
    nodes = [given[-1]]
    for place, operation in enumerate(operations):
        made = _lower(operation, [given[source] for source in operation.sources])
        nodes += made
        given[place] = made[-1] if made else given[operation.sources[0]]
    return nodes


def users(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """Who reads each node."""
    found: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in nodes:
        for source in node.inputs:
            found[source].append(node)
    return found


def fold_batch_norms(nodes: list[Node]) -> list[Node]:
    """Without the batch norms of layers that nothing else reads: they are in the weights, and in a bias, which is not zero once they were trained."""
    read_by = users(nodes)

    def folds(node: Node) -> bool:
        if node.op != "BatchNormalization" or node.inputs[0].op not in LAYERS or len(read_by[node.inputs[0]]) != 1:
            return False
        node.inputs[0].bias = True
        return True

    return merge(nodes, folds)


def fuse_activations(nodes: list[Node]) -> list[Node]:
    """SiLU as one node, and without the activations that follow a convolution or linear layer and are computed as it writes."""
    nodes = _join_silu(nodes)
    read_by = users(nodes)

    def fuses(node: Node) -> bool:
        before = node.inputs[0] if node.inputs else node
        known = FUSED_WITH_CONV if before.op == "Conv" else FUSED_WITH_GEMM if before.op == "Gemm" else ()
        if node.op not in known or len(read_by[before]) != 1 or before.activation:
            return False
        before.op, before.activation = f"Fused{before.op}", node.op
        return True

    return merge(nodes, fuses)


def _join_silu(nodes: list[Node]) -> list[Node]:
    """With a QuickGelu for each x * sigmoid(x) whose sigmoid nothing else reads."""
    read_by = users(nodes)
    gone: set[Node] = set()
    for node in nodes:
        gates = [gate for gate in node.inputs if gate.op == "Sigmoid" and gate.inputs[0] in node.inputs and len(read_by[gate]) == 1]
        if node.op == "Mul" and gates:
            gone.add(gates[0])
            node.op, node.inputs = "QuickGelu", gates[0].inputs
    return [node for node in nodes if node not in gone]


def merge(nodes: list[Node], gone: Callable[[Node], bool]) -> list[Node]:
    """Without the nodes that are `gone`, asked in order: what read them reads their first input."""
    instead: dict[Node, Node] = {}
    kept = []
    for node in nodes:
        node.inputs = [instead.get(source, source) for source in node.inputs]
        if gone(node):
            instead[node] = node.inputs[0]
        else:
            kept.append(node)
    return kept


def _input_type(operations: Sequence[Operation]) -> str:
    return "uint8" if operations and operations[0].kind == "cast" and operations[0].sources == (-1,) else "float"


def _lower(operation: Operation, inputs: list[Node]) -> list[Node]:
    """What the exporter makes of `operation`; nothing where it leaves no node."""
    kind, shape, dtype = operation.kind, operation.output, _TYPES.get(operation.dtype, operation.dtype)
    if kind == "concat" and len(inputs) == 1:
        return []
    if kind == "silu":
        return _silu(operation, inputs)
    if kind == "attention" and len(inputs) >= 3:
        return _attention(operation, inputs)
    if kind == "adaptive_avg_pool":
        return _adaptive_pool(operation, inputs)
    if kind == "bucketize":
        return _bucketize(operation, inputs)
    if kind == "index" and len(operation.weight) == 1:
        places = Node("Unsqueeze", inputs, (*shape, 1), "int64")  # in a codebook
        return [places, Node("GatherND", [places], shape)]
    name = _ONNX.get(kind, "".join(word.capitalize() for word in kind.split("_")))
    weights = operation.weight[::-1] if kind == "linear" else operation.weight if kind in ("conv", "conv_transpose", "batch_norm") else ()
    layered = kind in ("conv", "conv_transpose", "max_pool", "avg_pool")
    kernel, strides = (operation.kernel, operation.stride) if layered else ((), ())
    constant = bool(operation.values or operation.weight) and kind in ("add", "mul", "div", "sub", "rsub")
    return [Node(name, inputs, shape, dtype, weights, kernel, strides, operation.groups, "", operation.layer, constant, operation.bias)]


def _silu(operation: Operation, inputs: list[Node]) -> list[Node]:
    gate = Node("Sigmoid", inputs, operation.output, layer=operation.layer)
    return [gate, Node("Mul", [*inputs, gate], operation.output, layer=operation.layer)]


def _attention(operation: Operation, inputs: list[Node]) -> list[Node]:
    query, key, value = inputs[:3]
    scores = Node("MatMul", [query, key], (*query.shape[:-1], key.shape[-2]), layer=operation.layer)
    shares = Node("Softmax", [scores], scores.shape, layer=operation.layer)
    return [scores, shares, Node("MatMul", [shares, value], operation.output, layer=operation.layer)]


def _adaptive_pool(operation: Operation, inputs: list[Node]) -> list[Node]:
    (batch, channels, height, width), (out_height, out_width) = operation.inputs[0], operation.output[2:]
    if height % out_height == 0 and width % out_width == 0:
        step = (height // out_height, width // out_width)
        return [Node("AveragePool", inputs, operation.output, kernel=step, strides=step)]
    # general form: the pixels of every window are gathered, then averaged
    rows, columns = -(-height // out_height), -(-width // out_width)
    turned = Node("Transpose", inputs, (height, width, batch, channels))
    windows = Node("GatherND", [turned], (out_height, rows, out_width, columns, batch, channels))
    back = Node("Transpose", [windows], (batch, channels, out_height, rows, out_width, columns))
    return [turned, windows, back, Node("ReduceMean", [back], operation.output)]


def _bucketize(operation: Operation, inputs: list[Node]) -> list[Node]:
    # exported as a comparison with every border between two values (models.codec.NearestValue)
    borders = operation.weight[0]
    column = Node("Unsqueeze", inputs, (*operation.output, 1))
    above = Node("Greater", [column], (*operation.output, borders), "bool")
    number = Node("Cast", [above], above.shape, "int64")
    return [column, above, number, Node("ReduceSum", [number], operation.output, "int64")]
