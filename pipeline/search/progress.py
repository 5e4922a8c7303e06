"""How far a search has come: best so far and hypervolume by evaluation, as a table that lives on the terminal and as one that stays."""

from __future__ import annotations

import io
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from csv import DictWriter
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.table import Table

from pipeline.search.executor import Executor
from pipeline.search.hypervolume import Box, hypervolume
from pipeline.search.limits import Limits
from pipeline.search.pareto import MEASURED, Trial, cheapest, feasible, non_dominated

LATENCY_SPAN = 100  # a front that is this many times faster than the device alone fills its axis of the hypervolume
RECENT = 20  # evaluations that the time left is estimated from


@dataclass(frozen=True)
class Point:
    """Where a search stood after so many `evaluations` beyond the baselines: its hypervolume, and the least of what it minimises, if anything is feasible."""

    evaluations: int
    hypervolume: float
    best: float | None


class Progress:
    """Follows a search trial by trial.

    The hypervolume is that of the feasible trials between the accuracy floor, the latency of the device alone and `raw_bytes`, those of an uncompressed
    image on the wire, and a fixed corner, so it never falls.
    """

    def __init__(self, limits: Limits, minimize: str, raw_bytes: float, baselines: int) -> None:
        self.limits, self.minimize, self.raw_bytes, self.baselines = limits, minimize, raw_bytes, baselines
        self.evaluations = self.failed = self.repeated = 0
        self.best: Trial | None = None
        self.front: list[Trial] = []
        self._box: Box | None = None
        self.hypervolume = 0.0

    def tell(self, trial: Trial) -> Point:
        """Take note of a trial; gives where the search stands now."""
        self.repeated += trial.duplicate_of is not None
        self.failed += trial.duplicate_of is None and trial.measurement is None
        self.evaluations += trial.duplicate_of is None and trial.number >= self.baselines
        measured = trial.measurement
        if self._box is None and measured is not None and trial.candidate.kind == "device-only" and not trial.candidate.keep:
            reference = self.limits.floor, measured.total_ms, self.raw_bytes
            self._box = Box(reference, (1.0, measured.total_ms / LATENCY_SPAN, 1.0))
        if good := feasible([trial], self.limits):
            self.best = cheapest([*([self.best] if self.best else []), *good], self.minimize)
            self.front = non_dominated([*self.front, *good])
            if self._box is not None:
                self.hypervolume = hypervolume([t.measurement for t in self.front if t.measurement is not None], self._box)
        return Point(self.evaluations, self.hypervolume, self.best_value)

    @property
    def best_value(self) -> float | None:
        return None if self.best is None else float(getattr(self.best.measurement, MEASURED[self.minimize]))

    def history(self, trials: Iterable[Trial]) -> list[Point]:
        """Where a search of `trials`, in their order, stood after the baselines and after each evaluation; of a fresh `Progress`."""
        last = {(point := self.tell(trial)).evaluations: point for trial in trials}
        return list(last.values())


def progress_csv(points: Iterable[Point]) -> str:
    """A row for each number of evaluations; no best where nothing was feasible yet."""
    text = io.StringIO()
    writer = DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in asdict(point).items()} for point in points)
    return text.getvalue()


def learning_csv(history: Sequence[Mapping[str, Any]]) -> str:
    """A row for each trial that an agent learned from, no reward where it failed, no sigma while it warmed up; none at all where nothing learns."""
    text = io.StringIO()
    writer = DictWriter(text, ["number", "cut", "weight", "reward", "sigma"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in history)
    return text.getvalue()


class LiveTable:
    """Shows a `Progress` on stderr while the block runs, if that is a terminal; the time left by what `executor` evaluates meanwhile."""

    def __init__(self, title: str, progress: Progress, trials: int, executor: Executor) -> None:
        self._title, self._progress, self._trials, self._executor = title, progress, trials, executor
        self._arrivals: deque[float] = deque([time.monotonic()], RECENT + 1)
        self._seen = self._finished = 0
        self._live = Live(get_renderable=self._table, console=Console(stderr=True), transient=True, refresh_per_second=2) if sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self) -> None:
        """Take note of a trial that `progress` was told of."""
        now, evaluations, finished = time.monotonic(), self._progress.evaluations, self._executor.finished
        if evaluations > self._seen and finished > self._finished:
            self._arrivals.append(now)
        elif len(self._arrivals) == 1:
            self._arrivals[0] = now  # a baseline, or kept from an earlier run: what is timed is yet to come
        self._seen, self._finished = evaluations, finished

    def _table(self) -> Table:
        progress, table = self._progress, Table(title=self._title, show_header=False)
        best = "none is within the limits yet"
        if progress.best is not None:
            best = f"{progress.best.candidate.label()}: {progress.minimize} {progress.best_value:.4g}"
        table.add_row("best so far", best)
        table.add_row("hypervolume", f"{progress.hypervolume:.4f} by {len(progress.front)} candidates")
        table.add_row("evaluations", f"{progress.evaluations} of {self._trials} ({progress.failed} failed, {progress.repeated} proposals repeated)")
        table.add_row("time left", self._time_left())
        return table

    def _time_left(self) -> str:
        if len(self._arrivals) < 2:
            return "-"
        each = (self._arrivals[-1] - self._arrivals[0]) / (len(self._arrivals) - 1)
        left = max(0.0, each * (self._trials - self._progress.evaluations) - (time.monotonic() - self._arrivals[-1]))
        return f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}"


def counted(trials: Iterable[Trial], title: str, expected: int) -> Iterable[Trial]:
    """`trials` as they come, and how many of those `expected` came as a line on stderr, if that is a terminal."""
    return track(trials, title, expected, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
