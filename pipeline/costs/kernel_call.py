"""A kernel as ONNX Runtime calls it: the unit that a device's time is measured and predicted in (METHODS 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class KernelCall:
    """One kernel of an optimised graph on one image; equal calls take equal times.

    `op` is the node's type, `nchwc.Conv` that of domain com.microsoft.nchwc. `inputs` are the shapes of the tensors it reads but constants, `output` that of
    what it writes, all as the runtime lays them out: padded to whole blocks in nchwc, channels last on most int8 kernels. `weights` is the shape of the layer's
    weights; kernel, strides and groups belong to convolutions and pools, `activation` to what was fused with one; `dtype` is the first input's.
    """

    op: str
    inputs: tuple[Shape, ...]
    output: Shape
    weights: Shape = ()
    kernel: Shape = ()
    strides: Shape = ()
    groups: int = 1
    activation: str = ""
    dtype: str = "float"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; what is as by default is left out."""
        written = {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) != field.default}
        return {name: _lists(value) for name, value in written.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> KernelCall:
        return cls(**{name: _tuples(value) for name, value in fields.items()})


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
