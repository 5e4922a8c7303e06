"""Where trials are evaluated: in the driver's own process, or by workers that may die and are replaced."""

from __future__ import annotations

import importlib
import json
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.errors import CoinferError, ModelError
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.pareto import not_finite

ATTEMPTS = 2
START_TIMEOUT_S = 120.0


class Measure(Protocol):
    """What a candidate is worth, by a trial with this seed; `rescores`: also where an estimate would do, by a training of its own."""

    def __call__(self, candidate: Candidate, trial_seed: int, *, rescores: bool = False) -> Measurement: ...


@dataclass(frozen=True)
class Job:
    """A trial to evaluate."""

    number: int
    candidate: Candidate
    seed: int
    rescores: bool = False

    def to_json(self) -> str:
        return json.dumps({**vars(self), "candidate": self.candidate.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields = json.loads(text)
        return cls(**{**fields, "candidate": Candidate.from_dict(fields["candidate"])})


@dataclass(frozen=True)
class Outcome:
    """What came of a job: a measurement, or why there is none."""

    number: int
    measurement: Measurement | None = None
    failure: str | None = None

    def to_json(self) -> str:
        measured = None if self.measurement is None else self.measurement.to_dict()
        return json.dumps({"number": self.number, "measurement": measured, "failure": self.failure})

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        fields = json.loads(text)
        measured = fields["measurement"]
        return cls(fields["number"], None if measured is None else Measurement(**measured), fields["failure"])


def evaluate(measure: Measure, job: Job) -> Outcome:
    """What `measure` makes of `job`; ModelError, ValueError, ArithmeticError, RuntimeError and numbers that are not finite are failures of the trial.

    Raises:
        CoinferError: memory ran out, which is no result of the trial: another day it may pass.
    """
    try:
        measured = measure(job.candidate, job.seed, rescores=job.rescores)
    except (ModelError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        # torch has no class of its own for it
        if isinstance(error, MemoryError) or (not isinstance(error, ModelError) and re.search("out of memory|allocate", str(error))):
            raise CoinferError(
                f"trial {job.number} ran out of memory ({one_line(error)}); earlier trials are kept, free some or take fewer workers and run again."
            ) from error
        return Outcome(job.number, failure=one_line(error))
    if wrong := not_finite(measured):
        return Outcome(job.number, failure=f"{', '.join(wrong)} came out as no finite number")
    return Outcome(job.number, measured)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Executor(Protocol):
    """Evaluates jobs, up to `workers` at a time; `finished` is how many it has."""

    workers: int
    finished: int

    def submit(self, job: Job) -> None: ...

    def next(self) -> Outcome:
        """Wait for one of the submitted jobs.

        Raises:
            CoinferError: no job can be evaluated any more, for the reason given.
        """

    def close(self) -> None:
        """Let go of all workers; jobs in flight are lost."""


class InProcess:
    """One job at a time, in the process of the driver."""

    workers = 1

    def __init__(self, measure: Measure) -> None:
        self._measure, self.finished = measure, 0
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)

    def next(self) -> Outcome:
        outcome = evaluate(self._measure, self._jobs.popleft())
        self.finished += 1
        return outcome

    def close(self) -> None:
        """There is nothing to let go of."""


@dataclass(frozen=True)
class Setup:
    """How a worker gets its `Measure`: `factory`, a function named `package.module:function`, called with `arguments`, plain JSON.

    `threads` are OpenMP's, and so torch's.
    """

    factory: str
    arguments: dict[str, Any]
    threads: int

    def to_json(self) -> str:
        return json.dumps(vars(self))


class Fleet(Protocol):
    """Starts workers and carries lines of text to and from them; a `Served` answers at the other end."""

    def start(self) -> int:
        """Start a worker and give its number; its first line says that it is ready."""

    def send(self, worker: int, line: str) -> None: ...

    def receive(self, timeout_s: float) -> tuple[int, str | None] | None:
        """The next line of any worker; no line if the worker died, nothing at all if time is over."""

    def close(self) -> None: ...


class Pool:
    """Workers of a fleet. One that dies costs its job a retry by another, with the same trial seed; a second death with the same job is a failed trial.

    Raises:
        CoinferError: by `next`: workers do not start, or one reports what no other trial would survive.
    """

    def __init__(self, fleet: Fleet, workers: int) -> None:
        self.workers, self.finished, self._fleet = workers, 0, fleet
        self._queue: deque[Job] = deque()
        self._idle: list[int] = []
        self._busy: dict[int, Job] = {}
        self._starting = {fleet.start() for _ in range(workers)}
        self._deaths: dict[int, int] = {}  # of workers, by the number of the trial they had
        self._stillborn = 0

    def submit(self, job: Job) -> None:
        self._queue.append(job)
        self._dispatch()

    def next(self) -> Outcome:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            alone = not self._busy  # nothing will be heard unless a worker starts
            received = self._fleet.receive(max(0.0, deadline - time.monotonic()) if alone else START_TIMEOUT_S)
            if received is None:
                if alone and time.monotonic() >= deadline:
                    raise CoinferError(f"no worker of the search started within {START_TIMEOUT_S:.0f} s; take fewer, or look at what else this machine runs.")
                continue
            outcome = self._heard(*received)
            deadline = time.monotonic() + START_TIMEOUT_S  # a replacement has its own time to start
            self._dispatch()
            if outcome is not None:
                self.finished += 1
                return outcome

    def close(self) -> None:
        self._fleet.close()

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            worker, job = self._idle.pop(0), self._queue.popleft()
            self._busy[worker] = job
            self._fleet.send(worker, job.to_json())

    def _heard(self, worker: int, line: str | None) -> Outcome | None:
        if line is None:
            return self._died(worker)
        fields = json.loads(line)
        if "error" in fields:
            raise CoinferError(fields["error"])
        self._idle.append(worker)
        if worker in self._starting:
            self._starting.remove(worker)
            self._stillborn = 0
            return None
        del self._busy[worker]
        return Outcome.from_json(line)

    def _died(self, worker: int) -> Outcome | None:
        job, failed = self._busy.pop(worker, None), None
        if worker in self._idle:
            self._idle.remove(worker)
        if worker in self._starting:
            self._starting.remove(worker)
            self._stillborn += 1
            if self._stillborn > self.workers:
                raise CoinferError(f"{self._stillborn} workers of the search died while they started; what they said on stderr tells why.")
        if job is not None:
            deaths = self._deaths[job.number] = self._deaths.get(job.number, 0) + 1
            if deaths < ATTEMPTS:
                self._queue.appendleft(job)
            else:
                failed = Outcome(job.number, failure=f"the worker that evaluated it died, {ATTEMPTS} times in a row (out of memory, or a crash in a library)")
        self._starting.add(self._fleet.start())
        return failed


class Served:
    """The worker's end of a fleet: builds what `setup` (the JSON of a `Setup`) says, then answers jobs, line by line."""

    def __init__(self, setup: str) -> None:
        self._setup = json.loads(setup)
        self._measure: Measure | None = None

    def ready(self) -> str:
        """Build, and say so, or why not."""

        def build() -> str:
            module, _, name = self._setup["factory"].partition(":")
            self._measure = getattr(importlib.import_module(module), name)(**self._setup["arguments"])
            return json.dumps({"ready": True})

        return _or_error(build)

    def answer(self, line: str) -> str:
        """The outcome of a job, or the reason why no other job would fare better."""
        assert self._measure is not None
        measure = self._measure
        return _or_error(lambda: evaluate(measure, Job.from_json(line)).to_json())


def _or_error(work: Callable[[], str]) -> str:
    try:
        return work()
    except CoinferError as error:
        return json.dumps({"error": str(error)})
    except Exception as error:  # a bug: the driver, which has the terminal, shall say it
        return json.dumps({"error": f"a worker of the search failed with {type(error).__name__}: {one_line(error)}; this is a bug, please report it."})
