"""Which of a channel's tables codes a symbol: what linear predictors expect of it from the symbols coded before.

Channels are coded one after the other, each row by row. A symbol's neighbours to the left and above are known when it is coded, and of the channels before
its own all symbols. Two integer scores of these, one of the symbol to expect and one of how far off that will be, each cut into a few equal steps, choose the
table. All is done in integers, so a device and an edge of different make agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SHIFT = 10  # binary places of a score
MEANS, SPREADS = 12, 3  # steps of the symbol expected, and of how far off
CONTEXTS = MEANS * SPREADS
GROUP = 32  # channels: one sees those before it in its group, so that the work for a symbol is bounded
HERE, RIGHT, BELOW, LEFT, ABOVE = (0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)  # rows down and columns to the right of a symbol
FITTED_PLACES = 1 << 15  # twice as many fit no better
RIDGE = 1e-2  # squared symbols a place: weights of what hardly varies stay small
TAIL = 0.003  # of the scores at either end lie beyond the outermost steps
LEAST_STEP = 1 / 16  # symbols: a score that hardly varies is not cut finer
COUNTED_PLACES = 1 << 14  # scored at once: more of their neighbours would not stay in the cache
# Row, column and 31 * 5 + 2 weights times symbols of at most 255 stay below 2**31, so that C, which adds in 32 bits, agrees.
MOST_WEIGHT, MOST_BIAS = (1 << 15) - 1, (1 << 28) - 1

Matrix = NDArray[np.float64]


class View(NamedTuple):
    """What a predictor sees: of its own channel the places left and above, of an earlier one the first `of_earlier` of `places`."""

    places: tuple[tuple[int, int], ...]
    of_earlier: int
    steps: int


OF_SYMBOLS = View((HERE, RIGHT, BELOW, LEFT, ABOVE), 5, MEANS)
OF_DISTANCES = View((HERE, LEFT, ABOVE), 1, SPREADS)


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

    Raises:
        ValueError: predictors that do not fit their channels, or values out of range.
    """

    centres: tuple[int, ...]
    mean: Predictor
    spread: Predictor

    def __post_init__(self) -> None:
        channels, (height, width) = len(self.centres), self.plane
        fits = bool(channels and height and width)
        for predictor, view in ((self.mean, OF_SYMBOLS), (self.spread, OF_DISTANCES)):
            lengths = [view.of_earlier * (channel % GROUP) + 2 for channel in range(channels)]
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
    def arrays(self) -> tuple[NDArray[np.int16], NDArray[np.int32], NDArray[np.uint8]]:
        """Weights, biases and centres, as the coder reads them.

        Weights of each channel (h, 6 * GROUP + 4): GROUP of `mean` for each place it sees, GROUP of `spread`, zero for channels not seen, then those of its
        own channel; biases of rows and columns of `mean`, then of `spread`, each channel after channel.
        """
        places = len(OF_SYMBOLS.places)
        others = np.zeros((len(self.centres), places + 1, GROUP), np.int16)
        for channel, (mean, spread) in enumerate(zip(self.mean.weights, self.spread.weights, strict=True)):
            earlier = channel % GROUP
            others[channel, :-1, :earlier] = np.array(mean[:-2], np.int16).reshape(earlier, places).T
            others[channel, -1, :earlier] = spread[:-2]
        own = [[*mean[-2:], *spread[-2:]] for mean, spread in zip(self.mean.weights, self.spread.weights, strict=True)]
        weights = np.concatenate([others.reshape(len(others), -1), np.array(own, np.int16)], 1)
        biases = [np.array(part, np.int32).ravel() for part in (self.mean.rows, self.mean.columns, self.spread.rows, self.spread.columns)]
        return weights, np.concatenate(biases), np.array(self.centres, np.uint8)

    def contexts(self, symbols: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The context, mean * SPREADS + spread, of each of `symbols`, uint8 (N, h, H, W): of that shape."""
        found = np.empty(symbols.shape, np.uint8)
        at_once = max(1, COUNTED_PLACES // (symbols.shape[2] * symbols.shape[3]))
        for start in range(0, len(symbols), at_once):
            for group in _groups(len(self.centres)):
                own = symbols[start : start + at_once, group]
                away = np.abs(own.astype(np.int64) - np.array(self.centres[group])[:, None, None])
                means = self._steps(self.mean, own, OF_SYMBOLS, group)
                spreads = self._steps(self.spread, away, OF_DISTANCES, group)
                found[start : start + at_once, group] = means * SPREADS + spreads
        return found

    def _steps(self, predictor: Predictor, values: NDArray[Any], view: View, group: slice) -> NDArray[np.int64]:
        """(N, channels of the group, H, W). Exact: floats hold every integer below 2**53."""
        channels = values.shape[1]
        matrix = np.zeros((channels, len(view.places) * channels))
        for channel, weights in enumerate(predictor.weights[group]):
            matrix[channel, _seen(channel, channels, view)] = weights
        rows, columns = (np.array(biases[group], np.float64) for biases in (predictor.rows, predictor.columns))
        scores = (matrix @ _features(values, view)).reshape(values.shape) + rows[:, :, None] + columns[:, None]
        steps: NDArray[np.int64] = np.clip(scores.astype(np.int64) >> SHIFT, 0, view.steps - 1)
        return steps

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


def _integers(rows: Any) -> tuple[tuple[int, ...], ...]:
    if any(type(value) is not int for row in rows for value in row):
        raise TypeError("a value is of the wrong kind")
    return tuple(tuple(row) for row in rows)


def _groups(channels: int) -> Iterator[slice]:
    return (slice(start, min(start + GROUP, channels)) for start in range(0, channels, GROUP))


def _features(values: NDArray[Any], view: View) -> Matrix:
    """What is seen from every place of `values` (N, h, H, W), zero outside the plane: (N, places * h, H * W), all channels' at one place, then at the next."""
    height, width = values.shape[2:]
    padded = np.pad(values.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    moved = [padded[:, :, 1 + down : 1 + down + height, 1 + right : 1 + right + width] for down, right in view.places]
    return np.concatenate(moved, 1).reshape(len(values), -1, height * width)


def _seen(channel: int, channels: int, view: View) -> list[int]:
    """Which of the features of a group of `channels` the channel `channel` of it may look at, in the order of `Predictor.weights`."""
    found = [place * channels + earlier for earlier in range(channel) for place in range(view.of_earlier)]
    return [*found, *(view.places.index(place) * channels + channel for place in (LEFT, ABOVE))]


def fit_contexts(symbols: NDArray[np.uint8]) -> ContextModel:
    """Predictors with the least squared error on the first of `symbols`, uint8 (N, h, H, W), of which there must be some."""
    count, channels, height, width = symbols.shape
    some = symbols[: max(1, min(count, FITTED_PLACES // (height * width)))]
    centres = np.round(some.mean((0, 2, 3))).astype(np.int64)
    means, spreads = [], []
    for group in _groups(channels):
        values = some[:, group]
        predictor, expected = _fit(values, values.astype(np.float64), OF_SYMBOLS)
        means.append(predictor)
        spreads.append(_fit(np.abs(values - centres[group, None, None]), np.abs(values - expected), OF_DISTANCES)[0])
    return ContextModel(tuple(int(centre) for centre in centres), _joined(means), _joined(spreads))


def _joined(groups: list[Predictor]) -> Predictor:
    return Predictor(*(tuple(row for group in groups for row in getattr(group, part)) for part in ("weights", "rows", "columns")))


def _fit(values: NDArray[Any], target: Matrix, view: View) -> tuple[Predictor, Matrix]:
    """The predictor of `target` (N, h, H, W) from what each channel may see of `values`, scores in equal steps from tail to tail; and what it expects."""
    features, goal = (_by_place(part) for part in (_features(values, view).reshape(len(values), -1, *values.shape[2:]), target))
    level, aim = _level(features), _level(goal)
    flat, off = (part.reshape(-1, part.shape[3]) for part in (features - level, goal - aim))
    gram, cross = flat.T @ flat, flat.T @ off
    gram[np.diag_indices(len(gram))] += RIDGE * (len(flat) + 1)
    channels = [_seen(channel, target.shape[1], view) for channel in range(target.shape[1])]
    weights = np.zeros_like(cross)
    for channel, seen in enumerate(channels):
        weights[seen, channel] = np.linalg.solve(gram[np.ix_(seen, seen)], cross[seen, channel])
    expected = (flat @ weights).reshape(goal.shape) + aim
    lows, highs = np.quantile(expected, (TAIL, 1 - TAIL), axis=(0, 1, 2))
    found: list[tuple[tuple[int, ...], ...]] = []
    for channel, (seen, low, high) in enumerate(zip(channels, lows, highs, strict=True)):
        unit = (1 << SHIFT) / max((high - low) / view.steps, LEAST_STEP)
        whole = np.clip(np.round(unit * weights[seen, channel]), -MOST_WEIGHT, MOST_WEIGHT)
        bias = unit * (aim[..., channel] - low) - level[..., seen] @ whole
        found.append((_whole(whole), _whole(bias.mean(1)), _whole(bias.mean(0) - bias.mean())))
    return Predictor(*zip(*found, strict=True)), expected.transpose(0, 3, 1, 2)


def _by_place(values: Matrix) -> Matrix:
    """(N, F, H, W) -> (N, H, W, F)."""
    return np.ascontiguousarray(values.transpose(0, 2, 3, 1))


def _level(values: Matrix) -> Matrix:
    """Mean of `values` (N, H, W, F) by row and by column, (H, W, F): the sum of a term of each, which is what biases can say."""
    by_place = values.mean(0)
    level: Matrix = by_place.mean(1, keepdims=True) + by_place.mean(0, keepdims=True) - by_place.mean((0, 1), keepdims=True)
    return level


def _whole(values: Matrix) -> tuple[int, ...]:
    return tuple(int(value) for value in np.clip(np.round(values), -MOST_BIAS, MOST_BIAS))
