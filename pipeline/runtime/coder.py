"""Entropy coding of integer symbols: rANS over static integer tables, one per channel or several, chosen by the symbols coded before.

A table spreads each symbol's slots evenly over 0 .. 2**precision - 1, the r-th slot of a symbol with frequency f lying below
(r + 1) * 2**precision / f (earliest deadline first, always possible since the frequencies add up to 2**precision). Encoding from state 0 then
keeps state + 1 <= product of 2**precision / f, so the state never has more bits than the cross-entropy and the payload, whole bytes without
leading zeros, is **less than 8 bits above the cross-entropy** for every stream, however short. Renormalising adds less than 3e-8 bits a byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BundleError, FrameError
from pipeline.runtime.context import CONTEXTS, ContextModel, fit_contexts

try:
    from pipeline.runtime._rans import decode as _decode
    from pipeline.runtime._rans import encode as _encode

    HAVE_C = True
except ImportError:
    from pipeline.runtime.rans_twin import decode as _decode
    from pipeline.runtime.rans_twin import encode as _encode

    HAVE_C = False

MAX_PRECISION = 14
CONTEXT_PRIOR = 16.0
COUNTED_AT_ONCE = 256  # images: a symbol takes a byte, its place in the counts eight
MIDDLE = 128  # of what 8 bits can be
MAX_SLOTS = 1 << 27  # of all rows: they take two bytes each on the device, and on the edge four more


@dataclass(frozen=True)
class CodecTables:
    """Static distributions of `bits`-bit symbols: rows of 2**bits integer frequencies that each add up to 2**precision.

    Without a `model` each channel has one row; with one it has `contexts` rows, of which the model says which codes a symbol. `embedded` tables are for
    8-bit symbols of which only the first channels' most significant `bits` are sent; what is not sent comes back as the middle of what it can be.

    Raises:
        BundleError: tables no coder can use.
    """

    bits: int
    precision: int
    freqs: tuple[tuple[int, ...], ...]
    model: ContextModel | None = None
    embedded: bool = False

    def __post_init__(self) -> None:
        good = 1 <= self.bits <= 8 and self.bits <= self.precision <= MAX_PRECISION and 1 <= len(self.freqs) <= MAX_SLOTS >> self.precision
        good = good and (self.model is None or len(self.freqs) == CONTEXTS * len(self.model.centres))
        if not good or any(len(row) != self.levels or min(row) < 1 or sum(row) != 1 << self.precision for row in self.freqs):
            raise BundleError(
                f"codec tables of {len(self.freqs)} rows, {self.bits} bits and precision {self.precision} are not distributions; export the bundle again."
            )

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def contexts(self) -> int:
        """Rows of a channel."""
        return CONTEXTS if self.model else 1

    @property
    def channels(self) -> int:
        return len(self.freqs) // self.contexts

    def fit(self, shape: tuple[int, ...]) -> bool:
        """Whether symbols of `shape` can be coded by them."""
        fits = len(shape) == 3 and all(type(size) is int and size >= 1 for size in shape) and (self.model is None or shape[1:] == self.model.plane)
        return fits and (shape[0] >= self.channels if self.embedded else shape[0] == self.channels)

    @property
    def takes(self) -> str:
        """What they fit, in words."""
        return f"{self.channels} channels" + (f" of {' x '.join(map(str, self.model.plane))}" if self.model else "")

    @cached_property
    def predictor_arrays(self) -> tuple[NDArray[np.int16], NDArray[np.int32], NDArray[np.uint8]]:
        """Weights, biases and centres of the model, empty without one."""
        return self.model.arrays if self.model else (np.empty(0, np.int16), np.empty(0, np.int32), np.empty(0, np.uint8))

    @cached_property
    def freq_array(self) -> NDArray[np.uint16]:
        """Frequencies, uint16 (rows, levels)."""
        return np.array(self.freqs, dtype=np.uint16)

    @cached_property
    def start_array(self) -> NDArray[np.uint16]:
        """Where each symbol's occurrences begin in a row of `slot_array`, uint16 (rows, levels)."""
        ends = np.cumsum(self.freq_array, axis=1, dtype=np.int64)
        return np.asarray(ends - self.freq_array, dtype=np.uint16)

    @cached_property
    def slot_array(self) -> NDArray[np.uint16]:
        """The slot of every occurrence of every symbol, uint16 (rows, 2**precision)."""
        slots = np.empty((len(self.freqs), 1 << self.precision), np.uint16)
        for row, out in zip(self.freq_array, slots, strict=True):
            out[np.argsort(self._deadlines(row), kind="stable")] = np.arange(len(out), dtype=np.uint16)
        return slots

    @cached_property
    def entry_array(self) -> NDArray[np.uint32]:
        """The inverse of `slot_array`: symbol | rank << 8 of every slot, uint32 (rows, 2**precision)."""
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
        model = self.model.to_dict() if self.model else None
        return {"bits": self.bits, "precision": self.precision, "freqs": [list(row) for row in self.freqs], "model": model, "embedded": self.embedded}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CodecTables:
        """Read back what `to_dict` wrote.

        Raises:
            BundleError: a key is missing, of the wrong kind, or the tables are not distributions.
        """
        try:
            rows = tuple(tuple(row) for row in fields["freqs"])
            numbers = [fields["bits"], fields["precision"], *(value for row in rows for value in row)]
            model = ContextModel.from_dict(fields["model"]) if fields["model"] is not None else None
            if any(type(value) is not int for value in numbers) or type(fields["embedded"]) is not bool:
                raise TypeError("a value is of the wrong kind")
            return cls(fields["bits"], fields["precision"], rows, model, fields["embedded"])
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"codec tables cannot be used ({error!r}); export the bundle again.") from error


def fits_contexts(channels: int, bits: int) -> bool:
    """Whether tables with contexts of as many channels are not too many."""
    return CONTEXTS * channels <= MAX_SLOTS >> _precision(bits, contexts=True)


def _precision(bits: int, *, contexts: bool) -> int:
    return max(10, bits + 4) if contexts else max(12, bits + 6)  # many tables are to stay small


def _rows(symbols: NDArray[np.uint8], model: ContextModel | None) -> NDArray[np.int64]:
    """The row whose table codes each of `symbols`, uint8 (N, h, H, W): int64 of that shape."""
    channel = np.arange(symbols.shape[1])[:, None, None]
    return np.broadcast_to(channel, symbols.shape) if model is None else CONTEXTS * channel + model.contexts(symbols)


def build_embedded_tables(symbols: NDArray[np.uint8], channels: int, bits: int) -> CodecTables:
    """Tables for the first `channels` channels and the most significant `bits` of 8-bit `symbols`, uint8 (N, h, H, W), with contexts.

    Raises:
        BundleError: no symbols, or `bits` or `channels` out of range.
    """
    if not (1 <= bits <= 8 and symbols.ndim == 4 and symbols.size and 1 <= channels <= symbols.shape[1]):
        raise BundleError(f"embedded tables of {channels} channels and {bits} bits cannot be built from symbols of shape {symbols.shape}; choose fewer.")
    sent = _sent(symbols, channels, bits)
    return replace(build_tables(sent, bits, fit_contexts(sent) if fits_contexts(channels, bits) else None), embedded=True)


def _sent(symbols: NDArray[np.uint8], channels: int, bits: int) -> NDArray[np.uint8]:
    return symbols[..., :channels, :, :] >> np.uint8(8 - bits)


def as_received(symbols: NDArray[np.uint8], tables: CodecTables) -> NDArray[np.uint8]:
    """What `decode` gives for `symbols`, uint8 (..., h, H, W): themselves, or what `embedded` tables leave of them."""
    return _restored(_sent(symbols, tables.channels, tables.bits), symbols.shape, tables.bits) if tables.embedded else symbols


def _restored(sent: NDArray[np.uint8], shape: tuple[int, ...], bits: int) -> NDArray[np.uint8]:
    symbols = np.full(shape, MIDDLE, np.uint8)
    symbols[..., : sent.shape[-3], :, :] = (sent << np.uint8(8 - bits)) | np.uint8((MIDDLE >> bits) if bits < 8 else 0)
    return symbols


def build_tables(symbols: NDArray[np.uint8], bits: int, model: ContextModel | None = None) -> CodecTables:
    """The distribution of each channel of `symbols`, uint8 (N, h, H, W), in each context of `model`, rounded to integers that lose least.

    A channel's counts are smoothed by one for each level; those of a context by `CONTEXT_PRIOR` symbols of its channel's distribution.

    Raises:
        BundleError: `bits` outside 1..8, no symbols, or a symbol of 2**bits or more.
    """
    if not 1 <= bits <= 8 or symbols.ndim != 4 or symbols.size == 0 or symbols.max() >= 1 << bits:
        raise BundleError(f"tables of {bits} bits cannot be built from symbols of shape {symbols.shape}; give (N, h, H, W) symbols below 2**bits, bits 1 to 8.")
    levels, contexts = 1 << bits, CONTEXTS if model else 1
    precision = _precision(bits, contexts=model is not None)
    rows = symbols.shape[1] * contexts
    counts = np.zeros(rows * levels, np.int64)
    for start in range(0, len(symbols), COUNTED_AT_ONCE):
        part = symbols[start : start + COUNTED_AT_ONCE]
        counts += np.bincount((_rows(part, model) * levels + part).ravel(), minlength=rows * levels)
    counts = counts.reshape(symbols.shape[1], contexts, levels)
    whole = counts.sum(1, keepdims=True) + 1
    shares = whole if model is None else counts + CONTEXT_PRIOR * whole / whole.sum(2, keepdims=True)
    return CodecTables(bits, precision, tuple(_rounded(row, 1 << precision) for row in shares.reshape(rows, levels)), model)


def _rounded(counts: NDArray[Any], total: int) -> tuple[int, ...]:
    """Integers of at least 1 that add up to `total`, as near to proportional to `counts` as a greedy choice gets."""
    freqs = np.maximum(counts * total // counts.sum(), 1).astype(np.int64)
    while (missing := total - int(freqs.sum())) != 0:
        if missing > 0:  # one more is worth most where count/frequency is highest
            freqs[np.argmax(counts / freqs)] += 1
        else:
            freqs[np.argmin(np.where(freqs > 1, counts / np.maximum(freqs - 1, 1), np.inf))] -= 1
    return tuple(int(value) for value in freqs)


def _check_shape(shape: tuple[int, ...], tables: CodecTables) -> int:
    if not tables.fit(shape):
        raise BundleError(f"symbols of shape {tuple(shape)} do not fit codec tables of {tables.takes}; the halves and the codec do not belong together.")
    return shape[1] * shape[2]


def encode(symbols: NDArray[np.uint8], tables: CodecTables) -> bytes:
    """Code `symbols`, uint8 (h, H, W), in less than 8 bits above `entropy_bits`.

    Raises:
        BundleError: the symbols do not fit the tables.
    """
    plane = _check_shape(symbols.shape, tables)
    sent = _sent(symbols, tables.channels, tables.bits) if tables.embedded else symbols
    flat = np.ascontiguousarray(sent, dtype=np.uint8).tobytes()
    try:
        arrays = tables.freq_array, tables.start_array, tables.slot_array
        return _encode(flat, *arrays, *tables.predictor_arrays, plane, tables.levels, tables.precision, symbols.shape[2], tables.contexts)
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
        sizes = plane, tables.levels, tables.precision, shape[2], tables.contexts
        flat = _decode(payload, tables.freq_array, tables.entry_array, *tables.predictor_arrays, *sizes)
    except ValueError as error:
        raise FrameError(f"payload of {len(payload)} bytes does not hold {math.prod(shape)} coded symbols ({error}); send the image again.") from error
    sent = np.frombuffer(flat, dtype=np.uint8).reshape(tables.channels, *shape[1:])
    return _restored(sent, shape, tables.bits) if tables.embedded else sent


def entropy_bits(symbols: NDArray[np.uint8], tables: CodecTables) -> float:
    """Cross-entropy of `symbols`, uint8 (h, H, W), under the tables, in bits."""
    _check_shape(symbols.shape, tables)
    sent = _sent(symbols, tables.channels, tables.bits) if tables.embedded else symbols
    freqs = tables.freq_array[_rows(sent[None], tables.model)[0], sent].astype(np.float64)
    return float(np.sum(tables.precision - np.log2(freqs)))
