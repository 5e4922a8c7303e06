"""A network as the tensor operations that it runs, in their order: what the latency of a half is foreseen from (METHODS 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """One tensor operation of a network on one image.

    `sources` are the operations whose results it reads, by their place in the network, -1 being the network's input; `inputs` their shapes and `output` its
    own, batch of one included. `layer` is the module path that it runs in, "" the network itself. `weight` and `bias` belong to layers that have them;
    `kernel` to pools and convolutions, the other numbers to these alone. `values` are what else it takes: bounds, axes, a scalar it adds or divides by.
    """

    kind: str
    layer: str
    sources: tuple[int, ...]
    inputs: tuple[Shape, ...]
    output: Shape
    dtype: str = "float32"
    weight: Shape = ()
    bias: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    values: tuple[float, ...] = ()


def operations(module: nn.Module, example: Tensor) -> tuple[Operation, ...]:
    """The operations of `module` in evaluation mode on one input like `example` (B, ...), which alone computes; what follows from parameters is left out."""
    raise NotImplementedError


def chained(first: Sequence[Operation], second: Sequence[Operation]) -> tuple[Operation, ...]:
    """Both networks as one: `second` reads what `first` gives (its last operation)."""
    raise NotImplementedError


def macs(operations: Sequence[Operation]) -> int:
    """Multiply-accumulates, as `FlopCounterMode` counts them (its FLOPs / 2)."""
    raise NotImplementedError
