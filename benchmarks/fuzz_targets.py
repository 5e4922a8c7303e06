"""What hostile inputs are given to, and what must hold of it whatever they are: errors that say what is wrong, or right answers, and nothing else."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz_bundles import Target, bundles, must, sent
from benchmarks.fuzz_inputs import bundle_like, checked, damaged, frame_like, header, packed, payload_like, pieces, unpacked
from benchmarks.fuzz_stream import ANSWER_TIMEOUT_S, Stream
from pipeline.errors import CoinferError, FrameError
from pipeline.runtime import coder, rans_twin
from pipeline.runtime.bundle import Bundle
from pipeline.runtime.coder import build_embedded_tables, build_tables, decode, encode
from pipeline.runtime.context import fit_contexts
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import REPLY_TIMES, EdgeHalf
from pipeline.runtime.frame import HEADER_BYTES, OVERHEAD_BYTES, Frame, Kind, frame_bytes, pack, unpack
from pipeline.runtime.transport import EdgeUnreachable, TcpTransport, receive_frame
from tests.pipeline.runtime.conftest import CLASSES, CODE, SIZE


class Frames:
    """One frame to one edge half; the first byte says which."""

    def __init__(self, folder: Path) -> None:
        self._bundles = [bundle for bundle in bundles(folder) if bundle.kind != "device-only"]
        self._halves = [EdgeHalf(bundle) for bundle in self._bundles]
        self._seeds = [sent(bundle) for bundle in self._bundles]
        self._payloads = [frame.payload for frames in self._seeds for frame in frames]
        self._ids = [bundle.bundle_id for bundle in self._bundles]

    def generate(self, rng: random.Random) -> tuple[bytes, bool]:
        which = rng.randrange(len(self._halves))
        frame, what = rng.choice(self._seeds[which]), rng.random()
        if what < 0.04:
            return bytes([which]) + damaged(pack(frame.payload, frame.bundle_id, frame.kind), rng), False
        if what < 0.06:
            return bytes([which]) + rng.randbytes(rng.randrange(60)), False
        if what < 0.07:
            return bytes([which]) + pack(frame.payload, frame.bundle_id, frame.kind), False
        return bytes([which]) + frame_like(frame, self._payloads, self._ids, rng), True

    def check(self, data: bytes) -> str:
        which = data[0] % len(self._halves)
        half, bundle, frame = self._halves[which], self._bundles[which], data[1:]
        try:
            opened = unpack(frame)
        except FrameError:
            opened = None
        else:
            must(pack(opened.payload, opened.bundle_id, opened.kind) == frame, "another frame opens to the same")
        try:
            must(frame_bytes(frame[:HEADER_BYTES]) >= OVERHEAD_BYTES, "a frame shorter than its header")
        except FrameError:
            must(opened is None, "a frame without a length was opened")
        reply = unpack(half.handle(frame)[0])
        must(reply.bundle_id == bundle.bundle_id, "a reply of another bundle")
        if reply.kind is Kind.ERROR:
            must(reply.payload.decode().endswith("."), "a refusal that is no sentence")
            return "refused"
        must(reply.kind is Kind.REPLY and len(reply.payload) == REPLY_TIMES.size + 4 * len(CLASSES), "no reply")
        must(np.isfinite(np.frombuffer(reply.payload, "<f4")).all(), "a reply of no numbers")
        must(opened is not None and opened.bundle_id == bundle.bundle_id, "a frame for others was answered")
        if bundle.kind == "split":
            point, payload = (opened.payload[0], opened.payload[1:]) if len(bundle.points) > 1 else (0, opened.payload)
            symbols, tables = half.open(frame)[0], bundle.points[point]
            must(tables.embedded or symbols.max() < tables.levels, "a symbol is out of range")
            must(encode(symbols, tables) == payload, "two payloads for the same symbols")
        return "answered"

    def close(self) -> None:
        pass


class Coder:
    """One payload to the coder in C and to its twin in Python; the first byte says with which tables."""

    def __init__(self, folder: Path) -> None:
        del folder
        rng, self._cases, self._seeds = np.random.default_rng(0), [], []
        for bits, shape, kind in (
            (3, CODE, ""),
            (1, (3, 2, 2), ""),
            (8, (2, 3, 3), ""),
            (3, CODE, "contexts"),
            (5, (3, 3, 5), "contexts"),
            (8, CODE, "embedded"),
        ):
            symbols = np.clip(rng.normal((1 << bits) / 2, (1 << bits) / 6, (20, *shape)), 0, (1 << bits) - 1).astype(np.uint8)
            tables = build_embedded_tables(symbols, shape[0], 2) if kind == "embedded" else build_tables(symbols, bits, fit_contexts(symbols) if kind else None)
            self._cases.append((shape, tables))
            self._seeds.append([encode(each, tables) for each in symbols])
        must(coder.HAVE_C, "there is no coder in C to compare with")

    def generate(self, rng: random.Random) -> tuple[bytes, bool]:
        which = rng.randrange(len(self._cases))
        return bytes([which]) + payload_like(rng.choice(self._seeds[which]), self._seeds[which], rng), False

    def check(self, data: bytes) -> str:
        (shape, tables), payload = self._cases[data[0] % len(self._cases)], data[1:]
        sizes = shape[1] * shape[2], tables.levels, tables.precision, shape[2], tables.contexts
        arguments = payload, tables.freq_array, tables.entry_array, *tables.predictor_arrays, *sizes
        found = [_outcome(function, *arguments) for function in (coder._decode, rans_twin.decode)]
        must(found[0] == found[1], f"C says {found[0]!r}, its twin {found[1]!r}")
        try:
            symbols = decode(payload, shape, tables)
        except FrameError:
            must(isinstance(found[0], str), "refused what both decode")
            return "refused"
        must(encode(symbols, tables) == payload, "two payloads for the same symbols")
        return "answered"

    def close(self) -> None:
        pass


def _outcome(function: Callable[..., bytes], *arguments: Any) -> bytes | str:
    try:
        return function(*arguments)
    except ValueError as error:
        return str(error)


class Replies:
    """What an edge answers one picture, to the device half that asked. The first byte says which half; the second how the reply comes.

    0: as bytes; 1: through a socket, cut as networks do; 2: the same, to a `TcpTransport`, of an edge that then closes.
    """

    def __init__(self, folder: Path) -> None:
        self._bundles = [bundle for bundle in bundles(folder) if bundle.kind != "device-only"]
        self._devices = [DeviceHalf(bundle) for bundle in self._bundles]
        self._picture = np.zeros(self._devices[0].shape, np.uint8)
        self._seeds = [_replies(bundle) for bundle in self._bundles]
        self._ids = [bundle.bundle_id for bundle in self._bundles]
        numbers = (0.0, -1.0, 1e38, float("nan"), float("inf"), -float("inf"))
        self._payloads = [REPLY_TIMES.pack(a, b) + np.array([c, d, 1.0], "<f4").tobytes() for a in numbers for b in numbers for c in numbers for d in numbers]
        self._payloads += [b"", b"\xff\xfe", "eine Absage.".encode("utf-16"), b"x" * 100_000]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._next = b""
        threading.Thread(target=self._answer, daemon=True).start()

    def generate(self, rng: random.Random) -> tuple[bytes, bool]:
        which, what = rng.randrange(len(self._devices)), rng.random()
        reply, how = rng.choice(self._seeds[which]), rng.choices((0, 1, 2), (0.7, 0.28, 0.02))[0]
        start = bytes([which, how])
        if what < 0.1:
            return start + damaged(pack(reply.payload, reply.bundle_id, reply.kind), rng), False
        if what < 0.13:
            return start + rng.randbytes(rng.randrange(80)), False
        if what < 0.2:
            return start + header(rng.randrange(1 << 24), reply.bundle_id, rng), False
        if what < 0.3:
            return start + checked(pack(rng.choice(self._payloads), reply.bundle_id, Kind(rng.choice((3, 4))))[:-4]), True
        return start + frame_like(reply, self._payloads, self._ids, rng), True

    def check(self, data: bytes) -> str:
        device, bundle, reply = self._devices[data[0] % len(self._devices)], self._bundles[data[0] % len(self._devices)], data[2:]
        transport: Any = TcpTransport(*self._listener.getsockname()) if data[1] == 2 else _Given(reply, data[1] == 1)
        self._next = reply
        try:
            answer = device.classify(self._picture, transport, 1e3 * ANSWER_TIMEOUT_S)
        except (FrameError, EdgeUnreachable) as error:
            must("timed out" not in str(error), "a reply that was there was waited for")
            return "refused"
        finally:
            transport.close()
        must(answer.logits.shape == (len(bundle.classes),) and np.isfinite(answer.logits).all(), "an answer of no numbers")
        must(all(np.isfinite(value) and value >= 0 for value in answer.parts.values()), "times that are none")
        return "answered"

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            with connection, contextlib.suppress(OSError):  # the device has heard enough
                receive_frame(connection)
                for chunk in _chunks(self._next):
                    connection.sendall(chunk)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _replies(bundle: Bundle) -> list[Frame]:
    """What an edge answers the frames of `sent`."""
    half = EdgeHalf(bundle)
    return [unpack(half.reply(half.run(half.open(pack(frame.payload, frame.bundle_id, frame.kind)))[0], 0.5, 1.5)) for frame in sent(bundle)]


def _chunks(reply: bytes) -> Iterator[bytes]:
    """As a network may cut it; what many small pieces of would fill a socket's buffer comes at once."""
    return pieces(reply, random.Random(zlib.crc32(reply))) if len(reply) < 5000 else iter([reply])


class _Given:
    """A transport whose edge has answered already."""

    def __init__(self, reply: bytes, through_a_socket: bool) -> None:
        self._reply, self._through_a_socket = reply, through_a_socket

    def message_bytes(self, frame: bytes) -> int:
        return len(frame)

    def request(self, frame: bytes, timeout_s: float) -> bytes:
        if not self._through_a_socket:
            return self._reply
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(timeout_s)
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            theirs.settimeout(timeout_s)
            for chunk in _chunks(self._reply):
                theirs.sendall(chunk)
            theirs.close()
            try:
                found = receive_frame(ours)
            except OSError as error:
                raise EdgeUnreachable(str(error)) from error
            if found is None:
                raise EdgeUnreachable("closed")
            return found

    def close(self) -> None:
        pass


class Loader:
    """The files of a bundle, to whatever opens and runs one."""

    def __init__(self, folder: Path) -> None:
        self._seeds = [{path.name: path.read_bytes() for path in bundle.path.iterdir()} for bundle in bundles(folder / "seeds")]
        self._path = folder / "tried"
        self._picture = np.zeros((3, SIZE, SIZE), np.uint8)

    def generate(self, rng: random.Random) -> tuple[bytes, bool]:
        return packed(bundle_like(rng.choice(self._seeds), rng)), True

    def check(self, data: bytes) -> str:
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.mkdir()
        for name, contents in unpacked(data).items():
            (self._path / name).write_bytes(contents)
        try:
            bundle = Bundle.load(self._path)
            device = DeviceHalf(bundle)
            if bundle.kind == "device-only":
                device.classify_locally(self._picture)
                return "answered"
            half = EdgeHalf(bundle)
            reply = unpack(half.handle(device.run(self._picture)[0])[0])
        except CoinferError as error:
            must(str(error), "no word of what is wrong")
            return "refused"
        return "answered" if reply.kind is Kind.REPLY else "refused"

    def close(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


TARGETS: dict[str, tuple[Callable[[Path], Target], float]] = {
    "frame": (Frames, 0.6),
    "stream": (Stream, 0.15),
    "reply": (Replies, 0.11),
    "coder": (Coder, 0.11),
    "loader": (Loader, 0.03),
}
