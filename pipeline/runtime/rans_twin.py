"""The Python twin of `_rans.c`: the same functions, the same bytes, used where the extension was not built.

Both work on flat tables of `contexts` rows per channel, as `CodecTables` derives them: `freqs` and `starts` (levels entries a row),
`slots` (2**precision entries a row: where occurrence `starts[s] + r` of a symbol lies) and `entries` (its inverse: symbol | r << 8).
Where there are several contexts, `weights`, `biases` and `centres` are those of a `ContextModel`.
The state starts at 0 and has no lower bound until the first byte leaves it, so nothing is spent on a flush.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from numpy import int16, int32, uint8, uint16, uint32
from numpy.typing import NDArray

from pipeline.runtime.context import ABOVE, GROUP, LEFT, MEANS, SHIFT, SHIFTS, SPREADS

LOWER = 1 << 40  # from the first byte on, the state stays in [LOWER, 256 * LOWER)


class Predictors:
    """Says which of a channel's tables codes a symbol, from those coded before; `symbols` may be filled in meanwhile."""

    SEEN = SHIFTS, SHIFTS[:1]

    def __init__(
        self, symbols: Sequence[int], weights: NDArray[int16], biases: NDArray[int32], centres: NDArray[uint8], plane: int, width: int, contexts: int
    ) -> None:
        self.symbols, self.plane, self.width, self.alone = symbols, plane, width, contexts == 1
        self.weights, self.biases, self.centres = weights.tolist(), biases.tolist(), centres.tolist()
        counts = [len(seen) * (channel % GROUP) + 2 for seen in self.SEEN for channel in range(len(self.centres))]
        self.starts = [0, *accumulate(counts)]  # of each channel's weights in the first part, then in the second

    def context(self, place: int) -> int:
        """Of the symbol at `place`."""
        if self.alone:
            return 0
        channel, index = divmod(place, self.plane)
        steps = (self._score(channel, index, part) >> SHIFT for part in (0, 1))
        mean, spread = (min(max(step, 0), count - 1) for step, count in zip(steps, (MEANS, SPREADS), strict=True))
        return mean * SPREADS + spread

    def _score(self, channel: int, index: int, part: int) -> int:
        """Of the symbol expected (`part` 0) or of how far off that will be (1)."""
        channels, height, (row, column) = len(self.centres), self.plane // self.width, divmod(index, self.width)
        first, last = self.starts[part * channels + channel : part * channels + channel + 2]
        weight = iter(self.weights[first:last])
        start = part * channels * (height + self.width)
        score: int = self.biases[start + channel * height + row] + self.biases[start + channels * height + channel * self.width + column]
        for earlier in range(channel - channel % GROUP, channel):
            for down, right in self.SEEN[part]:
                score += next(weight) * self._value(earlier, row + down, column + right, part)
        for down, right in (SHIFTS[LEFT], SHIFTS[ABOVE]):
            score += next(weight) * self._value(channel, row + down, column + right, part)
        return score

    def _value(self, channel: int, row: int, column: int, part: int) -> int:
        if not (0 <= row < self.plane // self.width and 0 <= column < self.width):
            return 0
        symbol = self.symbols[channel * self.plane + row * self.width + column]
        return abs(symbol - self.centres[channel]) if part else symbol


def encode(
    symbols: bytes,
    freqs: NDArray[uint16],
    starts: NDArray[uint16],
    slots: NDArray[uint16],
    weights: NDArray[int16],
    biases: NDArray[int32],
    centres: NDArray[uint8],
    plane: int,
    levels: int,
    precision: int,
    width: int,
    contexts: int,
) -> bytes:
    """Code `symbols` (channel after channel, `plane` each, in rows of `width`), last one first.

    Raises:
        ValueError: a symbol of `levels` or more.
    """
    freq, start, slot = freqs.ravel().tolist(), starts.ravel().tolist(), slots.ravel().tolist()
    if max(symbols) >= levels:
        raise ValueError("a symbol is out of range")
    predictors = Predictors(symbols, weights, biases, centres, plane, width, contexts)
    state = 0
    tail = bytearray()
    for place in range(len(symbols) - 1, -1, -1):
        row, symbol = place // plane * contexts + predictors.context(place), symbols[place]
        f = freq[row * levels + symbol]
        limit = f * (256 * LOWER >> precision)
        while state >= limit:
            tail.append(state & 255)
            state >>= 8
        quotient, rank = divmod(state, f)
        state = (quotient << precision) + slot[(row << precision) + start[row * levels + symbol] + rank]
    return state.to_bytes((state.bit_length() + 7) // 8, "big") + bytes(reversed(tail))


def decode(
    payload: bytes,
    freqs: NDArray[uint16],
    entries: NDArray[uint32],
    weights: NDArray[int16],
    biases: NDArray[int32],
    centres: NDArray[uint8],
    plane: int,
    levels: int,
    precision: int,
    width: int,
    contexts: int,
) -> bytes:
    """The inverse of `encode`: one symbol per byte, channels x plane of them.

    Raises:
        ValueError: `encode` cannot have written this payload.
    """
    if payload[:1] == b"\0":
        raise ValueError("the first byte is zero")
    freq, entry = freqs.ravel().tolist(), entries.ravel().tolist()
    symbols = bytearray(len(freq) // levels // contexts * plane)
    predictors = Predictors(symbols, weights, biases, centres, plane, width, contexts)
    state = position = 0
    mask = (1 << precision) - 1
    for place in range(len(symbols)):
        while state < LOWER and position < len(payload):
            state = state << 8 | payload[position]
            position += 1
        row = place // plane * contexts + predictors.context(place)
        packed = entry[(row << precision) + (state & mask)]
        symbols[place] = packed & 255
        state = (state >> precision) * freq[row * levels + symbols[place]] + (packed >> 8)
    if state or position < len(payload):
        raise ValueError("bytes are left over")
    return bytes(symbols)
