"""The TCP stream as a target: what clients send, to a real server on a loop of its own, without a socket and now and then through one."""

from __future__ import annotations

import asyncio
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.fuzz_bundles import bundles, must, sent
from benchmarks.fuzz_inputs import damaged, frame_like, header, pieces
from pipeline.errors import FrameError
from pipeline.runtime.edge import REPLY_TIMES, EdgeHalf
from pipeline.runtime.frame import OVERHEAD_BYTES, Kind, pack, unpack
from pipeline.runtime.framing import Compact, Framing, Whole
from pipeline.runtime.hello import HELLO_1, Hello, hello_bytes
from pipeline.runtime.lane import Batching
from pipeline.runtime.server import EdgeServer, Limits
from pipeline.runtime.shelf import Shelf

ANSWER_TIMEOUT_S = 5.0
TOLERANCE = 1e-4


class _Loop(asyncio.SelectorEventLoop):
    """Remembers what a server makes its protocols with, so that they can be spoken to without a socket."""

    factory: Callable[[], Any]

    async def create_server(self, protocol_factory: Callable[[], Any], *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        self.factory = protocol_factory
        return await super().create_server(protocol_factory, *arguments, **options)


class _Wire(asyncio.Transport):
    """The server's end of a connection without a socket. Now and then its buffer is full for a turn of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: Any, rng: random.Random) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.loop, self.protocol, self.rng = loop, protocol, rng
        self.written, self.is_paused, self.lost = bytearray(), False, asyncio.Event()
        self.peer_has_ended = self.has_ended = self._closing = False

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self.loop.call_soon(self._lose)

    abort = close

    def _lose(self) -> None:
        self.protocol.connection_lost(None)
        self.lost.set()

    def write(self, data: Any) -> None:
        must(not self._closing and not self.has_ended, "written after the end")
        self.written += data
        if self.rng.random() < 0.1:
            self.protocol.pause_writing()
            self.loop.call_soon(lambda: None if self._closing else self.protocol.resume_writing())

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_ended = True
        if self.peer_has_ended:  # whom the end reaches closes
            self.close()

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False


class Stream:
    """What a client sends on one connection, to a server of several bundles.

    The first byte says whether it goes through a socket (1) and whether the client waits for its answers or is gone at once (2); how the network cuts the
    rest is a function of it.
    """

    most_bytes = 4096
    sockets: ClassVar[float] = 0.02

    def __init__(self, folder: Path) -> None:
        made = {bundle.bundle_id: bundle for bundle in bundles(folder / "shelf") if bundle.kind != "device-only"}
        self._halves = {name: EdgeHalf(bundle) for name, bundle in made.items()}
        self._seeds = [frame for bundle in made.values() for frame in sent(bundle)]
        self._payloads, self._ids = [frame.payload for frame in self._seeds], list(made)
        shutil.rmtree(folder / "shelf" / "device-only")
        self.loop = _Loop()
        self._server = EdgeServer(Batching(), Limits(payload_bytes=self.most_bytes, per_second=1e12))
        started: asyncio.Future[int] = self.loop.create_future()
        self._serving = self.loop.create_task(self._server.serve(Shelf(folder / "shelf"), "127.0.0.1", 0, started.set_result, ()))
        self._port = self.loop.run_until_complete(asyncio.wait_for(started, ANSWER_TIMEOUT_S))

    def generate(self, rng: random.Random) -> tuple[bytes, bool]:
        parts, is_checked, framing = [], False, Whole()
        if rng.random() < 0.4:
            hello, framing = self._hello(rng)
            parts.append(hello if rng.random() < 0.8 else damaged(hello, rng))
        for _ in range(rng.choice((1, 1, 2, 3, 6))):
            frame, what = rng.choice(self._seeds), rng.random()
            whole = framing.outgoing(pack(frame.payload, frame.bundle_id, frame.kind))
            if what < 0.3:
                parts.append(whole)
            elif what < 0.85:
                parts.append(_outgoing(framing, frame_like(frame, self._payloads, self._ids, rng)))
                is_checked = True
            elif what < 0.9:
                parts.append(damaged(whole, rng))
            elif what < 0.94:
                parts.append(whole[: rng.randrange(len(whole))])
            elif what < 0.97:
                parts.append(header(rng.choice((self.most_bytes, self.most_bytes + 1, 1 << 20, (1 << 24) - 1)), frame.bundle_id, rng))
            else:
                parts.append(rng.choice((b"GET / HTTP/1.1\r\nHost: edge\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", bytes(100), rng.randbytes(50))))
        how = (rng.random() < self.sockets) | 2 * (rng.random() < 0.1)
        return bytes([how]) + b"".join(parts), is_checked

    def _hello(self, rng: random.Random) -> tuple[bytes, Framing]:
        compact = rng.choice([*self._ids, rng.randbytes(4)]) if rng.random() < 0.6 else b""
        name = rng.choice(("", "camera-1", "../keys", "a" * 65, "\n"))
        version, token = rng.choice(("", "1.0", "1.0", "1.0", "\ud800", "1" * 65)), rng.choice(("", "token", "token", "token", "\ud800"))
        hello = Hello(name, version, token, compact.hex(), rng.choice((0, 1, 1 << 39, 1 << 40, -1)))
        return hello.pack(), Compact(compact) if compact else Whole()

    def check(self, data: bytes) -> str:
        how, stream = data[0], data[1:]
        rng = random.Random(zlib.crc32(stream))
        talk = self._over_a_socket if how & 1 else self._without
        replies, has_stayed = self.loop.run_until_complete(asyncio.wait_for(talk(stream, rng, not how & 2), ANSWER_TIMEOUT_S))
        self._compare(stream, replies, has_stayed)
        return "answered" if replies else "refused"

    async def _without(self, stream: bytes, rng: random.Random, stays: bool) -> tuple[bytes, bool]:
        client = self.loop.factory()
        wire = _Wire(self.loop, client, rng)
        client.connection_made(wire)
        for chunk in pieces(stream, rng):
            while wire.is_paused and not wire.is_closing():
                await asyncio.sleep(0)
            if wire.is_closing():
                break
            client.data_received(chunk)
            if rng.random() < 0.2:
                await asyncio.sleep(0)
        if not stays:
            wire.close()
        elif not wire.is_closing():
            wire.peer_has_ended = True
            if client.eof_received() is not True or wire.has_ended:
                wire.close()
        await wire.lost.wait()
        must(client not in self._server.clients, "the server still counts a client that is gone")
        return bytes(wire.written), stays

    async def _over_a_socket(self, stream: bytes, rng: random.Random, stays: bool) -> tuple[bytes, bool]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            for chunk in pieces(stream, rng):
                writer.write(chunk)
                if rng.random() < 0.2:
                    await asyncio.sleep(0)
            if not stays:
                return b"", False
            writer.write_eof()
            return await reader.read(), True
        except ConnectionError:  # the server had closed before all was sent
            return b"", False
        finally:
            writer.transport.abort()
            await asyncio.sleep(0)

    def _compare(self, stream: bytes, replies: bytes, has_stayed: bool) -> None:
        framing, frames, has_lost_its_way = self._understood(stream)
        found = list(_split(replies, framing))
        expected = len(frames) + has_lost_its_way
        must(len(found) == expected if has_stayed else len(found) <= expected, f"{len(found)} replies to {len(frames)} frames")
        for frame, answer in zip(frames, found, strict=False):
            reply = unpack(answer)
            if frame is None:
                must(reply.kind is Kind.ERROR, f"{reply} to a damaged message")
                continue
            half = self._halves.get(frame[1:5])
            must(reply.bundle_id == frame[1:5], "replies out of order")
            alone = unpack(half.handle(frame)[0]) if half else None
            must(reply.kind is (alone.kind if alone else Kind.ERROR), f"{reply} instead of {alone}")
            if reply.kind is Kind.REPLY and alone:
                ours, theirs = (np.frombuffer(each.payload, "<f4", offset=REPLY_TIMES.size) for each in (reply, alone))
                must(np.allclose(ours, theirs, atol=TOLERANCE), "another frame's reply")
        if has_stayed and has_lost_its_way:
            must(unpack(found[-1]).kind is Kind.ERROR, "closed without a word")

    def _understood(self, stream: bytes) -> tuple[Framing, list[bytes | None], bool]:
        """How what follows the hello is framed, the frames (None: a damaged message), and whether the rest is no message."""
        framing: Framing = Whole()
        frames: list[bytes | None] = []
        at = 0
        try:
            if stream[:1] == bytes([HELLO_1]):
                if len(stream) < (at := hello_bytes(stream)):
                    return framing, frames, False
                if (hello := Hello.unpack(stream[:at])).compact:
                    framing = Compact(hello.bundle_id)
            while (need := framing.need(stream[at : at + framing.head_bytes])) <= len(stream) - at and need <= self.most_bytes + OVERHEAD_BYTES:
                frames.append(_incoming(framing, stream[at : at + need]))
                at += need
        except FrameError:
            return framing, frames, True
        return framing, frames, need > self.most_bytes + OVERHEAD_BYTES

    def close(self) -> None:
        self._server.stop()
        self.loop.run_until_complete(self._serving)
        self.loop.close()


def _outgoing(framing: Framing, frame: bytes) -> bytes:
    """The message that carries a frame; one that no message could carry goes as it is."""
    try:
        return framing.outgoing(frame)
    except FrameError:
        return frame


def _incoming(framing: Framing, message: bytes) -> bytes | None:
    try:
        return framing.incoming(message)
    except FrameError:
        return None


def _split(data: bytes, framing: Framing) -> Iterator[bytes]:
    """The frames of a stream of whole messages."""
    while data:
        need = framing.need(data[: framing.head_bytes])
        yield framing.incoming(data[:need])
        data = data[need:]
