"""What a soak is planned to do, and its books: which picture each answer is of, which way it came, and when there was an outage."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESET, SILENT, KILL, DRAIN = "reset", "silent", "kill", "drain"
WARM_UP = 0.1  # of a run, before the first outage, and of each memory curve, where it is not judged
LONGEST_S, SPACE_S = (1.0, 8.0), 24.0  # how long an outage lasts; where each has less than this to itself they are shorter in proportion
CALM_S = 10.0  # before the next one, for what has to recover
TOLERANCE = 2e-6  # of a probability of six decimals; two frames in one batch are added up in another order than one alone


@dataclass(frozen=True)
class Disruption:
    kind: str
    at_s: float
    for_s: float


def plan(seconds: float, cuts: int, kills: int, seed: int) -> list[Disruption]:
    """`cuts` of the link, half of them silent, `kills` of the server and one drain, each at a random moment of a share of its own of the run.

    The server is left alone in the last third where there is room, so that its last life is a long one.
    """
    draw = random.Random(seed)
    count = cuts + kills + 1
    ends = draw.sample(range(max(kills + 1, 2 * count // 3)), kills + 1)
    kinds = dict.fromkeys(ends, KILL) | {draw.choice(ends): DRAIN}
    links = [RESET, SILENT] * (cuts // 2) + [RESET] * (cuts % 2)
    draw.shuffle(links)
    share_s = seconds * (1 - WARM_UP) / count
    scale = min(1.0, share_s / SPACE_S)
    found = []
    for index in range(count):
        for_s = scale * draw.uniform(*LONGEST_S)
        at_s = seconds * WARM_UP + index * share_s + draw.uniform(0, share_s - for_s - scale * CALM_S)
        found.append(Disruption(kinds[index] if index in kinds else links.pop(), at_s, for_s))
    return found


def growth(rss_kib: Sequence[int], warm_up: int) -> float:
    """Of a memory curve's last tenth over as many samples after its first `warm_up`, medians."""
    tenth = max(1, len(rss_kib) // 10)
    return statistics.median(rss_kib[-tenth:]) / statistics.median(rss_kib[warm_up : warm_up + tenth]) - 1


class Account:
    """Of pictures that are sent over and over in the same order, and the device's records about them.

    Args:
        expected: by path, what a record of each picture says.
    """

    def __init__(self, expected: dict[str, list[dict[str, Any]]]) -> None:
        self._expected = {
            path: ([each["label"] for each in records], np.array([each["probability"] for each in records])) for path, records in expected.items()
        }
        self._pictures = len(next(iter(expected.values())))
        self.asked_s: list[float] = []
        self.answered_s: list[float] = []
        self.is_split: list[bool] = []
        self.total_ms: list[float] = []
        self.right: set[int] = set()
        self.again = 0
        self.why: Counter[str] = Counter()
        self.wrong: list[str] = []

    def ask(self, now_s: float) -> None:
        self.asked_s.append(now_s)

    def hear(self, line: bytes, now_s: float) -> None:
        """A line of the device."""
        record = json.loads(line)
        number = len(self.answered_s)
        self.answered_s.append(now_s)
        self.is_split.append(record.get("path") == "split")
        self.total_ms.append(record.get("total_ms", 0.0))
        if "edge_error" in record:
            self.why[record["edge_error"]] += 1
        if record.get("frame") == number and self._is_of(record, number % self._pictures):
            self.right.add(number)
        else:
            self.wrong.append(line.decode(errors="replace").strip())
            self.again += any(self._is_of(record, n % self._pictures) for n in range(number - 1, max(-1, number - self._pictures), -1))

    def _is_of(self, record: dict[str, Any], picture: int) -> bool:
        labels, probabilities = self._expected.get(record.get("path", ""), ([], np.empty(0)))
        return bool(labels) and record["label"] == labels[picture] and abs(record["probability"] - probabilities[picture]) < TOLERANCE

    def exactly_once(self) -> dict[str, int]:
        """How many were asked and answered; how many of them have no answer of their own, and how many answers are an earlier picture's, or of none asked.

        "wrong" is all that do not say what their own picture's answer is.
        """
        asked = len(self.asked_s)
        lost = sum(number not in self.right for number in range(asked))
        doubled = self.again + sum(number >= asked for number in self.right)
        return {"asked": asked, "answered": len(self.answered_s), "lost": lost, "doubled": doubled, "wrong": len(self.wrong)}

    def spans(self) -> list[tuple[float, float]]:
        """Of each answer, when the device could begin and when it came."""
        return [(max(self.asked_s[n], self.answered_s[n - 1] if n else 0.0), end_s) for n, end_s in enumerate(self.answered_s[: len(self.asked_s)])]

    def recoveries_s(self, outages: Sequence[tuple[float, float]]) -> list[float | None]:
        """From the end of each outage to the first answer by splitting; None: there was none."""
        split_s = [at_s for at_s, is_split in zip(self.answered_s, self.is_split, strict=True) if is_split]
        return [next((at_s - end_s for at_s in split_s if at_s >= end_s), None) for _, end_s in outages]

    def shares(self, outages: Sequence[tuple[float, float]]) -> dict[str, dict[str, int]]:
        """Answers, and those by splitting, `outside` outages, and `settled`: from each recovery to the next outage."""
        recovered = [
            (begin_s, end_s + (float("inf") if recovery_s is None else recovery_s))
            for (begin_s, end_s), recovery_s in zip(outages, self.recoveries_s(outages), strict=True)
        ]
        return {"outside": self._counts(outages), "settled": self._counts(recovered)}

    def _counts(self, without: Sequence[tuple[float, float]]) -> dict[str, int]:
        counted = [
            is_split
            for (begin_s, end_s), is_split in zip(self.spans(), self.is_split, strict=False)
            if not any(begin_s < until_s and end_s > from_s for from_s, until_s in without)
        ]
        return {"answered": len(counted), "split": sum(counted)}

    def by_second(self) -> dict[str, list[int]]:
        """Answers of each second, by way."""
        seconds = int(self.answered_s[-1]) + 1 if self.answered_s else 0
        found = {"split": [0] * seconds, "alone": [0] * seconds}
        for at_s, is_split in zip(self.answered_s, self.is_split, strict=True):
            found["split" if is_split else "alone"][int(at_s)] += 1
        return found
