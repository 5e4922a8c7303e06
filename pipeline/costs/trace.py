"""A link's rate over time, as traces of mobile networks are published: one line per sample, time and Mbit/s."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ParamsError

LONGEST_GAP = 3  # times the median step: what is farther apart was not measured


@dataclass(frozen=True)
class Trace:
    """From `times_s[i]` on, counted from the first, the rate is `rates_mbps[i]` (0: a stall); after `end_s` all begins again.

    Raises:
        ParamsError: times that do not increase, a rate that is negative or not finite, or none above 0.
    """

    times_s: tuple[float, ...]
    rates_mbps: tuple[float, ...]
    end_s: float
    _bounds_ms: NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _sent_bits: NDArray[np.float64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        bounds_ms = 1e3 * (np.array([*self.times_s, self.end_s]) - self.times_s[0])
        if not (np.isfinite(bounds_ms).all() and (np.diff(bounds_ms) > 0).all()):
            raise ParamsError("the times of a trace do not increase; give its samples in order.")
        if not all(rate >= 0 and math.isfinite(rate) for rate in self.rates_mbps) or not any(self.rates_mbps):
            raise ParamsError("the rates of a trace are Mbit/s, 0 or more, and not all 0; check the file.")
        object.__setattr__(self, "_bounds_ms", bounds_ms)
        object.__setattr__(self, "_sent_bits", np.concatenate([[0.0], np.cumsum(np.diff(bounds_ms) * 1e3 * np.array(self.rates_mbps))]))

    @classmethod
    def stalling(cls, rate_mbps: float, every_s: float, for_s: float) -> Trace:
        """`rate_mbps`, but nothing in the last `for_s` of `every_s`."""
        if not 0 < for_s < every_s < math.inf:
            raise ParamsError(f"a stall of {for_s:g} s every {every_s:g} s leaves no time or is none; give a shorter one, above 0.")
        return cls((0.0, every_s - for_s), (rate_mbps, 0.0), every_s)

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read lines of seconds and Mbit/s with a comma, semicolon or space between; a first line of names, empty lines and those from # on are passed over.

        Raises:
            ParamsError: the file is missing or damaged, its samples leave a gap or are not in order, or a rate is negative or no number.
        """
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ParamsError(f"{path} cannot be read as a trace ({error}); give a text file of seconds and Mbit/s, one sample a line.") from error
        times: list[float] = []
        rates: list[float] = []
        numbers: list[int] = []
        named = False
        for number, line in enumerate(lines, 1):
            words = [word for word in re.split(r"[,;\s]+", line.split("#")[0].strip()) if word]
            if not words or (not named and not times and not any(map(_number, words))):
                named = named or bool(words)
                continue
            if len(words) != 2 or not all(map(_number, words)):
                raise ParamsError(f"{path}, line {number}: {line.strip()[:60]!r} is not a time in seconds and a rate in Mbit/s; correct or remove it.")
            time_s, rate_mbps = map(float, words)
            if rate_mbps < 0:
                raise ParamsError(f"{path}, line {number}: a rate of {rate_mbps:g} Mbit/s; none can be negative, a stall is 0.")
            if times and time_s <= times[-1]:
                raise ParamsError(f"{path}, line {number}: {time_s:g} s comes after {times[-1]:g} s; sort the samples by time.")
            times.append(time_s)
            rates.append(rate_mbps)
            numbers.append(number)
        if len(times) < 2:
            raise ParamsError(f"{path} holds {len(times)} samples; a trace needs two or more lines of seconds and Mbit/s.")
        steps = np.diff(times)
        if (steps > LONGEST_GAP * np.median(steps)).any():
            worst = int(np.argmax(steps))
            raise ParamsError(
                f"{path}, line {numbers[worst + 1]}: {steps[worst]:g} s are missing before it, where samples are {np.median(steps):g} s apart; "
                "fill the gap, with 0 if nothing arrived, or cut the trace there."
            )
        try:
            return cls(tuple(times), tuple(rates), times[-1] + float(np.median(steps)))
        except ParamsError as error:
            raise ParamsError(f"{path}: {error}") from None

    @property
    def mean_mbps(self) -> float:
        return float(self._sent_bits[-1] / self._bounds_ms[-1] / 1e3)

    def done_ms(self, start_ms: float, n_wire_bytes: float) -> float:
        """When the last bit has left of so many bytes begun at `start_ms`, which counts from the start of the trace."""
        period_ms, period_bits = float(self._bounds_ms[-1]), float(self._sent_bits[-1])
        before, into_ms = divmod(start_ms, period_ms)
        wanted = float(np.interp(into_ms, self._bounds_ms, self._sent_bits)) + 8 * n_wire_bytes
        further, wanted = divmod(wanted, period_bits)
        if wanted == 0 and further:  # the last bit of a period, not the first moment of the next
            further, wanted = further - 1, period_bits
        place = max(1, int(np.searchsorted(self._sent_bits, wanted)))
        since = wanted - self._sent_bits[place - 1]
        within = self._bounds_ms[place - 1] + (since / (1e3 * self.rates_mbps[place - 1]) if since else 0.0)
        return max(start_ms, (before + further) * period_ms + float(within))


def _number(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False
