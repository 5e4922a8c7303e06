"""A backbone as a `torch.fx` graph that holds in train and eval mode, at any batch size, and never writes into a tensor it was given."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ModelError

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # torchvision's own leaves (StochasticDepth) read self.training, which tracing through them would freeze
        childless = next(m.children(), None) is None
        return super().is_leaf_module(m, module_qualified_name) or (childless and type(m).__module__.startswith("torchvision.ops"))


class _Survey(fx.Interpreter):
    """Runs a graph and notes in each node's meta its `shape` (tensors only) and the `macs` counted so far, both without the batch."""

    def __init__(self, module: fx.GraphModule, batch: int) -> None:
        super().__init__(module)
        self._counter = FlopCounterMode(display=False)
        self._batch = batch

    def run(self, *args: Any) -> Any:  # type: ignore[override]  # the keyword arguments of fx are not used
        with self._counter:
            return super().run(*args)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["macs"] = self._counter.get_total_flops() // 2 // self._batch
        n.meta["shape"] = tuple(value.shape[1:]) if isinstance(value, Tensor) and value.dim() and len(value) == self._batch else None
        return value


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients and no fused attention (whose MACs PyTorch does not count); every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in modes:
            module.training = training


def _name(model: nn.Module) -> str:
    return type(model).__name__


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "").strip().rstrip(".") or type(error).__name__


def _forget(model: nn.Module, own: set[str]) -> None:
    """Drop what tracing stored on the model (tensors that its forward creates) beside its `own` attributes."""
    for name in set(vars(model)) - own:
        delattr(model, name)


def _graph(model: nn.Module) -> fx.Graph:
    """The graph of `model`, good in both modes: where a functional layer was handed self.training, the graph reads it when it runs."""
    modes = [(module, module.training) for module in model.modules()]
    own = set(vars(model))
    try:
        other = _Tracer().trace(model.train())
        _forget(model, own)  # or the constants of the second graph would get other names
        graph = _Tracer().trace(model.eval())
    except Exception as error:  # a forward run on proxies may raise anything
        rule = "its forward must not branch on, loop over or convert tensor values"
        raise ModelError(f"{_name(model)} cannot be traced ({_first_line(error)}); {rule}.") from error
    finally:
        for module, training in modes:
            module.training = training
    if [(node.op, node.target) for node in graph.nodes] != [(node.op, node.target) for node in other.nodes]:
        raise ModelError(f"{_name(model)} computes another graph in training than in evaluation; build it without auxiliary outputs.")
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise ModelError(f"{_name(model)} takes more than one input; its forward must take one image batch and nothing else.")

    def merge(at_eval: Any, at_train: Any, before: fx.Node) -> Any:
        if isinstance(at_eval, (tuple, list)):
            return type(at_eval)(merge(a, b, before) for a, b in zip(at_eval, at_train, strict=True))
        if isinstance(at_eval, dict):
            return {key: merge(value, at_train[key], before) for key, value in at_eval.items()}
        if at_eval is False and at_train is True:
            with graph.inserting_before(before):
                return graph.get_attr("training")
        if str(at_eval) != str(at_train):
            raise ModelError(f"{_name(model)} computes {before.name} from {at_eval} in evaluation and {at_train} in training; give both modes one graph.")
        return at_eval

    for node, twin in zip(list(graph.nodes), list(other.nodes), strict=True):
        node.args, node.kwargs = merge(tuple(node.args), tuple(twin.args), node), merge(dict(node.kwargs), dict(twin.kwargs), node)
    return graph


def _make_pure(module: fx.GraphModule, node: fx.Node) -> bool:
    """Turn an in-place node into its pure twin; whether it was one."""
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place_name = name.endswith("_") and not name.endswith("__")
    if node.op == "call_module":
        layer = module.get_submodule(name)
        if getattr(layer, "inplace", False) is not True:
            return False
        layer = copy.copy(layer)  # shares all but the flag: the caller's module keeps its own
        layer.inplace = False  # type: ignore[assignment]
        module.set_submodule(name, layer)
    elif node.op == "call_method" and in_place_name:
        if not hasattr(Tensor, name[:-1]):
            raise ModelError(f"the backbone cannot be traced: it overwrites a tensor with {name}, which has no pure twin; rewrite that line.")
        node.target = name[:-1]
    elif node.op == "call_function" and in_place_name and hasattr(torch, name[:-1]):
        node.target = getattr(torch, name[:-1])
    elif node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
        node.target = getattr(operator, name[1:])
    elif node.op == "call_function" and callable(node.target):
        try:
            call = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):  # builtins without a signature take no inplace flag
            return False
        if call.arguments.get("inplace", False) is not True:
            return False
        call.arguments["inplace"] = False
        node.args, node.kwargs = call.args, call.kwargs
    else:
        return False
    return True


def _out_of_place(module: fx.GraphModule) -> None:
    """No node writes into its input: whoever read the overwritten tensor later reads the result instead."""
    earlier: set[fx.Node] = set()
    for node in module.graph.nodes:
        earlier.add(node)
        if node.all_input_nodes and _make_pure(module, node):
            node.all_input_nodes[0].replace_all_uses_with(node, delete_user_cb=lambda user: user not in earlier)


def share(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """`graph` as a module with the parameters of `root`, under their names, and its modes."""
    module = fx.GraphModule(root, graph, class_name=_name(root))
    modes = {name: part.training for name, part in root.named_modules(remove_duplicate=False)}
    saved = root.state_dict().keys()
    for name, part in module.named_modules(remove_duplicate=False):
        part.training = modes[name]
        # fx registers what was a plain attribute or a buffer left out of the state as if it were saved
        part._non_persistent_buffers_set.update(key for key in part._buffers if (f"{name}.{key}" if name else key) not in saved)
    return module


def _repeats(parts: nn.Module) -> bool:
    kinds = [type(part) for part in parts.children() if next(part.children(), None) is not None and not isinstance(part, nn.Sequential)]
    return len(kinds) > len(set(kinds))


def _name_calls(model: nn.Module, graph: fx.Graph) -> None:
    """Note in each node's meta the `calls` open around it, outermost first (key of the call -> module path), and the keys of two of them.

    A container is a list of modules or holds a list of like blocks. `block` is the outermost call that is no container; `holder` is the innermost
    container that computes something itself, such as a dense block, which only matters where no block is open.
    """
    parts = dict(model.named_modules(remove_duplicate=False))
    lists = {name for name, part in parts.items() if type(part) in _LISTS}
    containers = lists | {name for name, part in parts.items() if any(_repeats(inner) for inner in part.modules() if isinstance(inner, _LISTS))}
    for node in graph.nodes:
        calls = {key: str(path) for key, (path, _) in node.meta.get("nn_module_stack", {}).items() if path}
        node.meta["calls"] = calls
        node.meta["block"] = next((key for key, path in calls.items() if path not in containers), None)
        node.meta["holder"] = next((key for key, path in reversed(calls.items()) if path not in lists), None)


def two_images(example: Tensor) -> Tensor:
    """Two images of noise, of the shape of those in `example` (B, C, H, W).

    No size in a graph that holds for two can be a frozen batch of one, and noise shows what images of zeros would hide: they make features of
    zeros, from which a wrong graph gives the same logits.
    """
    noise = torch.randn((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    return noise.to(example)


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The `torch.fx` form of `model`, any batch size, checked against it on two images of noise like `example` (B, C, H, W).

    It shares the model's parameters under their names and keeps its mode. In-place layers become pure and `torch._assert` checks go. A module
    that `trace` made is returned as it is, so whoever cuts one model many times traces it once.

    Raises:
        ModelError: the forward branches on values, takes several inputs, does not return one tensor of logits, refuses images of this size,
            or its graph computes something else than the model.
    """
    size = "x".join(map(str, example.shape[1:]))
    if isinstance(model, fx.GraphModule) and model.meta.get("traced_on") == size:
        return model
    own = set(vars(model))
    try:
        graph = _graph(model)
        for node in reversed(graph.nodes):
            if node.target is torch._assert:
                graph.erase_node(node)
        _name_calls(model, graph)
        module = share(model, graph)
    finally:
        _forget(model, own)
    _out_of_place(module)
    graph.eliminate_dead_code()
    module.recompile()
    images = two_images(example)
    with evaluating(model), evaluating(module):
        try:
            # a clone, because an in-place first layer would write into the images
            expected, found = model(images.clone()), _Survey(module, len(images)).run(images)
        except Exception as error:  # the user's network runs here
            raise ModelError(f"{_name(model)} cannot run on {size} images ({_first_line(error)}); change data.image_size or the backbone.") from error
    if not (isinstance(expected, Tensor) and expected.dim() == 2 and len(expected) == 2):
        kind = f"a tensor of shape {tuple(expected.shape)}" if isinstance(expected, Tensor) else type(expected).__name__
        raise ModelError(f"{_name(model)} returns {kind} for two images; a classifier returns one tensor of logits (batch, classes).")
    if not torch.allclose(expected, found, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ModelError(f"{_name(model)} cannot be traced: its graph gives other logits than the model; rewrite what draws at random or writes into a view.")
    module.meta["traced_on"] = size
    return module
