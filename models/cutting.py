"""Where a traced backbone can be cut, and the halves a cut leaves.

A cut point is a node of the `torch.fx` graph after which exactly one tensor crosses (METHODS 1): every value the rest needs, except what follows
from parameters alone, is that tensor. A shape number that crosses beside it rules the node out. Counted without the input and with the logits, so
defined, ResNet-18 has 23, DenseNet-121 25, ViT-B/16 32 and EfficientNet-B0 79.
"""

from __future__ import annotations

import difflib
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from models.tracing import evaluating, share, trace
from pipeline.errors import ModelError

INPUT = "input"
OUTPUT = "output"


@dataclass(frozen=True)
class CutPoint:
    """A named place where one tensor crosses.

    `shape` is that tensor's without the batch; `macs` (per image) and `params` are cumulative, on the device side of the cut; `layers` are the
    modules with parameters between the cut listed before this one and this one, in the order they run.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    macs: int
    params: int
    layers: tuple[str, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "layers": list(self.layers)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CutPoint:
        return cls(**{**fields, "shape": tuple(fields["shape"]), "layers": tuple(fields["layers"])})


@dataclass(frozen=True)
class _Place:
    """A cut node and its name; `offered` at block level if no block is open there, `ends_block` if one of several layers just closed."""

    node: fx.Node
    name: str
    offered: bool
    ends_block: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.node.meta["shape"])

    @property
    def macs(self) -> int:
        return int(self.node.meta["macs"])

    @property
    def is_map(self) -> bool:
        return sum(size > 1 for size in self.shape) > 1


def _crossings(graph: fx.Graph) -> list[fx.Node]:
    """Nodes after which nothing but their own value is still needed, the input first and the logits last."""
    depends: set[fx.Node] = set()
    needed: set[fx.Node] = set()
    last_use = {source: node for node in graph.nodes for source in node.all_input_nodes}
    cuts = []
    for node in graph.nodes:
        if node.op == "output":
            break
        if node.op == "placeholder" or any(source in depends for source in node.all_input_nodes):
            depends.add(node)
            needed.add(node)
        needed -= {source for source in node.all_input_nodes if last_use[source] is node}
        if needed == {node} and node.meta["shape"] is not None:
            cuts.append(node)
    return cuts


def _places(module: fx.GraphModule) -> list[_Place]:
    taken = {INPUT, OUTPUT}
    logits = module.graph.output_node().all_input_nodes[0]

    def unique(name: str) -> str:
        candidates = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(2)))
        taken.add(name := next(candidate for candidate in candidates if candidate not in taken))
        return name

    def place(node: fx.Node) -> _Place:
        calls, block = node.meta["calls"], node.meta["block"]
        ended = block or node.meta["holder"]
        still_open = {key for user in node.users for key in user.meta["calls"]}
        closed = ended is not None and ended not in still_open
        if node.op == "placeholder" or node is logits:
            name = INPUT if node.op == "placeholder" else OUTPUT
        else:
            name = unique(calls[ended] if closed else _path(node))
        return _Place(node, name, offered=block not in still_open, ends_block=closed and calls[ended] != node.target)

    return [place(node) for node in _crossings(module.graph)]


def _path(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
    return ".".join([*list(node.meta["calls"].values())[-1:], str(called)])


def _block_level(places: list[_Place]) -> list[_Place]:
    """Input, output, and between two layers that compute MACs one place: the smallest map, at the end of their block or else as late as it can be.

    Normalisation, activation and pooling so go with the layer before them, and a map is kept rather than the vector pooled from it.
    """
    first, last = places[0], places[-1]
    groups: dict[int, list[tuple[int, _Place]]] = {}
    for position, place in enumerate(places):
        if place.offered and first.macs < place.macs < last.macs:
            groups.setdefault(place.macs, []).append((position, place))

    def preference(item: tuple[int, _Place]) -> tuple[bool, int, bool, int]:
        position, place = item
        # the first block to end in a group is the one that computed; a later one only normalises
        return not place.is_map, math.prod(place.shape), not place.ends_block, position if place.ends_block else -position

    return [first, *(min(group, key=preference)[1] for group in groups.values()), last]


def _parameters(module: fx.GraphModule, node: fx.Node) -> list[nn.Parameter]:
    if node.op == "call_module":
        return list(module.get_submodule(str(node.target)).parameters())
    value = operator.attrgetter(str(node.target))(module) if node.op == "get_attr" else None
    return [value] if isinstance(value, nn.Parameter) else []


def cut_points(model: nn.Module, example: Tensor, level: Literal["blocks", "all"] = "blocks") -> list[CutPoint]:
    """The places where `model` can be cut, from `input` (index 0, the image crosses) to `output` (the logits).

    `example` is an image batch (B, C, H, W). Level `blocks` offers one place after each block, named by the path of the module that ends there;
    level `all` every node of the module docstring's definition. A place has one name at both levels. MACs are `FlopCounterMode`'s FLOPs / 2.

    Raises:
        ModelError: see `trace`.
    """
    module = trace(model, example)
    places = _places(module)
    nodes = iter(module.graph.nodes)
    sizes: dict[nn.Parameter, int] = {}
    points = []
    for index, place in enumerate(places if level == "all" else _block_level(places)):
        layers: dict[str, None] = {}
        for node in nodes:
            parameters = _parameters(module, node)
            sizes.update((parameter, parameter.numel()) for parameter in parameters)
            if parameters and node.op == "call_module":
                layers[str(node.target)] = None
            if node is place.node:
                break
        points.append(CutPoint(index, place.name, place.shape, place.macs, sum(sizes.values()), tuple(layers)))
    return points


def _between(module: fx.GraphModule, start: _Place, end: _Place) -> fx.GraphModule:
    """What computes `end` from `start`, with everything that follows from parameters alone."""
    required: set[fx.Node] = set()
    pending = [end.node]
    while pending:
        node = pending.pop()
        if node not in required and node is not start.node:
            if node.op == "placeholder":
                raise ModelError(f"cut {start.name} does not come before cut {end.name}; give the cuts in the order of cut_points.")
            required.add(node)
            pending.extend(node.all_input_nodes)
    graph = fx.Graph()
    copies = {start.node: graph.placeholder("image" if start.name == INPUT else "feature")}
    for node in module.graph.nodes:
        if node in required:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end.node])
    return share(module, graph)


def _find(places: list[_Place], cut: str) -> _Place:
    named = {place.name: place for place in places}
    if cut not in named:
        close = difflib.get_close_matches(cut, named, n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ModelError(f"cut {cut!r} is unknown; choose one of {', '.join(place.name for place in _block_level(places))}{hint}.")
    return named[cut]


def split(model: nn.Module, example: Tensor, cut: str) -> tuple[nn.Module, nn.Module]:
    """(head, tail) of `model` at the place called `cut` at either level: head (B, C, H, W) -> (B, *shape), tail from there to the logits.

    Both share the model's parameters under their original names and keep its mode; neither writes into its input.

    Raises:
        ModelError: an unknown cut (the known ones are listed), or see `trace`.
    """
    module = trace(model, example)
    places = _places(module)
    place = _find(places, cut)
    return _between(module, places[0], place), _between(module, place, places[-1])


def segment_modules(model: nn.Module, example: Tensor, cuts: Sequence[CutPoint]) -> list[nn.Module]:
    """One module for each consecutive pair of `cuts`: segment i takes the tensor at cuts[i] and returns the one at cuts[i + 1].

    Raises:
        ModelError: an unknown cut, cuts out of order, or see `trace`.
    """
    module = trace(model, example)
    places = _places(module)
    return [_between(module, start, end) for start, end in itertools.pairwise(_find(places, cut.name) for cut in cuts)]


def count_macs(module: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs per image of each layer that computes any, by module name (`""` is `module` itself), summing to `FlopCounterMode`'s FLOPs / 2.

    Counts convolutions, matrix products and attention; not bias, normalisation, activation or pooling. What a module computes outside its
    children (attention products, functional layers) counts under its own name. `example` is a batch of the module's input.
    """
    macs: dict[str, int] = {}
    open_calls: list[list[int]] = []  # [flops at entry, flops of the children so far]
    counter = FlopCounterMode(display=False)
    names = {part: name for name, part in module.named_modules()}

    def enter(part: nn.Module, _: Any) -> None:
        open_calls.append([counter.get_total_flops(), 0])

    def leave(part: nn.Module, _: Any, __: Any) -> None:
        start, children = open_calls.pop()
        spent = counter.get_total_flops() - start
        if spent > children:
            macs[names[part]] = macs.get(names[part], 0) + (spent - children) // 2
        if open_calls:
            open_calls[-1][1] += spent

    handles = [handle for part in names for handle in (part.register_forward_pre_hook(enter), part.register_forward_hook(leave))]
    try:
        with evaluating(module), counter:
            module(example[:1].clone())
    finally:
        for handle in handles:
            handle.remove()
    return macs
