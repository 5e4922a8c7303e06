"""DeviceProfile: what one device and runtime were measured to take, as versioned JSON others can contribute, and what it foresees from that (METHODS 4)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from models.operations import Operation
from pipeline.costs.fused import kernel_calls
from pipeline.costs.kernel_call import KernelCall
from pipeline.costs.latency_model import KernelTime, LatencyModel, RunTime
from pipeline.costs.measured_times import CoderTimes, ImageTimes, Spread, between, checked_ms
from pipeline.errors import ProfileError
from pipeline.files import atomic_write_text

SCHEMA_VERSION = 2
MACS_TOLERANCE = 0.05
AGAIN = "measure it again with `python -m pipeline.cli profile --into profiles/NAME.json`"
MEASURE_ADVICE = "set the device's profile to `measure` in params.yaml, or run `python -m pipeline.cli profile --into profiles/NAME.json`"
CALL_COLUMNS = tuple(field.name for field in dataclasses.fields(KernelCall))

Precision = Literal["fp32", "int8"]


@dataclass(frozen=True)
class WholeNetwork:
    """A backbone measured as a whole: its MACs for one image, and the time of a call by precision."""

    macs: int
    ms: Mapping[str, Spread]


@dataclass(frozen=True)
class DeviceProfile:
    """What one device and runtime took at a stated thread count: medians and quartiles, in ms, as measured.

    `nchwc_block` is the number of channels that the runtime's convolutions hold together there, 0 where layouts are plain; `channel_block` is the multiple to
    which pruned widths are best rounded, since a convolution is hardly faster between two of them. `kernels` are single kernels by ONNX Runtime's own
    profile, `runs` whole calls of a session. `images` goes by image size, `networks` by `backbone_key`. `slowdown` is the factor by which every time that
    the methods give is multiplied to stand in for a slower device (METHODS 1), 1 being as measured; the fields themselves are without it.
    """

    name: str
    runtime: str
    threads: int
    machine: Mapping[str, str]
    nchwc_block: int
    channel_block: int
    kernels: Mapping[KernelCall, Spread]
    runs: Sequence[RunTime]
    images: Mapping[int, ImageTimes]
    networks: Mapping[str, WholeNetwork]
    coder: CoderTimes
    slowdown: float = 1.0

    @cached_property
    def _model(self) -> LatencyModel:
        return _fitted(tuple(KernelTime(call, spread.median_ms) for call, spread in self.kernels.items()), tuple(self.runs))

    def half_ms(self, operations: Sequence[Operation], precision: Precision = "fp32") -> float:
        """One call of a session that computes `operations` on one image, in ms: predicted, from kernels and runs like its own (`LatencyModel`)."""
        return self.slowdown * self._model.run_ms(kernel_calls(operations, precision, block=self.nchwc_block))

    def least_ms(self, macs: float, precision: Precision = "fp32") -> float:
        """At most what `half_ms` predicts for any half of so many multiply-accumulates or more; see `LatencyModel.least_ms`."""
        return self.slowdown * self._model.least_ms(macs, integers=precision == "int8")

    def network(self, key: str, precision: Precision = "fp32") -> Spread | None:
        """The measured time of a whole backbone, if it was measured in this precision."""
        known = self.networks.get(key)
        return known.ms[precision].scaled(self.slowdown) if known and precision in known.ms else None

    @property
    def coder_times(self) -> CoderTimes:
        return self.coder.scaled(self.slowdown)

    def image(self, size: int) -> ImageTimes:
        """Preprocessing and image codecs at `size` x `size` pixels; for a size not measured, in proportion to the pixels between the nearest that were.

        Raises:
            ProfileError: no size was measured.
        """
        if not self.images:
            raise ProfileError(f"profile {self.name} has no image sizes; {AGAIN}.")
        return between(self.images, size).scaled(self.slowdown)

    def remark(self, key: str, macs: int) -> str | None:
        """Why predictions for the backbone `key`, of `macs` MACs, are less sure with this profile; None if it was measured with this very backbone.

        Anything is predicted, from kernels like those that were measured; a classifier with other classes passes as the same.
        """
        known = self.networks.get(key)
        if known is None:
            has = f"only {', '.join(sorted(self.networks))}" if self.networks else "no backbone"
            return f"profile {self.name} was measured with {has}, not with {key}, so its predictions are less sure; for better ones, {MEASURE_ADVICE}."
        if abs(known.macs - macs) > MACS_TOLERANCE * macs:
            return (
                f"profile {self.name} was measured with another {key}, of {known.macs} MACs where this one has {macs}, so its predictions are less sure; "
                f"for better ones, {MEASURE_ADVICE}."
            )
        return None

    def slowed(self, factor: float) -> DeviceProfile:
        """This device, `factor` times slower in everything it computes."""
        return replace(self, slowdown=self.slowdown * factor)

    def only(self, size: int) -> DeviceProfile:
        """This profile for images of `size` x `size` alone: their codecs, by `image` if that size was not measured, and the backbones at that size.

        Raises:
            ProfileError: no image size was measured.
        """
        images = {size: replace(self, slowdown=1.0).image(size)}
        return replace(self, images=images, networks={key: network for key, network in self.networks.items() if key.endswith(backbone_key("", size))})

    def merged(self, newer: DeviceProfile) -> DeviceProfile:
        """This profile with what `newer` has added or replaced.

        Raises:
            ProfileError: the two come from different machines, runtimes, coders or thread counts.
        """
        for field in ("machine", "runtime", "threads", "slowdown", "nchwc_block", "channel_block"):
            mine, theirs = getattr(self, field), getattr(newer, field)
            if mine != theirs:
                raise self._differs(field, mine, theirs)
        if self.coder.implementation != newer.coder.implementation:
            raise self._differs("coder", self.coder.implementation, newer.coder.implementation)
        return replace(
            newer,
            name=self.name,
            kernels={**self.kernels, **newer.kernels},
            runs=tuple({run.calls: run for run in (*self.runs, *newer.runs)}.values()),
            images={**self.images, **newer.images},
            networks={**self.networks, **newer.networks},
        )

    def _differs(self, what: str, mine: Any, theirs: Any) -> ProfileError:
        return ProfileError(f"profile {self.name} has {what} {mine} but this measurement {theirs}; measure into another file.")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: kernels as a table, runs as the numbers of their kernels in it; times to four digits."""
        calls = list(dict.fromkeys([*self.kernels, *(call for run in self.runs for call in run.calls)]))
        number = {call: index for index, call in enumerate(calls)}
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "runtime": self.runtime,
            "threads": self.threads,
            "machine": dict(self.machine),
            "slowdown": self.slowdown,
            "nchwc_block": self.nchwc_block,
            "channel_block": self.channel_block,
            "coder": self.coder.to_dict(),
            "images": {str(size): times.to_dict() for size, times in self.images.items()},
            "networks": {
                key: {"macs": network.macs, **{precision: spread.rounded() for precision, spread in network.ms.items()}}
                for key, network in self.networks.items()
            },
            "kernels": {
                "columns": [*CALL_COLUMNS, *Spread._fields],
                "rows": [[*_row(call), *(self.kernels[call].rounded() if call in self.kernels else [None] * 3)] for call in calls],
            },
            "runs": {
                "columns": ["kernels", *Spread._fields],
                "rows": [[[number[call] for call in run.calls], *Spread(run.median_ms, run.low_ms, run.high_ms).rounded()] for run in self.runs],
            },
        }

    @classmethod
    def from_dict(cls, fields: Any, where: str = "the profile") -> DeviceProfile:
        """Check and read `fields` as `to_dict` made them.

        Raises:
            ProfileError: another schema version, a missing field, a time that is negative or not a number, or another number that cannot be.
        """
        if not isinstance(fields, dict) or fields.get("schema_version") != SCHEMA_VERSION:
            version = fields.get("schema_version") if isinstance(fields, dict) else None
            raise ProfileError(f"{where} has schema version {version}, this program reads {SCHEMA_VERSION}; {AGAIN}.")
        try:
            calls, kernels = _kernels(fields["kernels"])
            return cls(
                name=str(fields["name"]),
                runtime=str(fields["runtime"]),
                threads=_whole(fields, "threads", 1),
                machine={str(key): str(value) for key, value in fields["machine"].items()},
                nchwc_block=_whole(fields, "nchwc_block", 0),
                channel_block=_whole(fields, "channel_block", 1),
                kernels=kernels,
                runs=_runs(fields["runs"], calls),
                images={int(size): ImageTimes.from_dict(times, f"images {size}") for size, times in fields["images"].items()},
                networks={key: _network(network, f"network {key}") for key, network in fields["networks"].items()},
                coder=CoderTimes.from_dict(fields["coder"]),
                slowdown=_slowdown(fields["slowdown"]),
            )
        except KeyError as error:
            raise ProfileError(f"{where} lacks {error.args[0]}; {AGAIN}.") from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ProfileError(f"{where} is wrong: {error}; {AGAIN}.") from None

    def save(self, path: Path) -> None:
        """Write the profile whole or not at all."""
        atomic_write_text(path, _text(self.to_dict()))

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


@lru_cache(maxsize=2)  # device and edge of one file, whatever their slowdowns, are one model, which takes seconds to fit
def _fitted(kernels: tuple[KernelTime, ...], runs: tuple[RunTime, ...]) -> LatencyModel:
    return LatencyModel(kernels, runs)


def _whole(fields: Mapping[str, Any], name: str, least: int) -> int:
    if type(fields[name]) is not int or fields[name] < least:
        raise ValueError(f"{name} is {fields[name]!r}, not a whole number of {least} or more")
    return int(fields[name])


def _slowdown(value: Any) -> float:
    if not checked_ms(value, "slowdown"):
        raise ValueError("slowdown is 0")
    return float(value)


def _row(call: KernelCall) -> list[Any]:
    written = call.to_dict()
    return [written.get(name) for name in CALL_COLUMNS]


def _kernels(table: Mapping[str, Any]) -> tuple[list[KernelCall], dict[KernelCall, Spread]]:
    """Every kernel in the order of the rows, and the times of those measured alone."""
    if list(table["columns"]) != [*CALL_COLUMNS, *Spread._fields]:
        raise ValueError(f"kernels has the columns {', '.join(map(str, table['columns']))}")
    calls, times = [], {}
    for number, row in enumerate(table["rows"]):
        if len(row) != len(table["columns"]):
            raise ValueError(f"kernel {number} has {len(row)} columns of {len(table['columns'])}")
        named = zip(CALL_COLUMNS, row[: len(CALL_COLUMNS)], strict=True)
        call = KernelCall.from_dict({name: value for name, value in named if value is not None})
        if not call.inputs or not all(_is_shape(shape) for shape in (*call.inputs, call.output, call.weights, call.kernel, call.strides)):
            raise ValueError(f"kernel {number} ({call.op}) has a shape that is not a list of whole numbers, or no inputs")
        calls.append(call)
        if row[-3:] != [None] * 3:
            times[call] = Spread.checked(row[-3:], f"kernel {number} ({call.op})", positive=True)
    return calls, times


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(side) is int for side in value)


def _runs(table: Mapping[str, Any], calls: Sequence[KernelCall]) -> tuple[RunTime, ...]:
    runs = []
    for number, (kernels, *times) in enumerate(table["rows"]):
        if any(type(index) is not int or not 0 <= index < len(calls) for index in kernels):
            raise ValueError(f"run {number} calls kernels {kernels} of {len(calls)}")
        runs.append(RunTime(tuple(calls[index] for index in kernels), *Spread.checked(times, f"run {number}", positive=True)))
    return tuple(runs)


def _network(fields: Mapping[str, Any], where: str) -> WholeNetwork:
    times = {precision: Spread.checked(ms, f"{where} {precision}", positive=True) for precision, ms in fields.items() if precision != "macs"}
    if not math.isfinite(fields["macs"]) or fields["macs"] < 0:
        raise ValueError(f"{where} macs is {fields['macs']!r}")
    return WholeNetwork(int(fields["macs"]), times)


def _text(fields: Mapping[str, Any]) -> str:
    """`fields` as JSON that a person can read and a diff can follow: a line for each field, and for each row of a table."""

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)

    def lines(value: Any, depth: int) -> str:
        if isinstance(value, dict) and value and depth < 3:
            inside = ",\n".join(f"{' ' * depth}{json.dumps(key)}: {lines(value[key], depth + 1)}" for key in sorted(value))
            return f"{{\n{inside}\n{' ' * (depth - 1)}}}"
        if isinstance(value, list) and any(isinstance(item, list) for item in value):
            return "[\n" + ",\n".join(compact(item) for item in value) + "\n]"
        return compact(value)

    return lines(dict(fields), 1) + "\n"
