"""Timing by part, with a slower machine emulated (METHODS 1)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

REHEARSALS = 3


class Stopwatch:
    """Adds up milliseconds by part."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)

    def part(self, name: str) -> Part:
        return Part(self.parts, name)


class Part:
    """Adds the milliseconds of a block to `parts`, unless it fails; a generator would take several times as long as this, in every request."""

    def __init__(self, parts: dict[str, float], name: str) -> None:
        self._parts, self._name = parts, name

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._parts[self._name] += (time.perf_counter() - self._start_s) * 1e3


def timed(work: Callable[[Stopwatch], Result], slowdown: float = 1.0) -> tuple[Result, dict[str, float]]:
    """What `work` returns and its milliseconds by part, on a machine `slowdown` times slower: both come that much later, by busy-waiting.

    A fast processor that has waited, even busily, runs its next calls up to three times slower than those in a row that a profile holds. That does
    not grow with a machine's slowness and must not be multiplied by it. So one wait follows all parts instead of one each, and before them,
    in the time to be waited anyway, `work` is done without being timed, `REHEARSALS` times or as often as fits.
    """
    begin = time.perf_counter()
    for _ in range(min(REHEARSALS, int(slowdown) - 1)):
        work(Stopwatch())
    watch = Stopwatch()
    result = work(watch)
    parts = {name: slowdown * ms for name, ms in watch.parts.items()}
    if slowdown > 1:
        end = begin + sum(parts.values()) / 1e3
        while time.perf_counter() < end:
            pass
    return result, parts
