"""The Python twin of `_rans.c`: the same functions, the same bytes, used where the extension was not built.

Both work on flat tables of `contexts` rows per channel, as `CodecTables` derives them: `freqs` and `starts` (levels entries a row),
`slots` (2**precision entries a row: where occurrence `starts[s] + r` of a symbol lies) and `entries` (its inverse: symbol | r << 8).
The state starts at 0 and has no lower bound until the first byte leaves it, so nothing is spent on a flush.
"""

from __future__ import annotations

from collections.abc import Sequence

from numpy import uint16, uint32
from numpy.typing import NDArray

LOWER = 1 << 40  # from the first byte on, the state stays in [LOWER, 256 * LOWER)


def context(symbols: Sequence[int], place: int, plane: int, levels: int, width: int, contexts: int) -> int:
    """Which of its channel's tables codes the symbol at `place`.

    The last for the first symbol of a plane, else by the sum of the symbols to the left and above, the other standing in for one that is not there.
    """
    index = place % plane
    if contexts == 1:
        return 0
    if not index:
        return contexts - 1
    left = symbols[place - 1] if index % width else symbols[place - width]
    above = symbols[place - width] if index >= width else symbols[place - 1]
    return (left + above) * (contexts - 1) // (2 * levels - 1)


def encode(
    symbols: bytes,
    freqs: NDArray[uint16],
    starts: NDArray[uint16],
    slots: NDArray[uint16],
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
    state = 0
    tail = bytearray()
    for place in range(len(symbols) - 1, -1, -1):
        row, symbol = place // plane * contexts + context(symbols, place, plane, levels, width, contexts), symbols[place]
        f = freq[row * levels + symbol]
        limit = f * (256 * LOWER >> precision)
        while state >= limit:
            tail.append(state & 255)
            state >>= 8
        quotient, rank = divmod(state, f)
        state = (quotient << precision) + slot[(row << precision) + start[row * levels + symbol] + rank]
    return state.to_bytes((state.bit_length() + 7) // 8, "big") + bytes(reversed(tail))


def decode(payload: bytes, freqs: NDArray[uint16], entries: NDArray[uint32], plane: int, levels: int, precision: int, width: int, contexts: int) -> bytes:
    """The inverse of `encode`: one symbol per byte, channels x plane of them.

    Raises:
        ValueError: `encode` cannot have written this payload.
    """
    if payload[:1] == b"\0":
        raise ValueError("the first byte is zero")
    freq, entry = freqs.ravel().tolist(), entries.ravel().tolist()
    symbols = bytearray(len(freq) // levels // contexts * plane)
    state = position = 0
    mask = (1 << precision) - 1
    for place in range(len(symbols)):
        while state < LOWER and position < len(payload):
            state = state << 8 | payload[position]
            position += 1
        row = place // plane * contexts + context(symbols, place, plane, levels, width, contexts)
        packed = entry[(row << precision) + (state & mask)]
        symbols[place] = packed & 255
        state = (state >> precision) * freq[row * levels + symbols[place]] + (packed >> 8)
    if state or position < len(payload):
        raise ValueError("bytes are left over")
    return bytes(symbols)
