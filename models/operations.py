"""A network as the tensor operations that it runs, in their order: what the latency of a half is foreseen from (METHODS 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.tracing import evaluating

Shape = tuple[int, ...]

_CONV, _POOLS = "convolution", {"max_pool2d_with_indices": "max_pool", "avg_pool2d": "avg_pool"}
_SAME = {"detach", "alias", "clone", "dropout", "lift_fresh", "contiguous"}  # nothing is left of them in an exported half
_NAMES = {
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "_adaptive_avg_pool2d": "adaptive_avg_pool",
    "hardtanh": "clamp",
    "addmm": "linear",
    "_to_copy": "cast",
    "view": "reshape",
    "_unsafe_view": "reshape",
    "flatten": "reshape",
    "unsqueeze": "reshape",
    "squeeze": "reshape",
    "permute": "transpose",
    "cat": "concat",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
}


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

    @property
    def macs(self) -> int:
        """Multiply-accumulates, as `FlopCounterMode` counts them (its FLOPs / 2): of convolutions and matrix products."""
        if self.kind == "conv":
            return math.prod(self.output) * math.prod(self.weight[1:])
        if self.kind == "conv_transpose":
            return math.prod(self.inputs[0]) * math.prod(self.weight[1:])
        if self.kind == "linear":
            return math.prod(self.output) * self.weight[0]
        if self.kind in ("mm", "bmm"):
            return math.prod(self.output) * self.inputs[0][-1]
        if self.kind == "attention":
            return 2 * math.prod(self.inputs[0]) * self.inputs[1][-2]
        return 0


def operations(module: nn.Module, example: Tensor) -> tuple[Operation, ...]:
    """The operations of `module` in evaluation mode on one input like the first of `example` (B, ...).

    What follows from parameters alone is left out, and so is what an exported half has nothing left of (dropout, copies).
    """
    image = example[:1].clone()
    recorder = _Recorder(module, image)
    with evaluating(module), recorder:
        module(image)
    return tuple(recorder.found)


def chained(first: Sequence[Operation], second: Sequence[Operation]) -> tuple[Operation, ...]:
    """Both networks as one: `second` reads what `first` gives, the result of its last operation."""
    if not first:
        return tuple(second)
    offset = len(first)
    return *first, *(replace(operation, sources=tuple(source + offset for source in operation.sources)) for operation in second)


def macs(operations: Sequence[Operation]) -> int:
    """Multiply-accumulates of one image."""
    return sum(operation.macs for operation in operations)


class _Recorder(TorchDispatchMode):
    """Notes every aten operation on what follows from `image`."""

    def __init__(self, module: nn.Module, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Operation] = []
        self._kept: list[Any] = [image]  # so that no tensor takes the identity of one that is gone
        self._made: dict[int, int] = {id(image): -1}
        self._open: list[str] = [""]
        self._handles: list[Any] = []
        for name, part in module.named_modules():
            self._handles += [part.register_forward_pre_hook(self._enter(name)), part.register_forward_hook(self._leave)]

    def _enter(self, name: str) -> Any:
        return lambda part, inputs: self._open.append(name)

    def _leave(self, part: nn.Module, inputs: Any, output: Any) -> None:
        self._open.pop()

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(item, Tensor)]
        read = [item for item in tensors if id(item) in self._made]
        given = [item for item in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(item, Tensor)]
        if not read or not given:
            return result
        first = given[0]
        name = func.overloadpacket.__name__
        name = name if name.startswith("__") else name.removesuffix("_")  # in place or not is no matter
        same = name in _SAME or (name == "_to_copy" and first.dtype == read[0].dtype) or (name in ("view", "expand") and first.shape == read[0].shape)
        if not same:
            self.found.append(self._operation(name, args, tensors, read, first))
        self._kept.append(result)
        self._made |= dict.fromkeys(map(id, given), self._made[id(read[0])] if same else len(self.found) - 1)
        return result

    def _operation(self, name: str, args: Any, tensors: list[Tensor], read: list[Tensor], output: Tensor) -> Operation:
        fields: dict[str, Any] = {"kind": _NAMES.get(name, name)}
        if name == _CONV:
            _, weight, bias, stride, padding, dilation, transposed, _, groups = args
            fields = {"kind": "conv_transpose" if transposed else "conv", "weight": tuple(weight.shape), "bias": bias is not None, "groups": groups}
            fields |= {"kernel": tuple(weight.shape[2:]), "stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)}
        elif name in _POOLS:
            given: list[Any] = list(args[1:4])
            kernel, stride, padding = given + [(), (0, 0)][len(given) - 1 :]
            fields = {"kind": _POOLS[name], "kernel": _pair(kernel), "stride": _pair(stride or kernel), "padding": _pair(padding)}
        elif name == "addmm":
            fields |= {"weight": tuple(args[2].shape), "bias": True}
        elif name == "mm" and len(read) == 1:
            fields |= {"kind": "linear", "weight": tuple(args[1].shape)}
        elif fields["kind"] == "batch_norm":
            fields |= {"weight": tuple(args[3].shape)}
        else:
            constants = [item for item in tensors if id(item) not in self._made and item.dim()]
            numbers = [number for arg in args[1:] for number in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(number, (int, float))]
            fields |= {"weight": tuple(constants[0].shape) if constants else (), "values": tuple(numbers)}
            if fields["kind"] in ("reshape", "expand", "slice"):
                fields["values"] = ()  # the shape of what it gives says it
        return Operation(
            layer=self._open[-1],
            sources=tuple(self._made[id(item)] for item in read),
            inputs=tuple(tuple(item.shape) for item in read),
            output=tuple(output.shape),
            dtype=str(output.dtype).removeprefix("torch."),
            **fields,
        )


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])
