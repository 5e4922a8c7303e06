"""What is measured of a device beside its networks: preprocessing, image codecs by format and quality, and the entropy coder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import ProfileError
from pipeline.runtime.images import LOSSLESS, Format


class Spread(NamedTuple):
    """A median and the quartiles around it, in ms."""

    median_ms: float
    low_ms: float
    high_ms: float

    def scaled(self, factor: float) -> Spread:
        return Spread(*(ms * factor for ms in self))

    def rounded(self) -> list[float]:
        """To four digits, as a profile keeps them."""
        return [float(f"{ms:.4g}") for ms in self]

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Spread:
        low, median, high = np.percentile(np.asarray(samples_ms, dtype=np.float64), [25, 50, 75])
        return cls(float(median), float(low), float(high))

    @classmethod
    def checked(cls, values: Any, where: str, *, positive: bool = False) -> Spread:
        """`values` as [median, low, high].

        Raises:
            ValueError: they are no such three times; `positive`: or the median is 0.
        """
        if not isinstance(values, list) or len(values) != 3:
            raise ValueError(f"{where} is not [median, low, high]")
        spread = cls(*(checked_ms(value, where) for value in values))
        if not spread.low_ms <= spread.median_ms <= spread.high_ms:
            raise ValueError(f"{where} is {values!r}, not a median and the quartiles around it")
        if positive and not spread.median_ms:
            raise ValueError(f"{where} takes no time")
        return spread


def checked_ms(value: Any, where: str) -> float:
    """`value` as a time.

    Raises:
        ValueError: it is negative, not finite or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{where} is {value!r}, not a number of 0 or more")
    return float(value)


Codec = Mapping[Format, Mapping[int, Spread]]


@dataclass(frozen=True)
class ImageTimes:
    """Images of one size: `preprocess` takes uint8 pixels to the network's float input; `encode` and `decode` go by format and quality."""

    preprocess: Spread
    encode: Codec
    decode: Codec

    def encode_ms(self, image_format: Format, quality: int) -> float:
        """Pixels to a file.

        Raises:
            ProfileError: the format was not measured.
        """
        return _at_quality(self.encode, image_format, quality)

    def decode_ms(self, image_format: Format, quality: int) -> float:
        """A file to pixels.

        Raises:
            ProfileError: the format was not measured.
        """
        return _at_quality(self.decode, image_format, quality)

    def scaled(self, factor: float) -> ImageTimes:
        def each(codec: Codec) -> Codec:
            return {name: {quality: spread.scaled(factor) for quality, spread in by_quality.items()} for name, by_quality in codec.items()}

        return ImageTimes(self.preprocess.scaled(factor), each(self.encode), each(self.decode))

    def to_dict(self) -> dict[str, Any]:
        def each(codec: Codec) -> dict[str, Any]:
            return {name: {str(quality): spread.rounded() for quality, spread in by_quality.items()} for name, by_quality in codec.items()}

        return {"preprocess": self.preprocess.rounded(), "encode": each(self.encode), "decode": each(self.decode)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], where: str) -> ImageTimes:
        def each(side: str) -> Codec:
            return {
                name: {int(quality): Spread.checked(ms, f"{where} {side} {name} {quality}") for quality, ms in by_quality.items()}
                for name, by_quality in fields[side].items()
            }

        times = cls(Spread.checked(fields["preprocess"], f"{where} preprocess"), each("encode"), each("decode"))
        for side, codec in (("encode", times.encode), ("decode", times.decode)):
            for name, by_quality in codec.items():
                if not by_quality:
                    raise ValueError(f"{where} {side} {name} has no quality")
        return times


def _at_quality(codec: Codec, image_format: Format, quality: int) -> float:
    """As measured, or between the nearest measured qualities; WebP's lossless mode is another coder, and PNG knows no quality."""
    if image_format not in codec:
        raise ProfileError(f"the profile has no times of {image_format} images, only {', '.join(codec) or 'none'}; measure it again, or send another format.")
    by_quality = codec[image_format]
    if quality in by_quality:
        return by_quality[quality].median_ms
    lossy = sorted(q for q in by_quality if q != LOSSLESS or image_format != "webp") or list(by_quality)
    return float(np.interp(quality, lossy, [by_quality[q].median_ms for q in lossy]))


def between(images: Mapping[int, ImageTimes], size: int) -> ImageTimes:
    """The times at `size`: as measured, or in proportion to the pixels between the two nearest sizes; beyond the outermost, in proportion to its pixels."""
    if size in images:
        return images[size]
    below, above = (max((s for s in images if s < size), default=0), min((s for s in images if s > size), default=0))
    if not (below and above):
        nearest = below or above
        return images[nearest].scaled(size**2 / nearest**2)
    share = (size**2 - below**2) / (above**2 - below**2)
    few, many = images[below], images[above]

    def mixed(a: Spread, b: Spread) -> Spread:
        return Spread(*((1 - share) * x + share * y for x, y in zip(a, b, strict=True)))

    def each(a: Codec, b: Codec) -> Codec:
        return {name: {quality: mixed(a[name][quality], b[name][quality]) for quality in a[name] if quality in b[name]} for name in a if name in b}

    return ImageTimes(mixed(few.preprocess, many.preprocess), each(few.encode, many.encode), each(few.decode, many.decode))


@dataclass(frozen=True)
class CoderTimes:
    """The entropy coder with framing: `fixed + per_symbol * symbols`, each way; `implementation` is c or python."""

    implementation: str
    encode_fixed_ms: float
    encode_per_symbol_ms: float
    decode_fixed_ms: float
    decode_per_symbol_ms: float

    def encode_ms(self, symbols: int) -> float:
        return self.encode_fixed_ms + self.encode_per_symbol_ms * symbols

    def decode_ms(self, symbols: int) -> float:
        return self.decode_fixed_ms + self.decode_per_symbol_ms * symbols

    def scaled(self, factor: float) -> CoderTimes:
        times = (self.encode_fixed_ms, self.encode_per_symbol_ms, self.decode_fixed_ms, self.decode_per_symbol_ms)
        return CoderTimes(self.implementation, *(ms * factor for ms in times))

    def to_dict(self) -> dict[str, Any]:
        return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CoderTimes:
        names = ("encode_fixed_ms", "encode_per_symbol_ms", "decode_fixed_ms", "decode_per_symbol_ms")
        return cls(str(fields["implementation"]), *(checked_ms(fields[name], f"coder.{name}") for name in names))
