"""DeviceProfile: what one device and runtime were measured to take, as versioned JSON others can contribute (METHODS 4)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import ProfileError
from pipeline.files import atomic_write_json

if TYPE_CHECKING:
    from models.cutting import CutPoint

SCHEMA_VERSION = 1
LOSSLESS = 100
MACS_TOLERANCE = 0.05
AGAIN = "measure it again with `python -m pipeline.cli measure --into profiles/NAME.json`"
MEASURE_ADVICE = "set the device's profile to `measure` in params.yaml, or run `python -m pipeline.cli measure --into profiles/NAME.json`"


class Spread(NamedTuple):
    """A median and the quartiles around it, in ms."""

    median_ms: float
    low_ms: float
    high_ms: float

    def scaled(self, factor: float) -> Spread:
        return Spread(*(ms * factor for ms in self))


class Point(NamedTuple):
    """What a module of `macs` multiply-accumulates took, call overhead taken off."""

    macs: int
    median_ms: float
    low_ms: float
    high_ms: float

    def scaled(self, factor: float) -> Point:
        return Point(self.macs, *(ms * factor for ms in self[1:]))


def interpolate_ms(points: Sequence[Point], macs: float) -> float:
    """Median at `macs`, linear between the two nearest measured points and constant beyond the outermost."""
    return float(np.interp(macs, [point.macs for point in points], [point.median_ms for point in points]))


@dataclass(frozen=True)
class Block:
    """The layers between the previous cut and the cut `name`, whose crossing tensor has `shape`; `points` by rising MACs, the last unpruned."""

    name: str
    shape: tuple[int, ...]
    points: tuple[Point, ...]


@dataclass(frozen=True)
class BackboneProfile:
    """All that was measured for one backbone at one input shape.

    `call_overhead` is one ONNX Runtime call that computes nothing; it is already taken off `blocks`, `encoder` and `decoder`, not off `full`.
    `encoder` and `decoder` hold a grid of code widths and strides for every feature shape, written CxHxW.
    `webp_encode` goes by quality (100 = lossless); `preprocess` takes uint8 pixels
    of the right size to the network's float input.
    """

    call_overhead: Spread
    blocks: tuple[Block, ...]
    full: Point
    encoder: Mapping[str, tuple[Point, ...]]
    decoder: Mapping[str, tuple[Point, ...]]
    preprocess: Spread
    webp_encode: Mapping[int, Spread]
    webp_decode: Spread

    @property
    def sum_over_full(self) -> float:
        """Blocks measured alone over the whole network measured at once: 1 when cutting costs the runtime no optimisation."""
        return sum(block.points[-1].median_ms for block in self.blocks) / (self.full.median_ms - self.call_overhead.median_ms)

    def blocks_up_to(self, cut: str) -> tuple[Block, ...]:
        """The blocks on the device side of `cut`.

        Raises:
            ProfileError: there is no such cut.
        """
        names = ["input", *(block.name for block in self.blocks)]
        if cut not in names:
            raise ProfileError(f"the profile has no cut {cut}; it has {', '.join(names)}.")
        return self.blocks[: names.index(cut)]

    def half_ms(self, block_macs: Mapping[str, float]) -> float:
        """One ONNX Runtime call that computes the named blocks at the given MACs, in ms.

        A block that computes nothing any more takes no time. Blocks measured alone pay for layout changes at their borders, so their sum is scaled to
        the whole network measured at once; all blocks unpruned thus give `full`.

        Raises:
            ProfileError: a block that was not measured.
        """
        points = {block.name: block.points for block in self.blocks}
        unknown = sorted(set(block_macs) - set(points))
        if unknown:
            raise ProfileError(f"the profile has no block {unknown[0]}; it has {', '.join(points)}.")
        return (
            self.call_overhead.median_ms
            + sum(interpolate_ms(points[name], macs) for name, macs in block_macs.items() if macs or not points[name][-1].macs) / self.sum_over_full
        )

    def codec_ms(self, side: str, cut: str, macs: float) -> float:
        """The `encoder` or `decoder` convolutions (with quantisation) at `cut`, in ms without a call overhead.

        Raises:
            ProfileError: no such cut, or its feature takes no codec.
        """
        blocks = self.blocks_up_to(cut)
        shape = shape_key(blocks[-1].shape) if blocks else "input"
        grid = self.encoder if side == "encoder" else self.decoder
        if shape not in grid:
            raise ProfileError(f"the profile has no {side} for the feature at cut {cut} ({shape}); cut where the feature is still an image.")
        return interpolate_ms(grid[shape], macs)

    def webp_encode_ms(self, quality: int) -> float:
        """WebP at `quality`: lossless as measured, lossy interpolated between the measured qualities, in ms."""
        if quality == LOSSLESS and LOSSLESS in self.webp_encode:
            return self.webp_encode[LOSSLESS].median_ms
        lossy = sorted(q for q in self.webp_encode if q != LOSSLESS) or [LOSSLESS]
        return float(np.interp(quality, lossy, [self.webp_encode[q].median_ms for q in lossy]))

    def scaled(self, factor: float) -> BackboneProfile:
        def each(grid: Mapping[str, tuple[Point, ...]]) -> dict[str, tuple[Point, ...]]:
            return {shape: tuple(point.scaled(factor) for point in points) for shape, points in grid.items()}

        return BackboneProfile(
            call_overhead=self.call_overhead.scaled(factor),
            blocks=tuple(replace(block, points=tuple(point.scaled(factor) for point in block.points)) for block in self.blocks),
            full=self.full.scaled(factor),
            encoder=each(self.encoder),
            decoder=each(self.decoder),
            preprocess=self.preprocess.scaled(factor),
            webp_encode={quality: spread.scaled(factor) for quality, spread in self.webp_encode.items()},
            webp_decode=self.webp_decode.scaled(factor),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "call_overhead": _rounded(self.call_overhead),
            "blocks": [{"name": block.name, "shape": list(block.shape), "points": [_rounded(point) for point in block.points]} for block in self.blocks],
            "full": _rounded(self.full),
            "sum_over_full": round(self.sum_over_full, 4),
            "encoder": {shape: [_rounded(point) for point in points] for shape, points in self.encoder.items()},
            "decoder": {shape: [_rounded(point) for point in points] for shape, points in self.decoder.items()},
            "preprocess": _rounded(self.preprocess),
            "webp_encode": {str(quality): _rounded(spread) for quality, spread in self.webp_encode.items()},
            "webp_decode": _rounded(self.webp_decode),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BackboneProfile:
        profile = cls(
            call_overhead=_spread(fields["call_overhead"], "call_overhead"),
            blocks=tuple(Block(str(b["name"]), tuple(int(n) for n in b["shape"]), _points(b["points"], f"block {b['name']}")) for b in fields["blocks"]),
            full=_points([fields["full"]], "full")[0],
            encoder={shape: _points(points, f"encoder {shape}") for shape, points in fields["encoder"].items()},
            decoder={shape: _points(points, f"decoder {shape}") for shape, points in fields["decoder"].items()},
            preprocess=_spread(fields["preprocess"], "preprocess"),
            webp_encode={int(quality): _spread(ms, f"webp_encode {quality}") for quality, ms in fields["webp_encode"].items()},
            webp_decode=_spread(fields["webp_decode"], "webp_decode"),
        )
        if not profile.webp_encode:
            raise ValueError("webp_encode has no quality")
        if profile.full.median_ms <= profile.call_overhead.median_ms:
            raise ValueError("full takes no longer than a call that computes nothing")
        if not sum(block.points[-1].median_ms for block in profile.blocks) > 0:
            raise ValueError("the blocks take no time")
        return profile


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


@dataclass(frozen=True)
class DeviceProfile:
    """Measured medians of one device and runtime at a stated thread count; `backbones` goes by `backbone_key`.

    `slowdown` is the factor by which every time was multiplied to stand in for a slower device (METHODS 1); 1 is as measured.
    `channel_block` is the multiple to which pruned widths are best rounded.
    """

    name: str
    runtime: str
    threads: int
    machine: Mapping[str, str]
    coder: CoderTimes
    backbones: Mapping[str, BackboneProfile]
    slowdown: float = 1.0
    channel_block: int = 1

    def backbone(self, key: str) -> BackboneProfile:
        """What was measured for `key`.

        Raises:
            ProfileError: nothing was.
        """
        if key not in self.backbones:
            raise ProfileError(f"profile {self.name} has no {key}, only {', '.join(sorted(self.backbones)) or 'nothing'}; {MEASURE_ADVICE}.")
        return self.backbones[key]

    def check_cuts(self, key: str, cuts: Sequence[CutPoint]) -> None:
        """Compare the measured blocks with the cut points (input first) of the backbone at hand.

        Raises:
            ProfileError: other names, or block MACs that differ by more than 5 % of the network (a classifier with other classes passes).
        """
        blocks = self.backbone(key).blocks
        if [block.name for block in blocks] != [cut.name for cut in cuts[1:]]:
            theirs, ours = {block.name for block in blocks}, {cut.name for cut in cuts[1:]}
            odd = sorted(theirs ^ ours) or ["their order"]
            raise ProfileError(
                f"profile {self.name} was measured on another {key} or with other search.cuts: they differ in {', '.join(odd[:3])}; {MEASURE_ADVICE}."
            )
        for block, before, cut in zip(blocks, cuts[:-1], cuts[1:], strict=True):
            if abs(block.points[-1].macs - (cut.macs - before.macs)) > MACS_TOLERANCE * cuts[-1].macs:
                raise ProfileError(
                    f"profile {self.name} was measured on another {key}: block {block.name} had {block.points[-1].macs} MACs there "
                    f"and has {cut.macs - before.macs} here; {MEASURE_ADVICE}."
                )

    def slowed(self, factor: float) -> DeviceProfile:
        """This device, `factor` times slower in everything it computes."""
        return replace(
            self,
            slowdown=self.slowdown * factor,
            coder=self.coder.scaled(factor),
            backbones={key: backbone.scaled(factor) for key, backbone in self.backbones.items()},
        )

    def only(self, key: str) -> DeviceProfile:
        """This profile without the other backbones.

        Raises:
            ProfileError: `key` was not measured.
        """
        return replace(self, backbones={key: self.backbone(key)})

    def merged(self, newer: DeviceProfile) -> DeviceProfile:
        """This profile with the backbones of `newer` added or replaced, and its coder times.

        Raises:
            ProfileError: the two come from different machines, runtimes or thread counts.
        """
        for field in ("machine", "runtime", "threads", "slowdown", "channel_block"):
            mine, theirs = getattr(self, field), getattr(newer, field)
            if mine != theirs:
                raise ProfileError(f"profile {self.name} has {field} {mine} but this measurement {theirs}; measure into another file.")
        return replace(newer, name=self.name, backbones={**self.backbones, **newer.backbones})

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "runtime": self.runtime,
            "threads": self.threads,
            "machine": dict(self.machine),
            "slowdown": self.slowdown,
            "channel_block": self.channel_block,
            "coder": {key: round(value, 9) if isinstance(value, float) else value for key, value in vars(self.coder).items()},
            "backbones": {key: backbone.to_dict() for key, backbone in self.backbones.items()},
        }

    @classmethod
    def from_dict(cls, fields: Any, where: str = "the profile") -> DeviceProfile:
        """Check and read `fields` as `to_dict` made them.

        Raises:
            ProfileError: another schema version, a missing field, or a time that is negative or not a number.
        """
        if not isinstance(fields, dict) or fields.get("schema_version") != SCHEMA_VERSION:
            version = fields.get("schema_version") if isinstance(fields, dict) else None
            raise ProfileError(f"{where} has schema version {version}, this program reads {SCHEMA_VERSION}; {AGAIN}.")
        try:
            coder = fields["coder"]
            times = [_ms(coder[key], f"coder.{key}") for key in ("encode_fixed_ms", "encode_per_symbol_ms", "decode_fixed_ms", "decode_per_symbol_ms")]
            return cls(
                name=str(fields["name"]),
                runtime=str(fields["runtime"]),
                threads=int(fields["threads"]),
                machine={str(key): str(value) for key, value in fields["machine"].items()},
                coder=CoderTimes(str(coder["implementation"]), *times),
                backbones={key: BackboneProfile.from_dict(backbone) for key, backbone in fields["backbones"].items()},
                slowdown=_ms(fields["slowdown"], "slowdown"),
                channel_block=int(fields["channel_block"]),
            )
        except KeyError as error:
            raise ProfileError(f"{where} lacks {error.args[0]}; {AGAIN}.") from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ProfileError(f"{where} is wrong: {error}; {AGAIN}.") from None

    def save(self, path: Path) -> None:
        """Write the profile whole or not at all."""
        atomic_write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> DeviceProfile:
        """Read and check `path`.

        Raises:
            ProfileError: the file is missing, is not JSON, or is not a profile.
        """
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError:
            raise ProfileError(f"profile {path} is missing; {MEASURE_ADVICE}.") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ProfileError(f"profile {path} cannot be read ({error}); {MEASURE_ADVICE}.") from None
        return cls.from_dict(fields, f"profile {path}")


def backbone_key(name: str, image_size: int) -> str:
    """How a profile names a backbone at an input shape, for example resnet20@3x32x32."""
    return f"{name}@3x{image_size}x{image_size}"


def shape_key(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)


def _rounded(times: Spread | Point) -> list[float]:
    return [value if isinstance(value, int) else round(value, 6) for value in times]


def _ms(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{where} is {value!r}, not a number of 0 or more")
    return float(value)


def _spread(values: Sequence[Any], where: str) -> Spread:
    if len(values) != 3:
        raise ValueError(f"{where} is not [median, low, high]")
    return Spread(*(_ms(value, where) for value in values))


def _points(rows: Sequence[Sequence[Any]], where: str) -> tuple[Point, ...]:
    if not rows or any(len(row) != 4 for row in rows):
        raise ValueError(f"{where} is not a list of [macs, median, low, high]")
    points = tuple(Point(int(_ms(row[0], f"{where} macs")), *(_ms(value, where) for value in row[1:])) for row in rows)
    if any(a.macs >= b.macs for a, b in itertools.pairwise(points)):
        raise ValueError(f"{where} is not in order of rising MACs")
    return points
