"""What a device is measured with, and how often: profiles/measure.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ProfileError
from pipeline.runtime.bench import CoderWork, ImageWork, Repeats
from pipeline.runtime.images import FORMATS, Format


@dataclass(frozen=True)
class MeasurePlan:
    """A measurement's size.

    `chains` random small models show the device's kernels, `halves` random pruned device halves of the backbone (and `edge_halves` edge halves) how kernels
    add up in a run; `int8_halves` of the device halves are measured in int8 too. All these models are visited `passes` times, in other company each time,
    and all else once; each visit goes by `rounds`, `repeats`, `warmup` and `job_ms` (`Repeats`).
    Images are coded at `image_sizes` and the backbone's own, `qualities` by format; `coder_symbols` are two sizes of a code.
    """

    threads: int
    passes: int
    rounds: int
    repeats: int
    warmup: int
    job_ms: float
    chains: int
    halves: int
    edge_halves: int
    int8_halves: int
    image_sizes: tuple[int, ...]
    qualities: Mapping[Format, tuple[int, ...]]
    coder_symbols: tuple[int, int]

    @property
    def repeated(self) -> Repeats:
        return Repeats(self.threads, self.rounds, self.repeats, self.warmup, self.job_ms)

    @classmethod
    def load(cls, path: Path) -> MeasurePlan:
        """Read and check `path`.

        Raises:
            ProfileError: the plan is missing, or one of its numbers cannot be used.
        """
        try:
            given = json.loads(path.read_text())
            plan = cls(**{key: _frozen(value) for key, value in given.items()})
            plan._check()
        except FileNotFoundError:
            raise ProfileError(f"the measuring plan {path} is missing; take it from the repository.") from None
        except (OSError, UnicodeDecodeError, AttributeError, TypeError, ValueError, ProfileError) as error:
            raise ProfileError(f"the measuring plan {path} is wrong ({error}); take it from the repository.") from None
        return plan

    def _check(self) -> None:
        counts = {name: getattr(self, name) for name in ("passes", "chains", "halves", "edge_halves", "int8_halves")}
        for name, count in counts.items():
            if type(count) is not int or count < (1 if name == "passes" else 0):
                raise ValueError(f"{name} is {count!r}")
        if max(self.edge_halves, self.int8_halves) > self.halves:
            raise ValueError(f"there are no {max(self.edge_halves, self.int8_halves)} of {self.halves} halves to take")
        if not self.chains + self.halves:
            raise ValueError("chains and halves are 0, so there is nothing to predict from")
        few, many = self.coder_symbols
        if not 0 < few < many:
            raise ValueError(f"coder_symbols is {list(self.coder_symbols)}, not a few and more")
        if not self.qualities or any(not qualities for qualities in self.qualities.values()):
            raise ValueError(f"qualities has no number for one of {', '.join(self.qualities) or ', '.join(FORMATS)}")
        _ = self.repeated
        for symbols in self.coder_symbols:
            CoderWork("encode", symbols)
        for size in (*self.image_sizes, 1):
            for name, qualities in self.qualities.items():
                for quality in qualities:
                    ImageWork("encode", size, name, quality)


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value
