"""How long ONNX Runtime takes for a list of kernels on a measured device (METHODS 4; stacked as in ANNETTE, arXiv 2105.03176)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.costs.kernel_call import KernelCall


@dataclass(frozen=True)
class KernelTime:
    """The median of one kernel, by ONNX Runtime's own profile."""

    call: KernelCall
    ms: float


@dataclass(frozen=True)
class RunTime:
    """A whole `session.run` of these kernels without profiling: median and quartiles."""

    calls: tuple[KernelCall, ...]
    median_ms: float
    low_ms: float
    high_ms: float


class LatencyModel:
    """Predicted time of a run, fitted to `kernels` and `runs` measured on one device (deterministic).

    Raises:
        ProfileError: nothing was measured.
    """

    def __init__(self, kernels: Sequence[KernelTime], runs: Sequence[RunTime]) -> None:
        raise NotImplementedError

    def run_ms(self, calls: Sequence[KernelCall]) -> float:
        """Predicted median of one `session.run` that calls these kernels."""
        raise NotImplementedError
