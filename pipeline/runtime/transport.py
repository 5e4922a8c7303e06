"""How a frame reaches the edge and its reply comes back: one method, over TCP or inside one process."""

from __future__ import annotations

import socket
import time
from typing import Protocol

from pipeline.costs.link import Link, Serialiser, wire_bytes
from pipeline.errors import CoinferError, ParamsError
from pipeline.runtime.frame import HEADER_BYTES, frame_bytes

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 60.0


class EdgeUnreachable(CoinferError):
    """The edge does not answer; a device can still classify alone."""


class Transport(Protocol):
    """Carries one frame to an edge half and brings its reply."""

    def request(self, frame: bytes) -> bytes: ...

    def close(self) -> None: ...


class Clock(Protocol):
    """Milliseconds that only go forward, and waiting for one of them."""

    def now_ms(self) -> float: ...

    def wait_until_ms(self, moment_ms: float) -> None: ...


class RealClock:
    """Sleeps, then spins through the last millisecond, which a sleep would overshoot."""

    def now_ms(self) -> float:
        return time.perf_counter() * 1e3

    def wait_until_ms(self, moment_ms: float) -> None:
        if (left_ms := moment_ms - self.now_ms()) > 1:
            time.sleep((left_ms - 1) / 1e3)
        while self.now_ms() < moment_ms:
            pass


class EmulatedLink:
    """Holds frames back as `link` would, in user space (METHODS 1); both directions serialise apart."""

    def __init__(self, link: Link, clock: Clock | None = None) -> None:
        self._clock = clock or RealClock()
        self._up, self._down = Serialiser(link), Serialiser(link)

    def up(self, n_frame_bytes: int) -> None:
        """Wait until a frame handed over now would have arrived at the edge."""
        self._pass(self._up, n_frame_bytes)

    def down(self, n_frame_bytes: int) -> None:
        """Wait until a reply the edge hands over now would have arrived at the device."""
        self._pass(self._down, n_frame_bytes)

    def _pass(self, direction: Serialiser, n_frame_bytes: int) -> None:
        self._clock.wait_until_ms(direction.arrival_ms(self._clock.now_ms(), wire_bytes(n_frame_bytes)))


class FrameHandler(Protocol):
    """What answers frames: an `EdgeHalf`."""

    def handle(self, frame: bytes) -> tuple[bytes, dict[str, float]]: ...


class LoopbackTransport:
    """The edge half in this very process, for tests and for trying a bundle without a server."""

    def __init__(self, edge: FrameHandler, link: Link | None = None, clock: Clock | None = None) -> None:
        self._edge = edge
        self._link = EmulatedLink(link, clock) if link else None

    def request(self, frame: bytes) -> bytes:
        if self._link:
            self._link.up(len(frame))
        reply, _ = self._edge.handle(frame)
        if self._link:
            self._link.down(len(reply))
        return reply

    def close(self) -> None:
        pass


class TcpTransport:
    """One persistent connection to `serve`, with `link` emulated on top where given.

    The connection is opened by the first request and again after a failure.
    """

    def __init__(self, host: str, port: int, link: Link | None = None, clock: Clock | None = None) -> None:
        self._address = (host, port)
        self._link = EmulatedLink(link, clock) if link else None
        self._socket: socket.socket | None = None

    @classmethod
    def at(cls, address: str) -> TcpTransport:
        """The transport to `HOST:PORT`.

        Raises:
            ParamsError: `address` is not of that form.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ParamsError(f"edge address {address!r} is not HOST:PORT; give for instance 127.0.0.1:7070.")
        return cls(host.strip("[]"), int(port))

    def request(self, frame: bytes) -> bytes:
        """Send one frame and wait for its reply.

        Raises:
            EdgeUnreachable: no connection, or it broke or stayed silent; after a break one new connection is tried.
            FrameError: what came back does not begin like a frame.
        """
        if self._link:
            self._link.up(len(frame))
        kept = self._socket is not None
        try:
            reply = self._exchange(frame)
        except ConnectionError as error:
            if not kept:
                raise self._unreachable(error) from error
            reply = self._again(frame)  # an edge that restarted or tired of waiting has dropped the old connection
        except OSError as error:
            raise self._unreachable(error) from error
        if self._link:
            self._link.down(len(reply))
        return reply

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _again(self, frame: bytes) -> bytes:
        try:
            return self._exchange(frame)
        except OSError as error:
            raise self._unreachable(error) from error

    def _exchange(self, frame: bytes) -> bytes:
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, CONNECT_TIMEOUT_S)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket.settimeout(REPLY_TIMEOUT_S)
            self._socket.sendall(frame)
            reply = receive_frame(self._socket)
        except BaseException:
            self.close()  # whatever is still under way would be taken for the next reply
            raise
        if reply is None:
            self.close()
            raise ConnectionResetError("it closed the connection")
        return reply

    def _unreachable(self, error: OSError) -> EdgeUnreachable:
        host, port = self._address
        return EdgeUnreachable(f"edge {host}:{port} does not answer ({error}); start it with `coinfer edge` or check the address.")


def receive_frame(connection: socket.socket) -> bytes | None:
    """The bytes of the next frame, unchecked beyond its header; None where the sender has closed between frames.

    Raises:
        FrameError: no frame begins like this.
        OSError: the connection broke or timed out; also when it closed inside a frame.
    """
    header = _receive(connection, HEADER_BYTES)
    if not header:
        return None
    rest = _receive(connection, frame_bytes(header) - HEADER_BYTES)
    return header + rest


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        if not (chunk := connection.recv(min(count - len(data), 1 << 16))):
            if not data:
                return b""
            raise ConnectionResetError("it closed the connection inside a frame")
        data += chunk
    return bytes(data)
