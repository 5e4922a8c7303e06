"""Compressing a device half step by step, as a gymnasium environment whose action wall no episode gets over (METHODS 5.1)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CoinferError
from pipeline.search.candidate import OUTPUT, Candidate
from pipeline.search.layer import Layer
from pipeline.search.space import WITH_BITS, Space

RAW_BITS = 32  # of an uncoded element
MOST_BITS = 8

Observation = NDArray[np.float32]


class Costing(Protocol):
    """What the environment asks of the evaluator: no accuracy is involved, so a call takes milliseconds."""

    def layers(self, cut: str) -> Sequence[Layer]:
        """Of the groups in `space.keep(cut)`, in their order."""
        ...

    def feature_shape(self, cut: str) -> tuple[int, ...]:
        """(C, H, W) or (C,) of what crosses at `cut`, uncoded."""
        ...

    def bound_ms(self, candidate: Candidate) -> float:
        """Predicted end-to-end latency with the uncoded size of the code: never below what the evaluator then measures."""
        ...


@dataclass(frozen=True)
class Step:
    """One choice of an episode.

    `values` are its choices and `positions` where they lie in [0, 1], ascending: an action means the value nearest to it.
    `layer` is the group that is pruned, None for a step of the encoder. One that is `optional` changes nothing after choices that leave nothing to choose.
    """

    name: str
    values: tuple[Any, ...]
    positions: NDArray[np.float32]
    layer: Layer | None
    optional: bool

    def level(self, action: float) -> int:
        """Which of `values` lies nearest to `action`; of two the lower."""
        return int(np.abs(self.positions - np.float32(action)).argmin())


def steps_at(space: Space, costing: Costing, cut: str) -> tuple[Step, ...]:
    """The choices of an episode at `cut` in their order: groups to prune, then codec, code width, stride, bits and whatever else the space asks for.

    They are all that the space may ask for at the cut, so that every episode has as many; optional are what goes with a dropped block, and what not all of
    the codecs have.
    A kept fraction is its own position, a code width w lies at w / widest, a stride s at 1/s, n bits at (n - 1)/7 (METHODS: 1 + round(7a)); values
    of other parameters lie evenly, numbers falling, since a greater rate weight keeps less.
    """
    asked_of: dict[str, dict[str, Sequence[Any]]] = {codec: {} for codec in space.codecs}

    def last(codec: str, name: str, values: Sequence[Any]) -> Any:
        asked_of[codec][name] = values
        return codec if name == "codec" else values[-1]  # a block kept, so that its groups are asked for too

    for codec in space.codecs:
        space.suggest_at(cut, functools.partial(last, codec))
    asked = {name: values for found in asked_of.values() for name, values in found.items()}
    optional = {name for name in asked if not all(name in found for found in asked_of.values())}
    optional |= {f"keep {name}" for names in space.inside(cut).values() for name in names}
    layers = costing.layers(cut)
    steps = []
    for number, (name, values) in enumerate(asked.items()):
        layer = layers[number] if number < len(layers) else None
        if layer is not None:
            places = {value: value for value in values}
        elif name == "code_channels":
            places = {value: value / max(values) for value in values}
        elif name == "stride":
            places = {value: 1 / value for value in values}
        elif name == "bits":
            places = {value: (value - 1) / (MOST_BITS - 1) for value in values}
        else:
            ordered = sorted(values, reverse=True) if not isinstance(values[0], str) else list(reversed(values))
            places = {value: (place + 1) / len(ordered) for place, value in enumerate(ordered)}
        rising = sorted(values, key=places.__getitem__)
        steps.append(Step(name, tuple(rising), np.array([places[value] for value in rising], np.float32), layer, name in optional))
    return tuple(steps)


class Compression(gymnasium.Env[Observation, NDArray[np.float32]]):
    """An episode makes one candidate at one cut: an action in [0, 1] per step of `steps_at`, mapped to the nearest legal value.

    What the candidate is worth is for the evaluator to say, so rewards are 0 here and the last step's info holds the `candidate`.
    `reset` takes options `cut` (else one of `cuts` is drawn) and `weight`, the latency's weight in the reward as a share of the greatest in
    use, which is shown to the agent. `cuts` are those of the space where something is left to choose and the budget can be met.

    The action wall: an action is clipped, on its way to the value carried so far, to one from which the budget can be met by a completion that is known.
    Latency is not monotone in widths, as vector units work on blocks of channels, so that "every later step takes its minimum" is no bound;
    instead the episode always carries one whole candidate whose `bound_ms` was found within the budget, and a value is legal once such a candidate has it.
    The last one carried is the episode's.

    The state is that of METHODS 5.1, every column in [0, 1]: index; conv, fc or encoder; in and out channels, stride, kernel, weights; MACs removed so far
    and remaining; the last action; elements at the cut; bits so far of the raw ones; budget left; weight. The link's rate is left out, a search has one.
    Appended are which step it is (one-hot over all cuts) and what each step chose so far: without, two halves pruned in different places
    look the same to the critic, though their accuracies differ.

    Raises:
        CoinferError: no cut can meet the budget (it names the budget and the cheapest candidate found), or nowhere is anything left to choose.
    """

    def __init__(self, space: Space, costing: Costing, cuts: Sequence[str], budget_ms: float | None) -> None:
        self.space, self.costing, self.budget_ms = space, costing, budget_ms
        self.steps = {cut: found for cut in cuts if (found := steps_at(space, costing, cut))}
        if not self.steps:
            raise CoinferError(f"at {', '.join(cuts)} there is nothing to choose for the search; give search.keep, or cuts that a codec fits.")
        self._bound = functools.lru_cache(maxsize=1 << 16)(lambda cut, levels: costing.bound_ms(self.candidate(cut, levels)))
        self.cheapest = {cut: (0,) * len(self.steps[cut]) if budget_ms is None else self._descend(cut) for cut in self.steps}
        self.cuts = tuple(cut for cut in self.steps if self._within(cut, self.cheapest[cut]))
        if not self.cuts:
            least = min(self.steps, key=lambda cut: self._bound(cut, self.cheapest[cut]))
            raise CoinferError(
                f"no split or device-only candidate surely meets the latency budget of {budget_ms:g} ms, its code taken as large as uncoded; "
                f"the cheapest found is {self.candidate(least, self.cheapest[least]).label()} "
                f"with {self._bound(least, self.cheapest[least]):.3g} ms: raise the budget, allow stronger pruning, or choose another search.method."
            )
        names = list(dict.fromkeys(step.name for cut in self.cuts for step in self.steps[cut]))
        self._names = len(names)
        self._places = {cut: np.array([names.index(step.name) for step in self.steps[cut]]) for cut in self.cuts}
        macs = {cut: np.array([step.layer.macs if step.layer else 0 for step in self.steps[cut]], np.float64) for cut in self.cuts}
        self._macs = {cut: row / (row.sum() or 1) for cut, row in macs.items()}
        self._fixed = {cut: self._fixed_columns(cut) for cut in self.cuts}
        columns = np.concatenate(list(self._fixed.values()))
        low, high = columns.min(0), columns.max(0)
        self._fixed = {cut: (rows - low) / np.where(high > low, high - low, 1) for cut, rows in self._fixed.items()}
        elements = {cut: math.prod(costing.feature_shape(cut)) for cut in self.cuts}
        self._elements = {cut: count / max(elements.values()) for cut, count in elements.items()}
        self.cut, self.weight = self.cuts[0], 0.0
        self._carried = self.cheapest[self.cut]
        self._done = 0
        size = len(self._state())
        self.weight_column = size - 2 * self._names - 1
        self.observation_space = gymnasium.spaces.Box(0, 1, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(0, 1, (1,), np.float32)

    def candidate(self, cut: str, levels: Sequence[int]) -> Candidate:
        """What taking value number `levels[i]` at step i makes."""
        chosen = {step.name: step.values[level] for step, level in zip(self.steps[cut], levels, strict=True)}
        return self.space.suggest_at(cut, lambda name, _: chosen[name])

    def levels(self, candidate: Candidate) -> tuple[int, ...] | None:
        """The choices that make `candidate`, or None where no episode does: another kind, a value or cut not offered, over the budget."""
        if candidate.cut not in self.cuts:
            return None
        try:
            chosen = self.space.choices(candidate)
            # what is not asked for, with a dropped block or another codec, counts as the last of its values, whatever an episode was told there
            levels = tuple(step.values.index(chosen.get(step.name, step.values[-1])) for step in self.steps[candidate.cut])
        except ValueError:
            return None
        same = self.candidate(candidate.cut, levels) == candidate
        return levels if same and self._within(candidate.cut, levels) else None

    def walk(self, cut: str, levels: tuple[int, ...]) -> tuple[Observation, NDArray[np.float32]]:
        """The states (steps, columns), with weight 0, and actions (steps,) of the episode that makes these choices, which must be within the budget."""
        states = [self.reset(options={"cut": cut, "weight": 0.0})[0]]
        self._carried = levels
        actions = np.array([step.positions[level] for step, level in zip(self.steps[cut], levels, strict=True)], np.float32)
        states.extend(self.step(actions[number : number + 1])[0] for number in range(len(levels) - 1))
        return np.stack(states), actions

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        options = options or {}
        self.cut = options.get("cut") or self.cuts[int(self.np_random.integers(len(self.cuts)))]
        self.weight = options.get("weight", 0.0)
        self._carried, self._done = self.cheapest[self.cut], 0
        return self._state(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take the step, clipped by the wall; info tells the action taken, and at the end the candidate."""
        step = self.steps[self.cut][self._done]
        level = self._admit(step.level(float(action[0])))
        if step.optional and step.name not in self.space.choices(self.candidate(self.cut, self._carried)):
            level = len(step.values) - 1  # as `levels` has it, so that a candidate looks the same however it came about
            self._carried = (*self._carried[: self._done], level, *self._carried[self._done + 1 :])
        self._done += 1
        over = self._done == len(self._carried)
        info: dict[str, Any] = {"action": float(step.positions[level])}
        if over:
            info["candidate"] = self.candidate(self.cut, self._carried)
        return self._state(), 0.0, over, False, info

    def _admit(self, wanted: int) -> int:
        """`wanted` where the budget allows it, else a value on the way to it from the one carried, bisected; the candidate carried then has it."""
        inside, outside = self._carried[self._done], wanted
        if inside == wanted or self._carry(wanted):
            return wanted
        while abs(outside - inside) > 1:
            middle = (inside + outside) // 2
            if self._carry(middle):
                inside = middle
            else:
                outside = middle
        return inside

    def _carry(self, level: int) -> bool:
        """Whether some completion with `level` now is known to be within the budget; it is the candidate carried from here."""
        for rest in (self.cheapest[self.cut], self._carried):
            levels = (*self._carried[: self._done], level, *rest[self._done + 1 :])
            if self._within(self.cut, levels):
                self._carried = levels
                return True
        return False

    def _within(self, cut: str, levels: tuple[int, ...]) -> bool:
        return self.budget_ms is None or self._bound(cut, levels) <= self.budget_ms

    def _descend(self, cut: str) -> tuple[int, ...]:
        """The cheapest choices that changing one at a time from all lowest leads to."""
        best = (0,) * len(self.steps[cut])
        changed = True
        while changed:
            changed = False
            for place, step in enumerate(self.steps[cut]):
                others = [(*best[:place], level, *best[place + 1 :]) for level in range(len(step.values))]
                least = min(others, key=lambda levels: self._bound(cut, levels))
                if self._bound(cut, least) < self._bound(cut, best):
                    best, changed = least, True
        return best

    def _fixed_columns(self, cut: str) -> NDArray[np.float64]:
        """What does not change in an episode, a row a step; (steps, 6), not scaled yet."""
        rows = []
        for number, step in enumerate(self.steps[cut]):
            layer, channels = step.layer, self.costing.feature_shape(cut)[0]
            shape = (layer.in_channels, layer.out_channels, layer.stride, layer.kernel, layer.weights) if layer else (channels, channels, 0, 0, 0)
            rows.append((number, *shape))
        return np.array(rows, np.float64)

    def _state(self) -> Observation:
        steps, done = self.steps[self.cut], self._done
        now = min(done, len(steps) - 1)
        layer, macs, places = steps[now].layer, self._macs[self.cut], self._places[self.cut]
        chosen = np.array([step.positions[level] for step, level in zip(steps[:done], self._carried, strict=False)])
        kind = [layer is not None and layer.kind == "conv", layer is not None and layer.kind == "fc", layer is None]
        removed, remaining = macs[:done] @ (1 - chosen), macs[done:].sum()
        moving = [removed, remaining, chosen[-1] if done else 1.0, self._elements[self.cut], self._bits(), self._left(), self.weight]
        which, history = np.zeros(self._names), np.ones(self._names)
        which[places[now]] = 1
        history[places[:done]] = chosen
        return np.concatenate([self._fixed[self.cut][now], kind, moving, which, history]).clip(0, 1).astype(np.float32)

    def _bits(self) -> float:
        """What is sent by the choices so far, as a share of the feature's own bits; nothing where the device does it all."""
        if self.cut == OUTPUT:
            return 0.0
        channels, *area = self.costing.feature_shape(self.cut)
        coded = {step.name: step.values[level] for step, level in zip(self.steps[self.cut][: self._done], self._carried, strict=False)}
        symbols = coded.get("code_channels", channels) / channels / coded.get("stride", 1) ** len(area)
        bits = coded.get("bits", RAW_BITS) if coded.get("codec", self.space.codecs[0]) in WITH_BITS else MOST_BITS
        return float(symbols * bits / RAW_BITS)

    def _left(self) -> float:
        """Share of the budget that the cheapest completion leaves; without a budget, of what the whole takes."""
        levels = (*self._carried[: self._done], *self.cheapest[self.cut][self._done :])
        limit = self.budget_ms or self._bound(self.cut, tuple(len(step.values) - 1 for step in self.steps[self.cut]))
        return 1 - self._bound(self.cut, levels) / limit
