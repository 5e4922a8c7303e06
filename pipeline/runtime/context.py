"""Which of a channel's tables codes a symbol: what linear predictors expect of it from the symbols coded before.

Channels are coded one after the other, each row by row. A symbol's neighbours to the left and above are known when it is coded, and of the channels before
its own all symbols. Two integer scores of these, one of the symbol to expect and one of how far off that will be, each cut into a few equal steps, choose the
table. All is done in integers, so a device and an edge of different make agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHIFT = 10  # binary places of a score
MEANS, SPREADS = 12, 3  # steps of the symbol expected, and of how far off
GROUP = 32  # channels: one sees those before it in its group, so that the work for a symbol is bounded
SHIFTS = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))  # (down, right) of what is seen of a channel before: the same place, and right, below, left and above of it
LEFT, ABOVE = 3, 4  # of SHIFTS: what is seen of the own channel
FITTED_PLACES = 1 << 15
RIDGE = 1e-2  # of a place's variance
TAIL = 0.003  # of the scores, which lie beyond the outermost steps
LEAST_STEP = 1 / 16
MOST_WEIGHT, MOST_BIAS = (1 << 15) - 1, (1 << 30) - 1

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Predictor:
    """A score: bias of the row and of the column, and weights of what is seen, all times 2**SHIFT.

    Per channel, `weights` are those of each channel before it in its group (of its five places, or of the same place alone), then left and above in its own.
    """

    weights: tuple[tuple[int, ...], ...]
    rows: tuple[tuple[int, ...], ...]
    columns: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ContextModel:
    """Predictors of symbols, one plane of rows x columns a channel, and of their distance from the predicted; `centres` is each channel's rounded mean.

    `mean` sees symbols, `spread` how far they are from the centre of their channel.
    """

    centres: tuple[int, ...]
    mean: Predictor
    spread: Predictor

    def __post_init__(self) -> None:
        channels, (height, width) = len(self.centres), self.plane
        fits = bool(channels and height and width)
        for predictor, seen in ((self.mean, len(SHIFTS)), (self.spread, 1)):
            lengths = [seen * (channel % GROUP) + 2 for channel in range(channels)]
            fits = fits and [len(weights) for weights in predictor.weights] == lengths
            fits = fits and [len(row) for row in predictor.rows] == [height] * channels and [len(row) for row in predictor.columns] == [width] * channels
            fits = fits and all(abs(value) <= MOST_WEIGHT for weights in predictor.weights for value in weights)
            fits = fits and all(abs(value) <= MOST_BIAS for biases in (predictor.rows, predictor.columns) for row in biases for value in row)
        if not fits or not all(0 <= centre < 256 for centre in self.centres):
            raise ValueError("predictors do not fit their channels")

    @property
    def plane(self) -> tuple[int, int]:
        """Rows and columns of a channel."""
        return (len(self.mean.rows[0]), len(self.mean.columns[0])) if self.mean.rows and self.mean.columns else (0, 0)

    @cached_property
    def weights(self) -> NDArray[np.int16]:
        """Of each channel (h, 6 * GROUP + 4): GROUP of `mean` for each of `SHIFTS`, GROUP of `spread`, zero for channels not seen, then those of its own."""
        found = np.zeros((len(self.centres), len(SHIFTS) + 1, GROUP), np.int16)
        for channel, (mean, spread) in enumerate(zip(self.mean.weights, self.spread.weights, strict=True)):
            earlier = channel % GROUP
            found[channel, :-1, :earlier] = np.array(mean[:-2], np.int16).reshape(earlier, len(SHIFTS)).T
            found[channel, -1, :earlier] = spread[:-2]
        own = [[*mean[-2:], *spread[-2:]] for mean, spread in zip(self.mean.weights, self.spread.weights, strict=True)]
        return np.concatenate([found.reshape(len(found), -1), np.array(own, np.int16)], 1)

    @cached_property
    def biases(self) -> NDArray[np.int32]:
        """Rows and columns of `mean`, then of `spread`, each channel after channel."""
        parts = (self.mean.rows, self.mean.columns, self.spread.rows, self.spread.columns)
        return np.concatenate([np.array(part, np.int32).ravel() for part in parts])

    @cached_property
    def centre_array(self) -> NDArray[np.uint8]:
        return np.array(self.centres, np.uint8)

    def contexts(self, symbols: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The context, mean * SPREADS + spread, of each of `symbols`, uint8 (N, h, H, W): int64 of that shape."""
        found = []
        for group in _groups(len(self.centres)):
            own = symbols[:, group]
            away = np.abs(own.astype(np.int64) - self.centre_array[group, None, None])
            steps = [
                np.clip(self._scores(predictor, _features(values, seen), seen, group) >> SHIFT, 0, count - 1)
                for predictor, values, seen, count in ((self.mean, own, SHIFTS, MEANS), (self.spread, away, AWAY_SHIFTS, SPREADS))
            ]
            found.append((steps[0] * SPREADS + steps[1]).transpose(0, 3, 1, 2))
        return np.concatenate(found, 1)

    def _scores(self, predictor: Predictor, features: Matrix, seen: Shifts, group: slice) -> NDArray[np.int64]:
        """(N, H, W, channels of the group). Exact: floats hold every integer below 2**53."""
        channels = features.shape[3] // len(seen)
        matrix = np.zeros((features.shape[3], channels))
        for channel, weights in enumerate(predictor.weights[group]):
            matrix[_seen(channel, channels, seen), channel] = weights
        rows, columns = (np.array(biases[group], np.float64).T for biases in (predictor.rows, predictor.columns))
        return (features @ matrix + rows[:, None] + columns).astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ContextModel:
        """Read back what `to_dict` wrote.

        Raises:
            KeyError, TypeError, ValueError: a key is missing, a value of the wrong kind, or the predictors do not fit their channels.
        """
        mean, spread = (Predictor(*(_integers(fields[name][part]) for part in ("weights", "rows", "columns"))) for name in ("mean", "spread"))
        return cls(_integers([fields["centres"]])[0], mean, spread)


Shifts = tuple[tuple[int, int], ...]
AWAY_SHIFTS: Shifts = (SHIFTS[0], SHIFTS[LEFT], SHIFTS[ABOVE])


def _integers(rows: Any) -> tuple[tuple[int, ...], ...]:
    if any(type(value) is not int for row in rows for value in row):
        raise TypeError("a value is of the wrong kind")
    return tuple(tuple(row) for row in rows)


def _groups(channels: int) -> Iterator[slice]:
    return (slice(start, min(start + GROUP, channels)) for start in range(0, channels, GROUP))


def _features(values: NDArray[Any], seen: Shifts) -> Matrix:
    """What lies at each of `seen` from every place of `values` (N, h, H, W), zero outside the plane: (N, H, W, len(seen) * h), shift after shift."""
    height, width = values.shape[2:]
    padded = np.pad(values.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    shifted = [padded[:, :, 1 + down : 1 + down + height, 1 + right : 1 + right + width] for down, right in seen]
    return np.concatenate(shifted, 1).transpose(0, 2, 3, 1)


def _seen(channel: int, channels: int, seen: Shifts) -> list[int]:
    """Which of the features of a group of `channels` the channel `channel` of it may look at, in the order of `Predictor.weights`."""
    of_earlier = range(len(seen)) if seen is SHIFTS else (0,)
    found = [shift * channels + earlier for earlier in range(channel) for shift in of_earlier]
    own = [seen.index(SHIFTS[place]) for place in (LEFT, ABOVE)]
    return [*found, *(shift * channels + channel for shift in own)]


def fit_contexts(symbols: NDArray[np.uint8]) -> ContextModel:
    """Predictors with the least squared error on the first of `symbols`, uint8 (N, h, H, W)."""
    count, channels, height, width = symbols.shape
    some = symbols[: max(1, min(count, FITTED_PLACES // (height * width)))]
    centres = np.round(some.mean((0, 2, 3))).astype(np.int64)
    fitted: tuple[list[_Fitted], list[_Fitted]] = ([], [])
    for group in _groups(channels):
        values = some[:, group]
        features = _features(values, SHIFTS)
        here = features[..., : values.shape[1]]
        fitted[0].append(_fit(features, here, SHIFTS, MEANS))
        off = np.abs(here - fitted[0][-1].expected)
        away = _features(np.abs(values - centres[group, None, None]), AWAY_SHIFTS)
        fitted[1].append(_fit(away, off, AWAY_SHIFTS, SPREADS))
    mean, spread = (Predictor(*(tuple(row for part in parts for row in getattr(part, name)) for name in ("weights", "rows", "columns"))) for parts in fitted)
    return ContextModel(tuple(int(centre) for centre in centres), mean, spread)


@dataclass
class _Fitted:
    weights: list[tuple[int, ...]]
    rows: list[tuple[int, ...]]
    columns: list[tuple[int, ...]]
    expected: Matrix


def _fit(features: Matrix, target: Matrix, seen: Shifts, steps: int) -> _Fitted:
    """Predictors of `target` (N, H, W, channels) from what each channel may see of `features`; scores of `steps` equal steps from tail to tail."""
    channels = target.shape[3]
    level, goal = _level(features), _level(target)
    flat, aim = ((values - means.reshape(1, *values.shape[1:])).reshape(-1, values.shape[3]) for values, means in ((features, level), (target, goal)))
    gram, cross = flat.T @ flat, flat.T @ aim
    gram[np.diag_indices(len(gram))] += RIDGE * len(flat) + RIDGE
    weights = np.zeros((flat.shape[1], channels))
    for channel in range(channels):
        chosen = _seen(channel, channels, seen)
        weights[chosen, channel] = np.linalg.solve(gram[np.ix_(chosen, chosen)], cross[chosen, channel])
    found = _Fitted([], [], [], (flat @ weights).reshape(target.shape) + goal)
    lows, highs = np.quantile(found.expected, (TAIL, 1 - TAIL), axis=(0, 1, 2))
    for channel, (low, high) in enumerate(zip(lows, highs, strict=True)):
        chosen = _seen(channel, channels, seen)
        unit = (1 << SHIFT) / max((high - low) / steps, LEAST_STEP)
        whole = np.clip(np.round(unit * weights[chosen, channel]), -MOST_WEIGHT, MOST_WEIGHT)
        bias = unit * (goal[..., channel] - low) - level[..., chosen] @ whole
        rows, columns = bias.mean(1), bias.mean(0) - bias.mean()
        found.weights.append(_whole(whole))
        found.rows.append(_whole(rows))
        found.columns.append(_whole(columns))
    return found


def _level(values: Matrix) -> Matrix:
    """Mean of `values` (N, H, W, F) by row and by column, (H, W, F): the sum of a term of each, which is what biases can say."""
    by_place = values.mean(0)
    level: Matrix = by_place.mean(1, keepdims=True) + by_place.mean(0, keepdims=True) - by_place.mean((0, 1), keepdims=True)
    return level


def _whole(values: Matrix) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(np.round(values), -MOST_BIAS, MOST_BIAS))
