"""The Python twin of `_rans.c`: the same functions, the same bytes, used where the extension was not built.

Both work on flat tables of `contexts` rows per channel, as `CodecTables` derives them: `freqs` and `starts` (levels entries a row),
`slots` (2**precision entries a row: where occurrence `starts[s] + r` of a symbol lies) and `entries` (its inverse: symbol | r << 8).
Where there are several contexts, `weights`, `biases` and `centres` are those of a `ContextModel`.
The state starts at 0 and has no lower bound until the first byte leaves it, so nothing is spent on a flush.
"""

from __future__ import annotations

import numpy as np
from numpy import int16, int32, uint8, uint16, uint32
from numpy.typing import NDArray

from pipeline.runtime.context import GROUP, OF_DISTANCES, OF_SYMBOLS, SHIFT, SPREADS

LOWER = 1 << 40  # from the first byte on, the state stays in [LOWER, 256 * LOWER)


class Predictors:
    """Says which of a channel's tables codes a symbol, from those entered before; where there is one it says 0."""

    def __init__(self, weights: NDArray[int16], biases: NDArray[int32], centres: NDArray[uint8], plane: int, width: int) -> None:
        channels, height = len(centres), plane // width
        self.plane, self.width, self.centres = plane, width, centres.tolist()
        self.values = np.zeros((2, channels, height + 2, width + 2), np.int64)  # symbols, and how far from their channel's centre, in a border of zeros
        self.weights = weights.astype(np.int64)
        rows, columns = np.split(biases.astype(np.int64).reshape(2, -1), [channels * height], 1)
        self.biases = rows.reshape(2, channels, height, 1) + columns.reshape(2, channels, 1, width)
        self.channel = -1
        self.scores: list[tuple[list[list[int]], int, int]] = []

    def enter(self, place: int, symbol: int) -> None:
        if self.centres:
            channel, index = divmod(place, self.plane)
            row, column = divmod(index, self.width)
            self.values[:, channel, row + 1, column + 1] = symbol, abs(symbol - self.centres[channel])

    def context(self, place: int) -> int:
        """Of the symbol at `place`; all of the channels before it are entered, and those to the left of it and above it."""
        if not self.centres:
            return 0
        channel, index = divmod(place, self.plane)
        if channel != self.channel:
            self._expect(channel)
        row, column = divmod(index, self.width)
        steps = []
        for values, (scores, left, above), count in zip(self.values[:, channel], self.scores, (OF_SYMBOLS.steps, OF_DISTANCES.steps), strict=True):
            step = (scores[row][column] + left * int(values[row + 1, column]) + above * int(values[row, column + 1])) >> SHIFT
            steps.append(min(max(step, 0), count - 1))
        return steps[0] * SPREADS + steps[1]

    def _expect(self, channel: int) -> None:
        """Take in what the channels before `channel` say of its places."""
        self.channel, self.scores = channel, []
        earlier, (height, width) = channel % GROUP, self.biases.shape[2:]
        of_earlier, own = self.weights[channel, :-4].reshape(-1, GROUP)[:, :earlier], self.weights[channel, -4:].tolist()
        for part, (view, weights) in enumerate(((OF_SYMBOLS, of_earlier[:-1]), (OF_DISTANCES, of_earlier[-1:]))):
            scores = self.biases[part, channel].copy()
            for each, (down, right) in zip(weights, view.places[: view.of_earlier], strict=True):
                planes = self.values[part, channel - earlier : channel, 1 + down : 1 + down + height, 1 + right : 1 + right + width]
                scores += np.tensordot(each, planes, 1)
            self.scores.append((scores.tolist(), *own[2 * part : 2 * part + 2]))


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
    freq, start = freqs.tolist(), starts.tolist()
    if max(symbols) >= levels:
        raise ValueError("a symbol is out of range")
    predictors = Predictors(weights, biases, centres, plane, width)
    for place, symbol in enumerate(symbols):
        predictors.enter(place, symbol)
    state = 0
    tail = bytearray()
    for place in range(len(symbols) - 1, -1, -1):
        row, symbol = place // plane * contexts + predictors.context(place), symbols[place]
        f = freq[row][symbol]
        limit = f * (256 * LOWER >> precision)
        while state >= limit:
            tail.append(state & 255)
            state >>= 8
        quotient, rank = divmod(state, f)
        state = (quotient << precision) + int(slots[row, start[row][symbol] + rank])
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
    freq = freqs.tolist()
    symbols = bytearray(len(freq) // contexts * plane)
    predictors = Predictors(weights, biases, centres, plane, width)
    state = position = 0
    mask = (1 << precision) - 1
    for place in range(len(symbols)):
        while state < LOWER and position < len(payload):
            state = state << 8 | payload[position]
            position += 1
        row = place // plane * contexts + predictors.context(place)
        packed = int(entries[row, state & mask])
        symbols[place] = packed & 255
        predictors.enter(place, symbols[place])
        state = (state >> precision) * freq[row][symbols[place]] + (packed >> 8)
    if state or position < len(payload):
        raise ValueError("bytes are left over")
    return bytes(symbols)
