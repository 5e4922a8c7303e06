"""Which way each image goes: through the edge while it answers in time, else on the device alone until the edge is back."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import FrameError, ParamsError
from pipeline.runtime.device import Answer, DeviceHalf, Picture
from pipeline.runtime.transport import EdgeUnreachable, Transport

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 4.0
SLACK_MS, RESERVE, LOCAL_RUNS = 3.0, 1.5, 8  # what is kept free for a local run: so many times the slowest of the last ones, and a little


class Fallback:
    """Classifies each picture by splitting if the edge answers before `deadline_ms`, counted from the picture on, and else on the device alone.

    A picture goes local so early that its answer still comes in time, as far as local runs so far tell; where the device alone is slower than the
    deadline, the edge gets all of it. After a failure pictures go local at once for a pause that doubles with every further failure, up to
    `LONGEST_PAUSE_S` from the last try on, each shortened by up to half at random so that devices do not come back all at once; then one picture tries
    the edge.

    Args:
        now_s: seconds that only go forward.
        draw: uniform in [0, 1).

    Raises:
        ParamsError: a deadline that is not positive.
    """

    def __init__(
        self,
        device: DeviceHalf,
        transport: Transport,
        deadline_ms: float,
        *,
        now_s: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        check_deadline(deadline_ms)
        self._device, self._transport, self._deadline_ms = device, transport, deadline_ms
        self._now_s, self._draw = now_s, draw
        self._failures, self._why = 0, ""
        self._resume_s = now_s()
        self._local_ms: deque[float] = deque(maxlen=LOCAL_RUNS)
        blank = np.zeros(device.shape, np.uint8)
        for _ in range(2):
            self._locally(blank)
        self._local_ms.popleft()  # that also loaded the network

    def classify(self, picture: Picture) -> tuple[Answer, str | None]:
        """The answer, and why the device gave it alone; None if it did not. What was spent on asking an edge in vain counts as link_ms.

        Raises:
            DataError: the picture is unreadable or of another shape.
        """
        begin_s = self._now_s()
        pixels = self._device.pixels(picture)
        prepared_ms = 1e3 * (self._now_s() - begin_s)
        if begin_s < self._resume_s:
            self._transport.alone += 1
            return _later(self._locally(pixels), "device_ms", prepared_ms), self._why
        left_ms = self._deadline_ms - prepared_ms
        reserve_ms = RESERVE * max(self._local_ms) + SLACK_MS
        try:
            answer = self._device.classify(pixels, self._transport, left_ms - reserve_ms if reserve_ms < left_ms else left_ms)
        except (EdgeUnreachable, FrameError) as error:
            self._transport.alone += 1
            self._transport.close()  # what may still come is no answer to the next picture
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._failures, 16)) * (1 - self._draw() / 2)
            self._failures, self._why, self._resume_s = self._failures + 1, str(error), begin_s + pause_s
            spent_ms = 1e3 * (self._now_s() - begin_s) - prepared_ms
            return _later(_later(self._locally(pixels), "device_ms", prepared_ms), "link_ms", spent_ms), self._why
        self._failures = 0
        return _later(answer, "device_ms", prepared_ms), None

    def _locally(self, pixels: NDArray[np.uint8]) -> Answer:
        answer = self._device.classify_locally(pixels)
        self._local_ms.append(answer.parts["total_ms"])
        return answer


def check_deadline(deadline_ms: float) -> None:
    """Raises:
    ParamsError: it is not positive.
    """
    if not 0 < deadline_ms < float("inf"):
        raise ParamsError(f"the deadline is {deadline_ms} ms; give a positive number.")


def _later(answer: Answer, part: str, ms: float) -> Answer:
    return replace(answer, parts=answer.parts | {part: answer.parts[part] + ms, "total_ms": answer.parts["total_ms"] + ms})
