"""The edge half: frames in, replies out, and a small TCP server around it."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import socket
import socketserver
import struct
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CoinferError, FrameError
from pipeline.runtime.bundle import EDGE, Bundle
from pipeline.runtime.coder import decode
from pipeline.runtime.frame import Frame, Kind, pack, unpack
from pipeline.runtime.images import open_lazily
from pipeline.runtime.timing import Stopwatch, timed
from pipeline.runtime.transport import receive_frame

IDLE_TIMEOUT_S = 300.0
START_TIMEOUT_S = 60.0
REPLY_TIMES = struct.Struct("<ff")  # decode_ms, edge_ms, before the logits (little-endian float32 like them)


class EdgeHalf:
    """Runs edge.onnx on what device halves of the same bundle send. Safe to call from several threads.

    Raises:
        BundleError: the bundle has no edge half.
    """

    def __init__(self, bundle: Bundle, threads: int = 1, slowdown: float = 1.0) -> None:
        self._bundle = bundle
        self._session = bundle.session(EDGE, threads)
        self._input = self._session.get_inputs()[0].name
        self._slowdown = slowdown
        self._expects = Kind.IMAGE if bundle.kind == "edge-only" else Kind.SYMBOLS
        if bundle.kind == "split":
            for tables in bundle.points:
                _ = tables.entry_array, tables.predictor_arrays  # derived here, not while the first frame waits

    def handle(self, frame: bytes) -> tuple[bytes, dict[str, float]]:
        """The reply frame to one frame, and {"decode_ms", "edge_ms"}. What cannot be answered gets an ERROR frame saying why."""
        try:
            logits, parts = timed(lambda watch: self._answer(frame, watch), self._slowdown)
        except CoinferError as error:
            return pack(str(error).encode(), self._bundle.bundle_id, Kind.ERROR), {}
        payload = REPLY_TIMES.pack(parts["decode_ms"], parts["edge_ms"]) + logits.astype("<f4").tobytes()
        return pack(payload, self._bundle.bundle_id, Kind.REPLY), parts

    def _answer(self, frame: bytes, watch: Stopwatch) -> NDArray[np.float32]:
        with watch.part("decode_ms"):
            received = self._open(unpack(frame))
        with watch.part("edge_ms"):
            batch = self._bundle.preprocessing.tensor(received) if self._expects is Kind.IMAGE else received
            logits: NDArray[np.float32] = self._session.run(None, {self._input: batch})[0]
        return logits

    def _open(self, frame: Frame) -> NDArray[np.uint8]:
        if frame.bundle_id != self._bundle.bundle_id:
            raise FrameError(
                f"frame is for bundle {frame.bundle_id.hex()}, this edge runs {self._bundle.bundle_id.hex()}; give device and edge the same bundle."
            )
        if frame.kind is not self._expects:
            raise FrameError(f"frame carries {frame.kind.name}, this {self._bundle.kind} bundle takes {self._expects.name}; check what the device sends.")
        if self._expects is Kind.IMAGE:
            return self._decode_image(frame.payload)
        point, payload = 0, frame.payload
        if len(self._bundle.points) > 1:
            point, payload = payload[0] if payload else len(self._bundle.points), payload[1:]
            if point >= len(self._bundle.points):
                raise FrameError(f"frame names no operating point of this bundle, which has {len(self._bundle.points)}; check what the device sends.")
        return decode(payload, self._bundle.code_shape, self._bundle.points[point])[None]

    def _decode_image(self, payload: bytes) -> NDArray[np.uint8]:
        size = self._bundle.preprocessing.image_size
        try:
            with open_lazily(payload, self._bundle.image_format, self._bundle.quality) as image:
                if image.size != (size, size):  # known before a pixel is decoded, so no small file can fill the memory
                    raise FrameError(f"image is {image.size[0]}x{image.size[1]} where the bundle takes {size}x{size}; send what its preprocessing gives.")
                return self._bundle.preprocessing.pixels(image)[None]
        except FrameError:
            raise
        except Exception as error:  # Pillow raises many unrelated kinds on bytes that are no image
            raise FrameError(f"payload of {len(payload)} bytes is no {self._bundle.image_format} image ({error}); send the image again.") from error


class _Connection(socketserver.BaseRequestHandler):
    server: _EdgeServer
    request: socket.socket

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request.settimeout(IDLE_TIMEOUT_S)
        with contextlib.suppress(OSError):  # a client that leaves in any way ends its own thread only
            try:
                while (frame := receive_frame(self.request)) is not None:
                    self.request.sendall(self.server.edge.handle(frame)[0])
            except FrameError as error:  # where the next frame begins is unknown now
                self.request.sendall(pack(str(error).encode(), self.server.bundle_id, Kind.ERROR))


class _EdgeServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], edge: EdgeHalf, bundle_id: bytes) -> None:
        self.edge = edge
        self.bundle_id = bundle_id
        super().__init__(address, _Connection)


def serve(
    bundle: Bundle,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    threads: int = 1,
    slowdown: float = 1.0,
    announce: Callable[[int], object] = lambda port: print(f"edge listens on port {port}", flush=True),
) -> None:
    """Answer device halves until Ctrl-C. Port 0 takes a free one; `announce` is told which.

    Raises:
        BundleError: the bundle has no edge half.
        CoinferError: the address cannot be bound.
    """
    edge = EdgeHalf(bundle, threads, slowdown)
    try:
        server = _EdgeServer((host, port), edge, bundle.bundle_id)
    except (OSError, OverflowError) as error:
        raise CoinferError(f"edge cannot listen on {host}:{port} ({error}); choose another port or address.") from error
    with server, contextlib.suppress(KeyboardInterrupt):
        announce(server.server_address[1])
        server.serve_forever()


@contextlib.contextmanager
def edge_process(bundle: Bundle, threads: int = 1, slowdown: float = 1.0) -> Iterator[int]:
    """`serve` in a process of its own on 127.0.0.1; yields its port and ends it afterwards.

    Raises:
        CoinferError: the process did not come up.
    """
    context = multiprocessing.get_context("spawn")  # a fork would carry over the parent's thread pools in a broken state
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve_child, args=(bundle.path, threads, slowdown, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        try:
            port = ours.recv() if ours.poll(START_TIMEOUT_S) else "no answer in time"
        except EOFError:
            port = "it ended"
        if not isinstance(port, int):
            raise CoinferError(f"edge process did not start: {port}; run `coinfer edge` with {bundle.path} to see more.")
        yield port
    finally:
        process.terminate()
        process.join()
        process.close()
        ours.close()


def _serve_child(path: Path, threads: int, slowdown: float, ready: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process in its own order
    try:
        serve(Bundle.load(path), threads=threads, slowdown=slowdown, announce=ready.send)
    except CoinferError as error:
        ready.send(str(error))
