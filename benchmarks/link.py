"""Does a frame over the emulated link take what METHODS 1 says: 8 * wire bytes / rate, then half the round trip, each way?"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import figure, write
from pipeline.costs.link import Link, wire_bytes
from pipeline.runtime.frame import OVERHEAD_BYTES, Kind, pack
from pipeline.runtime.transport import LoopbackTransport

REPEATS = 30
LINKS = [Link(0.1, 0), Link(0.1, 20), Link(1, 2), Link(10, 2)]
SIZES = [100, 300, 1600]


class Echo:
    """An edge that answers at once with what it was sent."""

    def handle(self, frame: bytes) -> tuple[bytes, dict[str, float]]:
        return frame, {}


if __name__ == "__main__":
    figures, raw = {}, {}
    for link in LINKS:
        for size in SIZES:
            transport, frame = LoopbackTransport(Echo(), link), pack(bytes(size - OVERHEAD_BYTES), b"test", Kind.SYMBOLS)
            expected = 2 * link.transmit_ms(wire_bytes(len(frame))) + link.rtt_ms
            samples = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                transport.request(frame)
                samples.append((time.perf_counter() - start) * 1e3)
            low, median, high = np.percentile(samples, (25, 50, 75))
            key = f"{link.rate_mbps:g}mbps_{link.rtt_ms:g}ms_{size}bytes"
            raw[key] = {"expected_ms": expected, "measured_ms": samples}
            how = f"a frame of {size} bytes there and back, measured over computed"
            figures[f"measured_over_computed.{key}"] = figure(median / expected, "ratio", how, n=REPEATS, spread=(low / expected, high / expected))
    worst = max((abs(entry["value"] - 1), entry["value"]) for entry in figures.values())[1]
    figures["worst"] = figure(worst, "ratio", "the one of all that is furthest from 1", n=len(figures))
    print(write("link", dataset={"name": "none"}, seeds=[], figures=figures, raw=raw), f"worst {worst:.4f}")
