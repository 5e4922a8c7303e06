"""What ONNX Runtime says about its own run: which kernels it called, and how long each took, from the optimised model and the profile it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from pipeline.costs.kernel_call import KernelCall, Shape
from pipeline.costs.latency_model import KernelTime
from pipeline.errors import ProfileError

_TIMED = "_kernel_time"
# which input is the layer's weights
_WEIGHTS = dict.fromkeys(("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "BatchNormalization", "ConvInteger", "MatMulInteger"), 1)
_WEIGHTS |= dict.fromkeys(("QLinearConv", "QGemm", "QLinearMatMul"), 3)
_SHAPED = ("Conv", "FusedConv", "ConvTranspose", "QLinearConv", "MaxPool", "NhwcMaxPool", "AveragePool", "QLinearAveragePool")


def profiled_kernels(optimised: onnx.ModelProto, events: Sequence[Mapping[str, Any]], warmup: int = 0) -> tuple[KernelTime, ...]:
    """Each kernel of `optimised` (SessionOptions.optimized_model_filepath) in the order it ran, and its median over the runs in `events`.

    `events` is the JSON that `InferenceSession.end_profiling` names, of runs of batch one; the first `warmup` runs do not count.

    Raises:
        ProfileError: model and profile are of different sessions.
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_TIMED):
            runs.setdefault(event["name"].removesuffix(_TIMED), []).append(event)
    nodes = {node.name: node for node in optimised.graph.node if node.name}
    nameless = [node for node in optimised.graph.node if not node.name]  # what functions of ONNX were opened into
    for name in [name for name in runs if name not in nodes]:
        alike = [node for node in nameless if node.op_type == runs[name][0]["args"]["op_name"]]
        if alike:
            nodes[name] = alike[0]
            nameless.remove(alike[0])
    if nameless or not runs or set(runs) != set(nodes) or len({len(found) for found in runs.values()}) != 1 or len(next(iter(runs.values()))) <= warmup:
        raise ProfileError("the profile of ONNX Runtime does not fit the optimised model; take both from one session that ran often enough.")
    graph_input = optimised.graph.input[0]
    shapes: dict[str, Shape] = {graph_input.name: (1, *(dim.dim_value for dim in graph_input.type.tensor_type.shape.dim[1:]))}
    types = {graph_input.name: _type_name(graph_input.type.tensor_type.elem_type)}
    constants = {item.name: tuple(item.dims) for item in optimised.graph.initializer}
    timed = []
    for name, found in runs.items():
        node = nodes[name]
        for output, described in zip((output for output in node.output if output), found[-1]["args"]["output_type_shape"], strict=False):
            ((types[output], shape),) = described.items()
            shapes[output] = tuple(shape)
        timed.append(KernelTime(_call(node, shapes, types, constants), median(event["dur"] for event in found[warmup:]) / 1e3))
    return tuple(timed)


def _call(node: onnx.NodeProto, shapes: Mapping[str, Shape], types: Mapping[str, str], constants: Mapping[str, Shape]) -> KernelCall:
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    read = [name for name in node.input if name in shapes]
    weights = constants.get(node.input[_WEIGHTS[node.op_type]], ()) if node.op_type in _WEIGHTS else ()
    shaped = node.op_type in _SHAPED
    kernel = tuple(attributes.get("kernel_shape", weights[2:])) if shaped else ()
    activation = attributes.get("activation", b"")
    return KernelCall(
        ("nchwc." if node.domain == "com.microsoft.nchwc" else "") + node.op_type,
        tuple(shapes[name] for name in read) or (shapes[node.output[0]],),  # what reads constants alone works on what it gives
        shapes[node.output[0]],
        weights,
        kernel,
        tuple(attributes.get("strides", [1] * len(kernel))) if shaped else (),
        int(attributes.get("group", 1)),
        activation.decode() if isinstance(activation, bytes) else str(activation),
        types[read[0]] if read else "float",
    )


def _type_name(element: int) -> str:
    return str(helper.tensor_dtype_to_np_dtype(element).name).replace("float32", "float")


def channel_block(optimised: onnx.ModelProto) -> int:
    """The channels a block holds in an optimised `block_probe`: 0 where the runtime keeps plain layouts."""
    constants = {item.name: tuple(item.dims) for item in optimised.graph.initializer}
    widths = [constants[node.input[1]][0] for node in optimised.graph.node if node.op_type == "Conv" and node.domain == "com.microsoft.nchwc"]
    return min(widths, default=0)


def block_probe() -> onnx.ModelProto:
    """A convolution of one filter on an input (1, 3, 4, 4): the runtime pads it to a whole block of filters."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, 4, 4]) for name, channels in (("x", 3), ("y", 1)))
    weights = onnx.numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "weights")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "weights"], ["y"], name="conv")], "probe", [x], [y], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
