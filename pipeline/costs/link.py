"""The link between device and edge: bytes on the wire and the serialising rule (METHODS 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.costs.trace import Trace
from pipeline.errors import ParamsError
from pipeline.runtime.frame import OVERHEAD_BYTES

TCP_IP_HEADER_BYTES = 52
TCP_SEGMENT_BYTES = 1448


def wire_bytes(frame_bytes: int) -> int:
    """Bytes a frame of `frame_bytes` occupies on the wire with TCP/IP headers (METHODS 1)."""
    return frame_bytes + TCP_IP_HEADER_BYTES * math.ceil(frame_bytes / TCP_SEGMENT_BYTES)


def mean_wire_bytes(frame_bytes: float) -> float:
    """Wire bytes of frames that are `frame_bytes` on average, as if all had that size."""
    whole = math.ceil(frame_bytes)
    return frame_bytes + wire_bytes(whole) - whole


def reply_frame_bytes(classes: int) -> int:
    """A reply frame: the edge's two times and the logits, all float32."""
    return OVERHEAD_BYTES + 4 * (2 + classes)


@dataclass(frozen=True)
class Link:
    """A link of `rate_mbps` (1e6 bit/s, each way) and `rtt_ms` round-trip propagation.

    Raises:
        ParamsError: a rate that is not positive and finite, or a negative round trip.
    """

    rate_mbps: float
    rtt_ms: float

    def __post_init__(self) -> None:
        if not (self.rate_mbps > 0 and math.isfinite(self.rate_mbps)):
            raise ParamsError(f"link.rate_mbps is {self.rate_mbps}; give a positive number of Mbit/s.")
        if not (self.rtt_ms >= 0 and math.isfinite(self.rtt_ms)):
            raise ParamsError(f"link.rtt_ms is {self.rtt_ms}; give a number of milliseconds, 0 or more.")

    def transmit_ms(self, n_wire_bytes: float) -> float:
        """Time `n_wire_bytes` occupy the sender: 8*bytes/rate."""
        return 8 * n_wire_bytes / (self.rate_mbps * 1e3)


def link_ms(frame_bytes: float, reply_bytes: float, link: Link) -> float:
    """Uplink, round trip and reply of one request on an idle link, in ms."""
    return link.transmit_ms(mean_wire_bytes(frame_bytes)) + link.rtt_ms + link.transmit_ms(mean_wire_bytes(reply_bytes))


class Serialiser:
    """One direction of a link: departure = max(now, link_free) + 8*wire_bytes/rate, then half the round trip (METHODS 1).

    With a `trace`, which begins at 0 ms, the rate is the trace's.
    """

    def __init__(self, link: Link, trace: Trace | None = None) -> None:
        self.link, self.trace = link, trace
        self._free_ms = -math.inf

    def arrival_ms(self, now_ms: float, n_wire_bytes: float) -> float:
        """When the last byte of a frame handed over at `now_ms` arrives."""
        start_ms = max(now_ms, self._free_ms)
        self._free_ms = self.trace.done_ms(start_ms, n_wire_bytes) if self.trace else start_ms + self.link.transmit_ms(n_wire_bytes)
        return self._free_ms + self.link.rtt_ms / 2
