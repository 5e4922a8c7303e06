"""Which kernels ONNX Runtime will call for a half, foreseen from its operations: the rewrites of its graph optimisations, in their order (METHODS 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from models.operations import Operation
from pipeline.costs.kernel_call import KernelCall as KernelCall


def kernel_calls(operations: Sequence[Operation], precision: Literal["fp32", "int8"] = "fp32", *, block: int = 8) -> tuple[KernelCall, ...]:
    """The kernels of one run of the half that is exported from `operations`, in the order of the optimised graph.

    `block` is the number of channels that the device's convolutions hold together (NCHWc): 8 with AVX2, 16 with AVX-512, 0 where there is no such
    layout. `pipeline.costs.profiled.channel_block` reads it off an optimised model.
    """
    raise NotImplementedError
