"""What an edge server counts, for `metrics` and for the summary of a run."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pipeline.runtime.hello import Hello

MS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
FRAMES = (1, 2, 4, 8, 16, 32, 64, 128)
SHARES = tuple(tenths / 10 for tenths in range(1, 11))
MOST_DEVICES = 1000  # without keys anybody can make up names


class Refusal(StrEnum):
    """Why a frame or a connection was not served."""

    BUSY = "busy"
    RATE = "rate"
    BUNDLE = "bundle"
    FRAME = "frame"
    SIZE = "size"
    KEYS = "keys"
    CONNECTIONS = "connections"
    FAILED = "failed"


class Histogram:
    """Counts of values up to each of `bounds`, and above the last."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, values: Iterable[float]) -> None:
        for value in values:
            self.counts[bisect_left(self.bounds, value)] += 1
            self.total += value

    @property
    def mean(self) -> float:
        return self.total / max(1, sum(self.counts))

    def quantile(self, share: float) -> float:
        """The value that this share of all is below, as if values were spread evenly between two bounds; at most the last bound."""
        left = share * sum(self.counts)
        for below, bound, count in zip((0.0, *self.bounds), self.bounds, self.counts, strict=False):
            if count and left <= count:
                return below + (bound - below) * left / count
            left -= count
        return self.bounds[-1]

    def to_dict(self) -> dict[str, Any]:
        return {"up_to": list(self.bounds), "counts": list(self.counts), "mean": self.mean}


@dataclass
class Served:
    """Of one bundle: frames answered, ms that they waited, were decoded and ran (their batch), frames per batch, largest probability."""

    answered: int = 0
    parts: dict[str, Histogram] = field(default_factory=lambda: {f"{part}_ms": Histogram(MS) for part in ("wait", "decode", "edge")})
    batches: Histogram = field(default_factory=lambda: Histogram(FRAMES))
    confidence: Histogram = field(default_factory=lambda: Histogram(SHARES))


@dataclass
class Device:
    """What is known of a device: its version, when it was last heard (s since 1970), frames answered, pictures it classified without the edge."""

    version: str
    seen_s: float
    answered: int = 0
    alone: int = 0


class Tally:
    """Safe to tell from several threads; `lock` holds it still. Of more than `most_devices` those last heard are kept."""

    def __init__(self, most_devices: float = MOST_DEVICES) -> None:
        self.most_devices = most_devices
        self.lock = threading.Lock()
        self.began_s = time.time()
        self.served: dict[bytes, Served] = {}
        self.refusals: Counter[Refusal] = Counter(dict.fromkeys(Refusal, 0))
        self.bytes: Counter[str] = Counter({"in": 0, "out": 0})
        self.devices: dict[str, Device] = {}

    def batch(self, bundle_id: bytes, waits_ms: Sequence[float], decodes_ms: Sequence[float], edge_ms: float, confidences: Sequence[float]) -> None:
        """Frames that ran together and were answered."""
        with self.lock:
            served = self.served.setdefault(bundle_id, Served())
            served.answered += len(waits_ms)
            served.parts["wait_ms"].add(waits_ms)
            served.parts["decode_ms"].add(decodes_ms)
            served.parts["edge_ms"].add([edge_ms] * len(waits_ms))
            served.batches.add([len(waits_ms)])
            served.confidence.add(confidences)

    def refused(self, reason: Refusal) -> None:
        with self.lock:
            self.refusals[reason] += 1

    def carried(self, direction: str, count: int) -> None:
        """Bytes "in" or "out", without the headers of TCP/IP and TLS."""
        with self.lock:
            self.bytes[direction] += count

    def hello(self, hello: Hello) -> None:
        """A device that has come. What it did alone is told with `answered`: until then it says so again each time it comes."""
        with self.lock:
            known = self.devices.pop(hello.device, None) or Device(hello.version, 0.0)
            known.version, known.seen_s = hello.version, time.time()
            self.devices[hello.device] = known
            while len(self.devices) > self.most_devices:
                self.devices.pop(next(iter(self.devices)))

    def answered(self, device: str, frames: int = 1, alone: int = 0) -> None:
        """Frames of a device, which has heard an answer now to its saying that it did so many pictures alone."""
        with self.lock:
            if known := self.devices.pop(device, None):
                known.seen_s, known.answered, known.alone = time.time(), known.answered + frames, known.alone + alone
                self.devices[device] = known

    def summary(self) -> dict[str, Any]:
        """Everything as JSON, by bundle in hexadecimal digits; `fallback_share` is of the pictures of devices that say who they are."""
        with self.lock:
            answered, alone = (sum(getattr(device, name) for device in self.devices.values()) for name in ("answered", "alone"))
            return {
                "seconds": time.time() - self.began_s,
                "bundles": {
                    bundle_id.hex(): {
                        "answered": served.answered,
                        "batch_frames": served.batches.to_dict(),
                        "confidence": served.confidence.to_dict(),
                        **{name: histogram.to_dict() for name, histogram in served.parts.items()},
                    }
                    for bundle_id, served in self.served.items()
                },
                "refusals": {str(reason): count for reason, count in self.refusals.items()},
                "bytes": dict(self.bytes),
                "devices": {name: vars(device) | {} for name, device in self.devices.items()},
                "fallback_share": alone / (answered + alone) if answered + alone else None,
            }
