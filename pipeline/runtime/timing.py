"""Timing by part, with a slower machine emulated (METHODS 1)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Adds up milliseconds by part; after each timed call of t ms it busy-waits (slowdown - 1) * t more, which count too."""

    def __init__(self, slowdown: float = 1.0) -> None:
        self._slowdown = slowdown
        self.parts: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        now = time.perf_counter()
        end = start + self._slowdown * (now - start)
        while now < end:
            now = time.perf_counter()
        self.parts[name] += (now - start) * 1e3
