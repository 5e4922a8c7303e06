"""Does a frame over the emulated link take what METHODS 1 says: 8 * wire bytes / rate, then half the round trip, each way?

Two emulations: the one inside a transport, which `evaluate` measures with, and the relay of `coinfer link`, a process between client and server.
"""

from __future__ import annotations

import contextlib
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import figure, write
from pipeline.costs.link import Link, wire_bytes
from pipeline.runtime.frame import OVERHEAD_BYTES, Kind, pack
from pipeline.runtime.transport import LoopbackTransport, TcpTransport, Transport, receive_frame

REPEATS = 30
LINKS = [Link(0.1, 0), Link(0.1, 20), Link(1, 2), Link(10, 2)]
SIZES = [100, 300, 1600]


class Echo(socketserver.BaseRequestHandler):
    """Sends back each frame once it is whole."""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            while (frame := receive_frame(self.request)) is not None:
                self.request.sendall(frame)


class EchoHalf:
    """An edge that answers at once with what it was sent."""

    def handle(self, frame: bytes) -> tuple[bytes, dict[str, float]]:
        return frame, {}


@contextlib.contextmanager
def relayed(link: Link) -> Iterator[Transport]:
    """To an echo in this process, through `coinfer link`; the connection is open already."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        to = f"127.0.0.1:{server.server_address[1]}"
        command = [sys.executable, "-m", "pipeline.cli", "link", "--to", to, "--rate", str(link.rate_mbps), "--rtt", str(link.rtt_ms), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as relay:
            assert relay.stdout is not None
            transport = TcpTransport("127.0.0.1", int(relay.stdout.readline().split()[-1]))
            transport.request(pack(b"", b"test", Kind.SYMBOLS))
            yield transport
            transport.close()
            relay.terminate()
        server.shutdown()


def measured(transport: Transport, size: int) -> list[float]:
    frame, samples = pack(bytes(size - OVERHEAD_BYTES), b"test", Kind.SYMBOLS), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        transport.request(frame)
        samples.append((time.perf_counter() - start) * 1e3)
    return samples


if __name__ == "__main__":
    figures, raw = {}, {}
    for link in LINKS:
        with relayed(link) as relay:
            for size in SIZES:
                expected = 2 * link.transmit_ms(wire_bytes(size)) + link.rtt_ms
                for name, where, transport in (
                    ("measured", "in the transport", LoopbackTransport(EchoHalf(), link)),
                    ("relay", "through `coinfer link`", relay),
                ):
                    samples = measured(transport, size)
                    low, median, high = np.percentile(samples, (25, 50, 75))
                    key = f"{name}_over_computed.{link.rate_mbps:g}mbps_{link.rtt_ms:g}ms_{size}bytes"
                    raw[key] = {"expected_ms": expected, "measured_ms": samples}
                    how = f"a frame of {size} bytes there and back, {where}, measured over computed"
                    figures[key] = figure(median / expected, "ratio", how, n=REPEATS, spread=(low / expected, high / expected))
    for name, key in (("measured", "worst"), ("relay", "relay_worst")):
        found = [entry["value"] for known, entry in figures.items() if known.startswith(f"{name}_over")]
        figures[key] = figure(max(found, key=lambda value: abs(value - 1)), "ratio", "the one of all that is furthest from 1", n=len(found))
    print(
        write("link", dataset={"name": "none"}, seeds=[], figures=figures, raw=raw), *(f"{key} {figures[key]['value']:.4f}" for key in ("worst", "relay_worst"))
    )
