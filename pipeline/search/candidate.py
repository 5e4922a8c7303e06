"""One point of the search space (where to cut, how much to prune, how to code what crosses) and what was measured of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pipeline.errors import ParamsError
from pipeline.runtime.images import FORMATS, LOSSLESS, Format

INPUT = "input"
OUTPUT = "output"

Kind = Literal["split", "edge-only", "device-only"]
Precision = Literal["fp32", "int8"]
IMAGE_NAMES: Mapping[Format, str] = {"webp": "WebP", "jpeg": "JPEG", "jpeg-bare": "JPEG-bare", "png": "PNG"}
CODECS = ("uniform", "codebook", "rate", "multi-rate", "raw-8bit", "raw-fp32", "jscc-awgn", "jscc-bec", "jscc-bsc")


@dataclass(frozen=True)
class Candidate:
    """A way to run the classifier across device and edge.

    `cut` names a `CutPoint`; `input` sends the image itself in `image_format` (one of `FORMATS`, WebP if it names none) at `quality` (100 = lossless,
    which PNG always and JPEG never is), `output` sends nothing.
    `keep` pairs groups of channels (`Pruner.groups`), or whole blocks, with the kept fraction of their channels; what is kept whole is left out, so
    equal candidates compare equal; 0 drops a block that a shortcut goes past, whose own groups are then not named. `Space` proposes each network once.
    `codec` is one of `CODECS`, of a split that names none the first; `rate_weight`, the loss per coded bit it is trained with, belongs to `rate` alone.
    `precision` is the device half's, of a split. `points` are the operating points (channels, bits) of codec `multi-rate`, the first of which is measured.

    Raises:
        ParamsError: a combination that cannot run, named.
    """

    cut: str
    keep: tuple[tuple[str, float], ...] = ()
    code_channels: int | None = None
    stride: int | None = None
    bits: int | None = None
    quality: int | None = None
    codec: str | None = None
    rate_weight: float | None = None
    precision: Precision = "fp32"
    points: tuple[tuple[int, int], ...] = ()
    image_format: Format | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple(tuple(point) for point in self.points))
        coded = (self.code_channels, self.stride, self.bits)
        if self.kind == "split":
            if any(value is None for value in coded) or self.quality is not None or self.image_format is not None:
                raise ParamsError(f"candidate at cut {self.cut}: a split needs code_channels, stride and bits and takes no quality or image_format.")
            assert self.bits is not None
            assert self.stride is not None
            assert self.code_channels is not None
            if not 1 <= self.bits <= 8:
                raise ParamsError(f"candidate at cut {self.cut}: bits is {self.bits}; choose 1 to 8.")
            if self.stride not in (1, 2, 4, 8):
                raise ParamsError(f"candidate at cut {self.cut}: stride is {self.stride}; choose 1, 2, 4 or 8.")
            if self.code_channels < 1:
                raise ParamsError(f"candidate at cut {self.cut}: code_channels is {self.code_channels}; choose 1 or more.")
            object.__setattr__(self, "codec", self.codec or CODECS[0])
            if self.codec not in CODECS:
                raise ParamsError(f"candidate at cut {self.cut}: codec is {self.codec}; choose one of {', '.join(CODECS)}.")
            if (self.codec == "rate") != (self.rate_weight is not None and 0 <= self.rate_weight < math.inf):
                raise ParamsError(f"candidate at cut {self.cut}: codec {self.codec} with rate_weight {self.rate_weight}; rate takes 0 or more, others none.")
            for point in self.points:
                if len(point) != 2 or any(type(n) is not int for n in point) or not (1 <= point[0] <= self.code_channels and 1 <= point[1] <= 8):
                    raise ParamsError(f"candidate at cut {self.cut}: point {point}; give channels, 1 to {self.code_channels}, and bits, 1 to 8.")
            if bool(self.points) != (self.codec == "multi-rate"):
                raise ParamsError(f"candidate at cut {self.cut}: codec {self.codec} with {len(self.points)} points; multi-rate has some, others none.")
            if self.precision not in get_args(Precision):
                raise ParamsError(f"candidate at cut {self.cut}: precision is {self.precision}; choose one of {', '.join(get_args(Precision))}.")
        elif any(value is not None for value in (*coded, self.codec, self.rate_weight)) or self.precision != "fp32" or self.points:
            raise ParamsError(f"candidate at cut {self.cut}: only a split has code_channels, stride, bits, codec and precision.")
        if self.kind == "edge-only":
            self._check_image()
        if self.kind == "device-only" and (self.quality is not None or self.image_format is not None):
            raise ParamsError("candidate at cut output: nothing is sent, so there is no quality or image_format to choose.")
        if self.kind == "edge-only" and self.keep:
            raise ParamsError("candidate at cut input: there is no device half to prune.")
        for block, ratio in self.keep:
            if not 0 <= ratio <= 1:
                raise ParamsError(f"candidate at cut {self.cut}: keep ratio of {block} is {ratio}; choose a fraction of at most 1, 0 to drop the block.")
        if len(dict(self.keep)) < len(self.keep):
            raise ParamsError(f"candidate at cut {self.cut}: a block or group has two keep ratios; give one.")
        object.__setattr__(self, "keep", tuple(sorted((block, ratio) for block, ratio in self.keep if ratio < 1)))

    def _check_image(self) -> None:
        object.__setattr__(self, "image_format", self.image_format or FORMATS[0])
        if self.image_format not in FORMATS:
            raise ParamsError(f"candidate at cut input: image_format is {self.image_format}; choose one of {', '.join(FORMATS)}.")
        if self.quality is None or not fits_format(self.image_format, self.quality):
            raise ParamsError(f"candidate at cut input: quality is {self.quality}; choose 1 to 99, or 100 for lossless WebP or PNG.")

    @property
    def kind(self) -> Kind:
        return "edge-only" if self.cut == INPUT else "device-only" if self.cut == OUTPUT else "split"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "keep": dict(self.keep), "points": [list(point) for point in self.points]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Candidate:
        """The candidate that `to_dict` wrote.

        Raises:
            ParamsError: a key or value that is no candidate's.
        """
        try:
            return cls(**{**fields, "keep": tuple(dict(fields.get("keep") or {}).items())})
        except (TypeError, ValueError) as error:
            raise ParamsError(f"candidate {dict(fields)}: {error}.") from error

    def label(self) -> str:
        """A short name a person can read."""
        if self.kind == "edge-only":
            assert self.image_format is not None
            return f"{IMAGE_NAMES[self.image_format]} {'lossless' if self.quality == LOSSLESS else f'q{self.quality}'}"
        pruned = f" keep {sum(r for _, r in self.keep) / len(self.keep):.2f}" if self.keep else ""
        if self.kind == "device-only":
            return f"device-only{pruned}"
        codec = f" {self.codec}" * (self.codec != CODECS[0]) + (f" {self.rate_weight:g}" if self.rate_weight is not None else "")
        precision = f" {self.precision}" * (self.precision != "fp32")
        return f"{self.cut} {self.code_channels}ch /{self.stride} {self.bits}bit{codec}{pruned}{precision}"


def fits_format(image_format: Format, quality: int) -> bool:
    """Whether images can be sent so: 100 is lossless, which PNG always and JPEG never is."""
    lossless = quality == LOSSLESS
    return 1 <= quality <= LOSSLESS and {"webp": True, "png": lossless}.get(image_format, not lossless)


@dataclass(frozen=True)
class Measurement:
    """What a candidate costs and how well it classifies; every number is over the validation split or predicted from the profiles.

    `accuracy` is top-1 in [0, 1]. Sizes are means per image (METHODS 1): coded payload, frame, and bytes on the wire.
    Times are predicted (METHODS 4); `link_ms` holds the round trip and the reply. MACs, parameters and memory are the device's,
    memory being fp32 weights plus the largest activation, in MB (1e6 bytes); the bundle's networks hold `bundle_mb` of weights.
    """

    accuracy: float
    device_ms: float
    encode_ms: float
    link_ms: float
    decode_ms: float
    edge_ms: float
    total_ms: float
    payload_bits: float
    frame_bytes: float
    wire_bytes: float
    energy_mj: float
    device_macs: int
    device_params: int
    device_memory_mb: float
    bundle_mb: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
