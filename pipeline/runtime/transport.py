"""How a frame reaches the edge and its reply comes back: one method, over TCP or inside one process."""

from __future__ import annotations

import queue
import select
import socket
import ssl
import threading
import time
from dataclasses import replace
from typing import Any, Protocol

from pipeline.costs.link import Link, Serialiser, wire_bytes
from pipeline.errors import CoinferError
from pipeline.runtime.frame import Kind
from pipeline.runtime.framing import KIND_BYTE, Compact, Framing, Whole
from pipeline.runtime.hello import Hello

CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 60.0
MOST_SAID = 500  # characters of an edge's reason that a sentence repeats
TLS_RECORD_BYTES, TLS_OVERHEAD_BYTES = 1 << 14, 22  # of TLS 1.3: header, content type, tag
WHOLE = Whole()


class EdgeUnreachable(CoinferError):
    """The edge does not answer; a device can still classify alone."""


def distrust(address: str, reason: str) -> EdgeUnreachable:
    return EdgeUnreachable(
        f"edge {address} and this device do not trust each other ({reason}); look at the dates and names in the keys; `coinfer keys` makes others."
    )


def excerpt(text: str) -> str:
    """What another machine said, in one line of bounded length, as each picture's record may repeat it."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:MOST_SAID]) + ("..." if len(text) > MOST_SAID else "")


class Transport(Protocol):
    """Carries one frame to an edge half and brings its reply, or raises EdgeUnreachable once `timeout_s` are over."""

    alone: int  # pictures that went without the edge, to be told it

    def request(self, frame: bytes, timeout_s: float = REPLY_TIMEOUT_S) -> bytes: ...

    def message_bytes(self, frame: bytes) -> int:
        """What a frame takes, before the headers of TCP/IP."""
        ...

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

    alone = 0

    def __init__(self, edge: FrameHandler, link: Link | None = None, clock: Clock | None = None) -> None:
        self._edge = edge
        self._link = EmulatedLink(link, clock) if link else None

    def request(self, frame: bytes, timeout_s: float = REPLY_TIMEOUT_S) -> bytes:
        if self._link:
            self._link.up(len(frame))
        reply, _ = self._edge.handle(frame)
        if self._link:
            self._link.down(len(reply))
        return reply

    def message_bytes(self, frame: bytes) -> int:
        return len(frame)

    def close(self) -> None:
        pass


class TcpTransport:
    """One persistent connection to `serve`, with `link` emulated on top where given.

    The connection is opened by the first request and again after a failure.

    Args:
        hello: what is said first on each connection, and whether frames are compact; None: nothing, and whole ones.
        tls: how the connection is secured; None: not at all.
    """

    def __init__(
        self, host: str, port: int, link: Link | None = None, clock: Clock | None = None, *, hello: Hello | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._address = (host, port)
        self._link = EmulatedLink(link, clock) if link else None
        self._hello, self._tls = hello, tls
        self._framing: Framing = Compact(hello.bundle_id) if hello and hello.compact else WHOLE
        self._socket: socket.socket | None = None
        self._resolved: list[tuple[socket.AddressFamily, Any]] = []
        self.alone = self._told = 0  # the latter on this connection, which the edge counts once it has answered

    def request(self, frame: bytes, timeout_s: float = REPLY_TIMEOUT_S) -> bytes:
        """Send one frame and wait for its reply; an emulated link's waits come on top of the timeout.

        Raises:
            EdgeUnreachable: no connection, or it broke, or no whole reply came in time; after a break one new connection is tried.
            FrameError: what came back does not begin like a frame.
        """
        message = self._framing.outgoing(frame)
        if self._link:
            self._link.up(len(message))
        if self._socket is not None and _has_more(self._socket):
            self.close()  # it has ended, or holds what would be taken for the next reply
        kept = self._socket is not None
        end_s = time.monotonic() + timeout_s
        try:
            reply = self._exchange(message, end_s)
        except (ConnectionError, ssl.SSLEOFError) as error:
            if not kept:
                raise self._unreachable(error) from error
            reply = self._again(message, end_s)  # an edge that restarted or tired of waiting has dropped the old connection
        except OSError as error:
            raise self._unreachable(error) from error
        if self._link:
            self._link.down(len(reply))
        answer = self._framing.incoming(reply)
        if answer[KIND_BYTE] == Kind.REPLY:
            self.alone, self._told = self.alone - self._told, 0
        return answer

    def message_bytes(self, frame: bytes) -> int:
        length = len(self._framing.outgoing(frame))
        return length + TLS_OVERHEAD_BYTES * -(-length // TLS_RECORD_BYTES) if self._tls else length

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _again(self, message: bytes, end_s: float) -> bytes:
        try:
            return self._exchange(message, end_s)
        except OSError as error:
            raise self._unreachable(error) from error

    def _exchange(self, message: bytes, end_s: float) -> bytes:
        greeting = b""
        try:
            if self._socket is None:
                self._socket = self._connect(end_s)
                if self._hello:
                    greeting, self._told = replace(self._hello, alone=self.alone).pack(), self.alone
            self._socket.settimeout(_left_s(end_s))
            self._socket.sendall(greeting + message)
            reply = receive_message(self._socket, self._framing, end_s)
        except BaseException:
            self.close()  # whatever is still under way would be taken for the next reply
            raise
        if reply is None:
            self.close()
            raise ConnectionResetError("it closed the connection")
        return reply

    def _connect(self, end_s: float) -> socket.socket:
        failure: OSError = OSError("its name has no address")
        for family, address in self._addresses(end_s):
            connection = socket.socket(family, socket.SOCK_STREAM)
            try:
                connection.settimeout(min(CONNECT_TIMEOUT_S, _left_s(end_s)))
                connection.connect(address)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls:
                    connection.settimeout(min(CONNECT_TIMEOUT_S, _left_s(end_s)))
                    connection = self._tls.wrap_socket(connection, server_hostname=self._address[0])
                return connection
            except OSError as error:
                connection.close()
                failure = error
        self._resolved = []  # it may have moved
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame: a cycle, which would keep the caller's picture until the garbage collector comes

    def _addresses(self, end_s: float) -> list[tuple[socket.AddressFamily, Any]]:
        """Of the host; asked for in a thread, as looking up a name cannot be given up."""
        if not self._resolved:
            found: queue.SimpleQueue[Any] = queue.SimpleQueue()

            def look_up() -> None:
                try:
                    found.put([(family, address) for family, _, _, _, address in socket.getaddrinfo(*self._address, type=socket.SOCK_STREAM)])
                except OSError as error:
                    found.put(error)

            threading.Thread(target=look_up, daemon=True).start()
            try:
                answer = found.get(timeout=min(CONNECT_TIMEOUT_S, _left_s(end_s)))
            except queue.Empty:
                raise TimeoutError("its name could not be looked up in time") from None
            if isinstance(answer, OSError):
                try:
                    raise answer
                finally:
                    del answer  # as in `_connect`
            self._resolved = answer
        return self._resolved

    def _unreachable(self, error: OSError) -> EdgeUnreachable:
        host, port = self._address
        if isinstance(error, ssl.SSLEOFError):
            error = ConnectionResetError("it closed the connection")
        if isinstance(error, ssl.SSLError):
            reason = getattr(error, "verify_message", "") or error.reason or str(error)
            return distrust(f"{host}:{port}", reason)
        checks = "check address and keys" if self._tls else "check the address"
        return EdgeUnreachable(f"edge {host}:{port} does not answer ({error}); start it with `coinfer edge` or {checks}.")


def receive_frame(connection: socket.socket, end_s: float | None = None) -> bytes | None:
    """`receive_message` of whole frames, unchecked beyond their headers."""
    return receive_message(connection, WHOLE, end_s)


def receive_message(connection: socket.socket, framing: Framing, end_s: float | None = None) -> bytes | None:
    """The bytes of the next message; None where the sender has closed between messages.

    All of it has to come before the moment `end_s` of `time.monotonic`; without one, each part within the connection's own timeout.

    Raises:
        FrameError: no message begins like this.
        OSError: the connection broke or timed out; also when it closed inside a message.
    """
    data = b""
    while len(data) < (need := framing.need(data)):
        if not (more := _receive(connection, need - len(data), end_s)):
            if not data:
                return None
            raise ConnectionResetError("it closed the connection inside a frame")
        data += more
    return data


def _has_more(connection: socket.socket) -> bool:
    """Whether something, be it the end, is there to be read."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not isinstance(connection, ssl.SSLSocket) or not (poll.poll(0) or connection.pending()):
        return bool(poll.poll(0))
    connection.settimeout(0)
    try:
        connection.recv(1)
    except ssl.SSLWantReadError:  # what came was for TLS itself
        return False
    except OSError:
        pass
    return True


def _left_s(end_s: float) -> float:
    if (left_s := end_s - time.monotonic()) <= 0:
        raise TimeoutError("timed out")
    return left_s


def _receive(connection: socket.socket, count: int, end_s: float | None) -> bytes:
    data = bytearray()
    while len(data) < count:
        if end_s is not None:
            connection.settimeout(_left_s(end_s))
        if not (chunk := connection.recv(min(count - len(data), 1 << 16))):
            if not data:
                return b""
            raise ConnectionResetError("it closed the connection inside a frame")
        data += chunk
    return bytes(data)
