"""What an edge server counts, for Prometheus, and whether it lives and is ready, for whatever watches it; needs the `edge` extra.

`GET /metrics` in the text format; `/livez` and `/readyz` answer 200 or 503 with a word.
"""

from __future__ import annotations

import asyncio
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.errors import CoinferError, KeysError
from pipeline.runtime.guard import is_loopback
from pipeline.runtime.tally import Histogram
from pipeline.runtime.version import coinfer_version

if TYPE_CHECKING:
    from pipeline.runtime.server import EdgeServer

SILENCE_S = 5.0
BEATS_S = 5.0  # without one of the event loop, which comes every second, the server is taken for dead

StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class EdgeCollector(Collector):
    """The tally of a server, and what is true now, whenever it is asked."""

    def __init__(self, server: EdgeServer) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        server, tally = self._server, self._server.tally
        yield InfoMetricFamily("coinfer", "version of coinfer", {"version": coinfer_version()})
        ready = GaugeMetricFamily("coinfer_ready", "1 while frames are taken")
        ready.add_metric([], server.is_ready)
        yield ready
        connections = GaugeMetricFamily("coinfer_connections", "open now, over TCP")
        connections.add_metric([], len(server.clients))
        yield connections
        queue = GaugeMetricFamily("coinfer_queue_frames", "waiting now", labels=["bundle"])
        for bundle_id, lane in list(server.lanes.items()):
            queue.add_metric([bundle_id.hex()], lane.waiting)
        yield queue
        if server.keys:
            ends = GaugeMetricFamily("coinfer_certificate_expires_timestamp_seconds", "when the edge's certificate ends")
            ends.add_metric([], server.keys.ends_s)
            yield ends
        with tally.lock:
            yield from self._counts()
            yield from self._devices()

    def _counts(self) -> Iterator[Metric]:
        tally = self._server.tally
        answered = CounterMetricFamily("coinfer_frames", "answered", labels=["bundle"])
        parts = HistogramMetricFamily("coinfer_part_ms", "ms that frames waited, were decoded, and ran in their batch", labels=["bundle", "part"])
        batches = HistogramMetricFamily("coinfer_batch_frames", "frames that ran together", labels=["bundle"])
        confidence = HistogramMetricFamily("coinfer_confidence", "largest probability of an answer", labels=["bundle"])
        for bundle_id, served in tally.served.items():
            name = bundle_id.hex()
            answered.add_metric([name], served.answered)
            for part, histogram in served.parts.items():
                parts.add_metric([name, part.removesuffix("_ms")], *_cumulative(histogram))
            batches.add_metric([name], *_cumulative(served.batches))
            confidence.add_metric([name], *_cumulative(served.confidence))
        yield from (answered, parts, batches, confidence)
        refusals = CounterMetricFamily("coinfer_refusals", "frames and connections that were not served", labels=["reason"])
        for reason, count in tally.refusals.items():
            refusals.add_metric([reason], count)
        yield refusals
        carried = CounterMetricFamily("coinfer_bytes", "without the headers of TCP/IP and TLS", labels=["direction"])
        for direction, count in tally.bytes.items():
            carried.add_metric([direction], count)
        yield carried

    def _devices(self) -> Iterator[Metric]:
        seen = GaugeMetricFamily("coinfer_device_seen_timestamp_seconds", "when a device was last heard", labels=["device", "version"])
        answered = CounterMetricFamily("coinfer_device_frames", "answered", labels=["device"])
        alone = CounterMetricFamily("coinfer_device_alone", "pictures that a device says it classified without the edge", labels=["device"])
        for name, device in self._server.tally.devices.items():
            seen.add_metric([name, device.version], device.seen_s)
            answered.add_metric([name], device.answered)
            alone.add_metric([name], device.alone)
        yield from (seen, answered, alone)


def _cumulative(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    buckets, below = [], 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return buckets, histogram.total


class _Handler(WSGIRequestHandler):
    timeout = SILENCE_S

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave in any way are no news."""


class MetricsFront:
    """Answers over HTTP on `host`:`port`, or over HTTPS to clients with a certificate where the server has keys, in threads of its own.

    Args:
        announce: told the port once it listens; 0 takes a free one.
    """

    def __init__(self, host: str, port: int, announce: Callable[[int], object] = lambda port: print(f"metrics on port {port}", flush=True)) -> None:
        self._address, self._announce = (host, port), announce
        self._http: WSGIServer | None = None

    async def start(self, server: EdgeServer) -> None:
        """Raises:
        KeysError: the server has no keys, and the address is no loopback address.
        CoinferError: the address cannot be bound.
        """
        if not server.keys and not is_loopback(self._address[0]):
            raise KeysError(f"metrics on {self._address[0]} are reached from other machines, which needs keys; give --keys, or serve them on 127.0.0.1.")
        self._edge = server
        registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        registry.register(EdgeCollector(server))
        self._metrics = make_wsgi_app(registry)
        try:
            self._http = make_server(*self._address, self._answer, _Server, _Handler)
        except (OSError, OverflowError) as error:
            raise CoinferError(f"metrics cannot be served on {self._address[0]}:{self._address[1]} ({error}); choose another port or address.") from error
        if server.keys:
            plain = self._http.socket
            self._http.socket = server.keys.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)  # shaken in the client's own thread
        threading.Thread(target=self._http.serve_forever, args=(0.1,), name="metrics", daemon=True).start()
        self._announce(self._http.server_port)

    async def stop(self, grace_s: float) -> None:
        """Go on as long as what waits is answered: whoever watches is told meanwhile that the server is not ready."""
        if grace_s == 0 and self._http is not None:
            http, self._http = self._http, None
            await asyncio.get_running_loop().run_in_executor(None, http.shutdown)
            http.server_close()

    def _answer(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            text: Iterable[bytes] = self._metrics(environ, start_response)
            return text
        checks = {"/livez": lambda: time.perf_counter() - self._edge.beat_s < BEATS_S, "/readyz": lambda: self._edge.is_ready}
        if path not in checks:
            status, word = "404 Not Found", "there are /metrics, /livez and /readyz"
        elif checks[path]():
            status, word = "200 OK", "ok"
        else:
            status, word = "503 Service Unavailable", "no"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{word}\n".encode()]
