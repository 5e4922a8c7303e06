"""Which kernels ONNX Runtime will call for a half, foreseen from its operations: the rewrites of its graph optimisations, in their order (METHODS 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from models.operations import Operation
from pipeline.costs.blocked import to_blocks
from pipeline.costs.kernel_call import KernelCall as KernelCall
from pipeline.costs.onnx_graph import exported, fold_batch_norms, fuse_activations
from pipeline.costs.quantised import to_integers


def kernel_calls(operations: Sequence[Operation], precision: Literal["fp32", "int8"] = "fp32", *, block: int) -> tuple[KernelCall, ...]:
    """The kernels of one run of the half that is exported from `operations`, in the order of the optimised graph.

    `block` is the number of channels that the device's convolutions hold together (NCHWc): 8 with AVX2, 16 with AVX-512, 0 where there is no such
    layout. `pipeline.costs.profiled.channel_block` reads it off an optimised model.
    """
    nodes = fold_batch_norms(exported(operations))
    if precision == "int8":
        nodes = to_integers(nodes)
    nodes = to_blocks(fuse_activations(nodes), block)
    return tuple(node.call() for node in nodes if node.op != "Input")
