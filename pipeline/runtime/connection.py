"""One connection of a device to an edge server."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.errors import FrameError
from pipeline.runtime.frame import OVERHEAD_BYTES, Kind, pack
from pipeline.runtime.framing import KIND_BYTE, Compact, Framing, Whole
from pipeline.runtime.guard import common_name
from pipeline.runtime.hello import HEAD_BYTES, HELLO_1, Hello, hello_bytes
from pipeline.runtime.tally import Refusal

if TYPE_CHECKING:
    from pipeline.runtime.server import EdgeServer

HANDSHAKE_S = 10.0
PARTING_S = 1.0
NOBODY = bytes(4)  # the bundle id of what a server says that runs several


def refusal(reason: str, bundle_id: bytes = NOBODY) -> bytes:
    return pack(reason.encode(), bundle_id, Kind.ERROR)


class Client(asyncio.Protocol):
    """One connection: its frames are answered one after another, in their order. With keys it comes plain, and counts while both sides show theirs."""

    transport: asyncio.Transport

    def __init__(self, server: EdgeServer) -> None:
        self.server = server
        self.address = self.certified = ""
        self.hello: Hello | None = None
        self._alone = 0  # pictures, as the hello said, until an answer has told the device that this was heard
        self._handshake: asyncio.Task[None] | None = None
        self._framing: Framing = Whole()
        self._buffer = bytearray()
        self._has_begun = self._is_busy = self._is_paused = self._is_unread = self._is_ending = self._is_parting = False
        self._heard_s = self._began_s = time.perf_counter()

    @property
    def name(self) -> str:
        """Who it is, as far as that is known for sure."""
        return self.hello.device if self.hello and self.server.keys else self.address

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.address = str((transport.get_extra_info("peername") or ("",))[0])
        if self.server.is_stopping:
            transport.close()
        elif len(self.server.clients) >= self.server.limits.connections:
            self.server.tally.refused(Refusal.CONNECTIONS)
            if not self.server.keys:  # with them it is told nothing, which would take a handshake
                self._say(refusal("the edge has too many connections; try again later."))
            transport.close()
        else:
            self.server.clients.add(self)
            if self.server.keys:
                self._handshake = self.server.loop.create_task(self._shake_hands(self.server.keys.context))

    async def _shake_hands(self, context: ssl.SSLContext) -> None:
        secured = None
        if self.is_there():
            with contextlib.suppress(OSError):
                secured = await self.server.loop.start_tls(self.transport, self, context, server_side=True, ssl_handshake_timeout=HANDSHAKE_S)
        self._handshake = None
        if secured is None:
            return self.connection_lost(None)
        self.transport, self.certified = secured, common_name(secured.get_extra_info("peercert"))
        self.data_received(b"")  # what has come with the end of the handshake

    def connection_lost(self, error: Exception | None) -> None:
        self.server.clients.discard(self)

    def is_there(self) -> bool:
        return not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        if self._is_parting or not self.is_there():
            return
        self._heard_s = time.perf_counter()
        self.server.tally.carried("in", len(data))
        if not self._buffer:
            self._began_s = self._heard_s
        self._buffer += data
        self._next()
        if len(self._buffer) > self._most_bytes and not self._handshake:
            self._is_paused = True
            self.transport.pause_reading()

    @property
    def _most_bytes(self) -> int:
        return self.server.limits.payload_bytes + OVERHEAD_BYTES

    def _next(self) -> None:
        """Take the next frame, if it is there and it is time."""
        if self._is_busy or self._is_unread or self._is_parting or self._handshake or not self.is_there():
            return
        try:
            message = self._message()
        except FrameError as error:  # where the next message begins is unknown now
            return self._part(Refusal.FRAME, str(error))
        if message is not None:
            self._is_busy = True
            try:
                if reason := self.server.over_rate(self.name):
                    self.told(refusal(reason))
                else:
                    self.server.take(self._framing.incoming(message), self)
            except FrameError as error:
                self.server.tally.refused(Refusal.FRAME)
                self.told(refusal(str(error)))
        elif self._is_ending and not self._is_parting:
            if self._buffer and not self.server.is_stopping:
                self.server.tally.refused(Refusal.FRAME)
            self.transport.close()
        if self._is_paused and len(self._buffer) <= self._most_bytes:
            self._is_paused = False
            self.transport.resume_reading()

    def _message(self) -> bytes | None:
        """The next message, if all of it is there."""
        if not self._has_begun and self._buffer:
            if self._buffer[0] == HELLO_1:
                data = self._cut(hello_bytes, HEAD_BYTES)
                if data is None:
                    return None
                self.hello = Hello.unpack(data)
                if self.hello.compact:
                    self._framing = Compact(self.hello.bundle_id)
            if self.server.keys and (reason := self.server.keys.refuses(self.hello, self.certified)):
                self._part(Refusal.KEYS, reason)
                return None
            if self.hello and self.hello.device:
                self.server.tally.hello(self.hello)
                self._alone = self.hello.alone
            self._has_begun = True
        return self._cut(self._framing.need, self._framing.head_bytes)

    def _cut(self, need: Callable[[bytes], int], head_bytes: int) -> bytes | None:
        length = need(bytes(self._buffer[:head_bytes]))
        if length > self._most_bytes:
            most = self.server.limits.payload_bytes
            self._part(Refusal.SIZE, f"message of {length} bytes carries more than this edge takes; send payloads of at most {most} bytes.")
        if self._is_parting or len(self._buffer) < length:
            return None
        message = bytes(self._buffer[:length])
        del self._buffer[:length]
        return message

    def told(self, reply: bytes) -> None:
        """The answer to the frame that was taken last."""
        self._is_busy = False
        if self.is_there() and not self._is_parting:
            self._heard_s = self._began_s = time.perf_counter()
            if self.hello and reply[KIND_BYTE] == Kind.REPLY:
                self.server.tally.answered(self.hello.device, alone=self._alone)
                self._alone = 0
            self._say(reply)
            self.server.loop.call_soon(self._next)

    def _say(self, frame: bytes) -> None:
        message = self._framing.outgoing(frame)
        self.server.tally.carried("out", len(message))
        self.transport.write(message)

    def pause_writing(self) -> None:
        """A client that reads no replies gets no more of them."""
        self._is_unread = True

    def resume_writing(self) -> None:
        self._is_unread = False
        self._next()

    def eof_received(self) -> bool:
        """Stay open to answer what came before the end, which TLS has no means for."""
        if self._is_parting:
            self.transport.close()
        self.close_when_idle()
        return self.server.keys is None

    def close_when_idle(self) -> None:
        """Once all frames that are there are answered."""
        self._is_ending = True
        if self._handshake:
            self.transport.abort()
        self._next()

    def sweep(self, now_s: float) -> None:
        """Close a connection that is silent, that trickles, or whose device does not belong any more."""
        silent, slow = now_s - self._heard_s > self.server.limits.idle_s, self._buffer and now_s - self._began_s > self.server.limits.partial_s
        if not self._is_busy and (silent or slow):
            self.transport.abort()
        elif self._has_begun and not self._is_parting and self.server.keys and (reason := self.server.keys.refuses(self.hello, self.certified)):
            self._part(Refusal.KEYS, reason)

    def _part(self, reason: Refusal, text: str) -> None:
        """Close so that the last word arrives: the client may still be sending, and what is not read would reset the connection."""
        self._is_parting = True
        self._buffer.clear()
        if self._is_paused:
            self.transport.resume_reading()
        self.server.tally.refused(reason)
        self._say(refusal(text))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.server.loop.call_later(PARTING_S, self.transport.abort)
