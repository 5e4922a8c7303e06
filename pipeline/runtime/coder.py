"""Entropy coding of integer symbols: rANS over one static integer table per channel.

A table spreads each symbol's slots evenly over 0 .. 2**precision - 1, the r-th slot of a symbol with frequency f lying below
(r + 1) * 2**precision / f (earliest deadline first, always possible since the frequencies add up to 2**precision). Encoding from state 0 then
keeps state + 1 <= product of 2**precision / f, so the state never has more bits than the cross-entropy and the payload, whole bytes without
leading zeros, is **less than 8 bits above the cross-entropy** for every stream, however short. Renormalising adds less than 3e-8 bits a byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BundleError, FrameError

try:
    from pipeline.runtime._rans import decode as _decode
    from pipeline.runtime._rans import encode as _encode

    HAVE_C = True
except ImportError:
    from pipeline.runtime.rans_twin import decode as _decode
    from pipeline.runtime.rans_twin import encode as _encode

    HAVE_C = False

MAX_PRECISION = 14
MAX_CHANNELS = 1 << 16


@dataclass(frozen=True)
class CodecTables:
    """Static distributions of `bits`-bit symbols: one row of 2**bits integer frequencies per channel, each row adding up to 2**precision.

    Raises:
        BundleError: tables no coder can use.
    """

    bits: int
    precision: int
    freqs: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        good = 1 <= self.bits <= 8 and self.bits <= self.precision <= MAX_PRECISION and 1 <= len(self.freqs) <= MAX_CHANNELS
        if not good or any(len(row) != self.levels or min(row) < 1 or sum(row) != 1 << self.precision for row in self.freqs):
            raise BundleError(
                f"codec tables of {len(self.freqs)} channels, {self.bits} bits and precision {self.precision} are not a distribution per channel; "
                "export the bundle again."
            )

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @cached_property
    def freq_array(self) -> NDArray[np.uint16]:
        """Frequencies, uint16 (channels, levels)."""
        return np.array(self.freqs, dtype=np.uint16)

    @cached_property
    def start_array(self) -> NDArray[np.uint16]:
        """Where each symbol's occurrences begin in a row of `slot_array`, uint16 (channels, levels)."""
        ends = np.cumsum(self.freq_array, axis=1, dtype=np.int64)
        return np.asarray(ends - self.freq_array, dtype=np.uint16)

    @cached_property
    def slot_array(self) -> NDArray[np.uint16]:
        """The slot of every occurrence of every symbol, uint16 (channels, 2**precision)."""
        order = np.stack([np.argsort(self._deadlines(row), kind="stable") for row in self.freq_array])
        slots = np.empty_like(order, dtype=np.uint16)
        np.put_along_axis(slots, order, np.arange(order.shape[1], dtype=np.uint16)[None], axis=1)
        return slots

    @cached_property
    def entry_array(self) -> NDArray[np.uint32]:
        """The inverse of `slot_array`: symbol | rank << 8 of every slot, uint32 (channels, 2**precision)."""
        entries = np.empty(self.slot_array.shape, dtype=np.uint32)
        for row, slots, out in zip(self.freq_array, self.slot_array, entries, strict=True):
            symbols, ranks = self._occurrences(row)
            out[slots] = symbols | ranks << 8
        return entries

    def _occurrences(self, row: NDArray[np.uint16]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        symbols = np.repeat(np.arange(self.levels), row)
        return symbols, np.arange(symbols.size) - np.repeat(np.cumsum(row, dtype=np.int64) - row, row)

    def _deadlines(self, row: NDArray[np.uint16]) -> NDArray[np.int64]:
        symbols, ranks = self._occurrences(row)
        return ((ranks + 1) << self.precision) // row.astype(np.int64)[symbols]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "freqs": [list(row) for row in self.freqs]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CodecTables:
        """Read back what `to_dict` wrote.

        Raises:
            BundleError: a key is missing, of the wrong kind, or the tables are not distributions.
        """
        try:
            rows = tuple(tuple(row) for row in fields["freqs"])
            numbers = [fields["bits"], fields["precision"], *(value for row in rows for value in row)]
            if any(type(value) is not int for value in numbers):
                raise TypeError("a value is not an integer")
            return cls(fields["bits"], fields["precision"], rows)
        except (KeyError, TypeError) as error:
            raise BundleError(f"codec tables cannot be used ({error!r}); export the bundle again.") from error


def build_tables(symbols: NDArray[np.uint8], bits: int) -> CodecTables:
    """The add-one smoothed distribution of each channel of `symbols`, uint8 (N, h, H, W), rounded to integers that lose least.

    Raises:
        BundleError: `bits` outside 1..8, no symbols, or a symbol of 2**bits or more.
    """
    if not 1 <= bits <= 8 or symbols.ndim != 4 or symbols.size == 0 or symbols.max() >= 1 << bits:
        raise BundleError(f"tables of {bits} bits cannot be built from symbols of shape {symbols.shape}; give (N, h, H, W) symbols below 2**bits, bits 1 to 8.")
    precision = max(12, bits + 6)
    rows = []
    for channel in range(symbols.shape[1]):
        counts = np.bincount(symbols[:, channel].ravel(), minlength=1 << bits).astype(np.int64) + 1
        rows.append(_rounded(counts, 1 << precision))
    return CodecTables(bits, precision, tuple(rows))


def _rounded(counts: NDArray[np.int64], total: int) -> tuple[int, ...]:
    """Integers of at least 1 that add up to `total`, as near to proportional to `counts` as a greedy choice gets."""
    freqs = np.maximum(counts * total // counts.sum(), 1)
    while (missing := total - int(freqs.sum())) != 0:
        if missing > 0:  # one more is worth most where count/frequency is highest
            freqs[np.argmax(counts / freqs)] += 1
        else:
            freqs[np.argmin(np.where(freqs > 1, counts / np.maximum(freqs - 1, 1), np.inf))] -= 1
    return tuple(int(value) for value in freqs)


def _check_shape(shape: tuple[int, ...], tables: CodecTables) -> int:
    if len(shape) != 3 or shape[0] != len(tables.freqs) or min(shape) < 1:
        raise BundleError(
            f"symbols of shape {tuple(shape)} do not fit codec tables of {len(tables.freqs)} channels; the halves and the codec do not belong together."
        )
    return shape[1] * shape[2]


def encode(symbols: NDArray[np.uint8], tables: CodecTables) -> bytes:
    """Code `symbols`, uint8 (h, H, W), in less than 8 bits above `entropy_bits`.

    Raises:
        BundleError: the symbols do not fit the tables.
    """
    plane = _check_shape(symbols.shape, tables)
    flat = np.ascontiguousarray(symbols, dtype=np.uint8).tobytes()
    try:
        return _encode(flat, tables.freq_array, tables.start_array, tables.slot_array, plane, tables.levels, tables.precision)
    except ValueError as error:
        raise BundleError(f"symbols do not fit codec tables of {tables.bits} bits ({error}); the device half and the codec do not belong together.") from error


def decode(payload: bytes, shape: tuple[int, int, int], tables: CodecTables) -> NDArray[np.uint8]:
    """The symbols, uint8 `shape` = (h, H, W), that `encode` turned into `payload`; no other payload is accepted.

    Raises:
        FrameError: `encode` cannot have written this payload.
        BundleError: `shape` does not fit the tables.
    """
    plane = _check_shape(shape, tables)
    try:
        flat = _decode(payload, tables.freq_array, tables.entry_array, plane, tables.levels, tables.precision)
    except ValueError as error:
        raise FrameError(f"payload of {len(payload)} bytes does not hold {math.prod(shape)} coded symbols ({error}); send the image again.") from error
    return np.frombuffer(flat, dtype=np.uint8).reshape(shape)


def entropy_bits(symbols: NDArray[np.uint8], tables: CodecTables) -> float:
    """Cross-entropy of `symbols`, uint8 (h, H, W), under the tables, in bits."""
    plane = _check_shape(symbols.shape, tables)
    channels = np.repeat(np.arange(len(tables.freqs)), plane)
    freqs = tables.freq_array[channels, symbols.ravel()].astype(np.float64)
    return float(np.sum(tables.precision - np.log2(freqs)))
