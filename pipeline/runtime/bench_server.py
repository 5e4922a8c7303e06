"""The profile agent: runs on a device and times there what `coinfer profile --on` sends it. Needs the light runtime only.

It runs any ONNX model that it is sent, so it belongs on a network of which every member may do that, and only while a device is measured.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable

from pipeline.errors import CoinferError, ProfileError
from pipeline.runtime.bench import Bench, LocalBench
from pipeline.runtime.bench_wire import Message, receive, reply, requested, send

SILENCE_S = 300.0  # a client that is gone without a word keeps the agent no longer than this
PARTING_S = 1.0
HANDOVER_S = 2.0  # a client that closes and comes back at once is let in when it is noticed that it had left
BUSY = "this profile agent is measuring for another client; try again when that is done, since two at once would spoil both."


def answer(bench: Bench, message: Message) -> Message:
    """The agent's message in reply to a client's."""
    fields, blob = message
    try:
        if fields.get("ask") == "describe":
            return bench.describe(), b""
        if fields.get("ask") == "measure":
            return reply(bench.measure(*requested(fields, blob)))
        raise ProfileError(f"a profile agent can describe and measure, not {str(fields.get('ask'))[:40]}; check that both have the same version.")
    except CoinferError as error:
        return {"error": str(error)}, b""
    except Exception as error:  # whatever a request holds, its client is told
        return {"error": f"a request cannot be answered ({error!r}); check that profile agent and client have the same version."}, b""


class _Connection(socketserver.BaseRequestHandler):
    server: _Agent
    request: socket.socket

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request.settimeout(SILENCE_S)
        with contextlib.suppress(OSError):  # a client that leaves in any way ends its own connection only
            try:
                if not self.server.free.acquire(timeout=HANDOVER_S):
                    raise ProfileError(BUSY)
                try:
                    while (message := receive(self.request)) is not None:
                        send(self.request, *answer(self.server.bench, message))
                finally:
                    self.server.free.release()
            except ProfileError as error:  # where the next message begins is unknown now
                send(self.request, {"error": str(error)})
                self._part()

    def _part(self) -> None:
        """Close so that the last word arrives: the client may still be sending, and what is not read would reset the connection."""
        self.request.shutdown(socket.SHUT_WR)
        self.request.settimeout(PARTING_S)
        while self.request.recv(1 << 16):
            pass


class _Agent(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], bench: Bench) -> None:
        self.bench, self.free = bench, threading.Lock()
        super().__init__(address, _Connection)


def serve_bench(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    bench: Bench | None = None,
    announce: Callable[[int], object] = lambda port: print(f"profile agent listens on port {port}", flush=True),
) -> None:
    """Measure for one client at a time until Ctrl-C. Port 0 takes a free one; `announce` is told which.

    Raises:
        CoinferError: the address cannot be bound.
    """
    try:
        server = _Agent((host, port), bench or LocalBench())
    except (OSError, OverflowError) as error:
        raise CoinferError(f"the profile agent cannot listen on {host}:{port} ({error}); choose another port or address.") from error
    with server, contextlib.suppress(KeyboardInterrupt):
        announce(server.server_address[1])
        server.serve_forever()
