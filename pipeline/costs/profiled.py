"""What ONNX Runtime says about its own run: which kernels it called, and how long each took, from the optimised model and the profile it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from pipeline.costs.kernel_call import KernelCall
from pipeline.costs.latency_model import KernelTime


def profiled_kernels(optimised: onnx.ModelProto, events: Sequence[Mapping[str, Any]], warmup: int = 0) -> tuple[KernelTime, ...]:
    """Each kernel of `optimised` (SessionOptions.optimized_model_filepath) in the order it ran, and its median over the runs in `events`.

    `events` is the JSON that `InferenceSession.end_profiling` names, of runs of batch one; the first `warmup` runs do not count.

    Raises:
        ProfileError: model and profile are of different sessions.
    """
    raise NotImplementedError


def channel_block(optimised: onnx.ModelProto) -> int:
    """The channels a block holds in an optimised `block_probe`: 0 where the runtime keeps plain layouts."""
    raise NotImplementedError


def block_probe() -> onnx.ModelProto:
    """A model of one input (1, 8, 4, 4) whose optimised form shows the device's channel block."""
    raise NotImplementedError
