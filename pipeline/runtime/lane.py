"""One bundle's edge half behind a queue: frames of many devices, decoded and run together in a thread of their own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CoinferError
from pipeline.runtime.edge import Asked, EdgeHalf
from pipeline.runtime.tally import Refusal, Tally

BUSY = "the edge is busy; try again later."
FAILED = "the edge half failed"


@dataclass(frozen=True)
class Batching:
    """Frames that run together: at most `most`, the first of which waits no longer than `delay_ms` for others; those that queued meanwhile never wait."""

    most: int = 8
    delay_ms: float = 0.0


@dataclass
class Job:
    """A frame or symbols, whom to tell the reply, whether somebody still waits for that, and when it came (s, `time.perf_counter`)."""

    frame: Asked
    done: Callable[[bytes], None]
    wanted: Callable[[], bool]
    came_s: float = field(default_factory=time.perf_counter)


Finished = list[tuple[Job, bytes]]


class Lane:
    """Answers jobs in the order in which they came.

    Args:
        capacity: jobs that may wait; `put` refuses more.
        patience_s: what waited longer is answered busy: its device has gone on without the edge.
        deliver: told, from the lane's thread, all replies of a batch at once, and what is to be called once they are on their way: nobody waits for counting.
        tally: counts them.
    """

    def __init__(
        self,
        half: EdgeHalf,
        batching: Batching,
        capacity: int,
        patience_s: float,
        deliver: Callable[[Finished, Callable[[], None]], None],
        tally: Tally | None = None,
    ) -> None:
        self._half, self._batching, self._capacity, self._patience_s, self._deliver = half, batching, capacity, patience_s, deliver
        self._tally = tally or Tally()
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"lane {half.bundle_id.hex()}", daemon=True)
        self._thread.start()

    @property
    def half(self) -> EdgeHalf:
        return self._half

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def put(self, job: Job) -> bool:
        """Whether there was room for it."""
        if self._closing or self._queue.qsize() >= self._capacity:
            return False
        self._queue.put(job)
        return True

    def close(self) -> None:
        """Take no more jobs; those that wait are still answered, after which the thread ends."""
        self._closing = True
        self._queue.put(None)

    def _run(self) -> None:
        while jobs := self._gather():
            count: Callable[[], None] = _nothing
            try:
                replies, count = self._answers(jobs)
            except Exception as error:  # ONNX Runtime raises its own unrelated classes; the next batch may do better
                replies = [self._refusal(Refusal.FAILED, f"{FAILED} ({error!r}); look at the edge.") for _ in jobs]
            self._deliver(list(zip(jobs, replies, strict=True)), count)

    def _answers(self, jobs: Sequence[Job]) -> tuple[list[bytes], Callable[[], None]]:
        """The replies, and what counts them."""
        half = self._half
        if half.slowdown > 1:  # a slower machine is emulated for one frame at a time
            return [half.handle(job.frame)[0] for job in jobs], _nothing
        replies: dict[int, bytes] = {}
        opened: dict[int, tuple[Any, float]] = {}
        count: Callable[[], None] = _nothing
        for index, job in enumerate(jobs):
            start_s = time.perf_counter()
            if not job.wanted():
                replies[index] = half.refusal(BUSY)  # which nobody hears, so it is counted nowhere
                continue
            if start_s - job.came_s > self._patience_s:
                replies[index] = self._refusal(Refusal.BUSY, BUSY)
                continue
            try:
                opened[index] = half.open(job.frame), 1e3 * (time.perf_counter() - start_s)
            except CoinferError as error:
                replies[index] = self._refusal(Refusal.FRAME, str(error))
        if opened:
            batch = [array for array, _ in opened.values()]
            start_s = time.perf_counter()
            logits = half.run(np.concatenate(batch) if len(batch) > 1 else batch[0])
            end_s = time.perf_counter()
            decodes_ms = [decode_ms for _, decode_ms in opened.values()]
            stays_ms = [1e3 * (end_s - jobs[index].came_s) for index in opened]
            for row, index, decode_ms, stay_ms in zip(logits, opened, decodes_ms, stays_ms, strict=True):
                replies[index] = half.reply(row, decode_ms, stay_ms - decode_ms)
            count = partial(self._count, logits, decodes_ms, stays_ms, 1e3 * (end_s - start_s))
        return [replies[index] for index in range(len(jobs))], count

    def _count(self, logits: NDArray[np.float32], decodes_ms: Sequence[float], stays_ms: Sequence[float], edge_ms: float) -> None:
        waits_ms = [max(0.0, stay_ms - decode_ms - edge_ms) for stay_ms, decode_ms in zip(stays_ms, decodes_ms, strict=True)]
        confidences = 1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        self._tally.batch(self._half.bundle_id, waits_ms, decodes_ms, edge_ms, confidences.tolist())

    def _refusal(self, reason: Refusal, text: str) -> bytes:
        self._tally.refused(reason)
        return self._half.refusal(text)

    def _gather(self) -> list[Job]:
        """The next batch; none at the end."""
        first = self._queue.get()
        if first is None:
            return []
        jobs, end_s = [first], first.came_s + self._batching.delay_ms / 1e3
        while len(jobs) < self._batching.most:
            left_s = end_s - time.perf_counter()
            try:
                job = self._queue.get(timeout=left_s) if left_s > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._queue.put(None)
                break
            jobs.append(job)
        return jobs


def _nothing() -> None:
    """Where there is nothing to count."""
