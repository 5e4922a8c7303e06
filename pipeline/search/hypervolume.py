"""Hypervolume: how much of what would be better than doing without a search a set of candidates covers, as one number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import moocore  # type: ignore[import-untyped]
import numpy as np


class Measured(Protocol):
    """What is compared of a measurement."""

    @property
    def accuracy(self) -> float: ...

    @property
    def total_ms(self) -> float: ...

    @property
    def wire_bytes(self) -> float: ...


@dataclass(frozen=True)
class Box:
    """Two corners in (top-1 accuracy, total ms, wire bytes): the reference point, which a candidate must beat to count, and what counts as 1.

    Latency and bytes are taken as logarithms, bytes of at least one, so that sending nothing is finite; between the corners each axis runs from 0 to 1.
    """

    reference: tuple[float, float, float]
    best: tuple[float, float, float]

    @classmethod
    def around(cls, reference: tuple[float, float, float], measurements: Iterable[Measured]) -> Box:
        """From `reference` to the best that any of `measurements` has on each axis: for fronts that are to be compared, their union."""
        found = [reference, *((m.accuracy, m.total_ms, m.wire_bytes) for m in measurements)]
        return cls(reference, (max(row[0] for row in found), min(row[1] for row in found), min(row[2] for row in found)))

    def losses(self, measurements: Iterable[Measured]) -> np.ndarray:
        """(N, 3), 1 at the reference and 0 at the best."""
        reference, best = _axes(*self.reference), _axes(*self.best)
        spans = [worst - good or 1.0 for worst, good in zip(reference, best, strict=True)]  # an axis without extent holds no volume
        rows = [
            [(value - good) / span for value, good, span in zip(_axes(m.accuracy, m.total_ms, m.wire_bytes), best, spans, strict=True)] for m in measurements
        ]
        return np.array(rows, dtype=np.float64).reshape(-1, len(spans))


def _axes(accuracy: float, total_ms: float, wire_bytes: float) -> tuple[float, float, float]:
    return -accuracy, math.log(total_ms), math.log(max(wire_bytes, 1.0))


def hypervolume(measurements: Sequence[Measured], box: Box) -> float:
    """Volume between the reference and what `measurements` dominate, in units of `box`; 0 where none beats the reference on every axis."""
    losses = box.losses(measurements)
    inside = losses[(losses < 1).all(axis=1)]
    return float(moocore.hypervolume(inside, ref=[1.0, 1.0, 1.0])) if len(inside) else 0.0
