"""What every way to classify takes from image to answer: timed part by part on one core, computed for slower devices and any link, and some of it
measured again through two processes and an emulated link."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import socketserver
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.costs.link import Link, link_ms, reply_frame_bytes
from pipeline.runtime import coder
from pipeline.runtime.bundle import open_session
from pipeline.runtime.coder import CodecTables
from pipeline.runtime.edge import REPLY_TIMES
from pipeline.runtime.frame import OVERHEAD_BYTES, Kind, pack, unpack
from pipeline.runtime.images import Format, encode_image, open_encoded
from pipeline.runtime.preprocess import Preprocessing
from pipeline.runtime.timing import Stopwatch, timed
from pipeline.runtime.transport import TcpTransport, receive_frame

SLOWDOWNS = (10.0, 40.0, 160.0)
RTTS_MS = (2.0, 20.0)
RATES_MBPS = tuple(float(rate) for rate in np.geomspace(0.02, 20, 13))
WARM, TIMED = 2, 4  # calls of a way's turn
PARTS = ("device_ms", "encode_ms", "decode_ms", "edge_ms")
BUNDLE_ID = b"bnch"
INT8 = ", int8"  # ends the name of a way whose device half is

Pixels = NDArray[np.uint8]
Sent = Literal["symbols", "image", "floats", "nothing"]


@dataclass(frozen=True)
class Way:
    """One way to classify: the ONNX halves, and how what crosses becomes bytes and back.

    `device` and `edge` are ONNX files (either may be missing); `sent` says what crosses: `symbols` by `tables`, an `image` in `image_format` at
    `quality`, or `floats` as they are, of `shape`. `ours` are candidates, the rest baselines; `real_cut` is neither the raw input nor device-only. `holds` if
    its accuracy does on test too: no other split is reported as the best.
    """

    name: str
    accuracy: float
    frame_bytes: float
    ours: bool
    real_cut: bool
    sent: Sent
    image_size: int
    device: bytes | None = None
    edge: bytes | None = None
    tables: CodecTables | None = None
    shape: tuple[int, ...] = ()
    image_format: Format = "webp"
    quality: int = 100
    holds: bool = True


class DeviceSide:
    """Runs the device's part of a way."""

    def __init__(self, way: Way) -> None:
        self.way, self.preprocessing = way, Preprocessing(way.image_size)
        self.session = open_session(way.device, 1) if way.device else None

    def payload(self, pixels: Pixels, watch: Stopwatch) -> bytes | NDArray[np.float32]:
        """What is sent of `pixels`, uint8 (3, S, S), or the logits where nothing is."""
        way, result = self.way, None
        if self.session is not None:
            with watch.part("device_ms"):
                result = self.session.run(None, {self.session.get_inputs()[0].name: self.preprocessing.tensor(pixels[None])})[0]
        if way.sent == "nothing":
            assert result is not None
            return np.asarray(result)
        with watch.part("encode_ms"):
            if way.sent == "image":
                return pack(encode_image(pixels, way.image_format, way.quality), BUNDLE_ID, Kind.IMAGE)
            assert result is not None
            if way.sent == "floats":
                return pack(np.asarray(result).tobytes(), BUNDLE_ID, Kind.SYMBOLS)
            assert way.tables is not None
            return pack(coder.encode(result[0], way.tables), BUNDLE_ID, Kind.SYMBOLS)


class EdgeSide:
    """Runs the edge's part of a way."""

    def __init__(self, way: Way) -> None:
        self.way, self.preprocessing = way, Preprocessing(way.image_size)
        assert way.edge is not None
        self.session = open_session(way.edge, 1)
        if way.tables is not None:
            _ = way.tables.entry_array  # derived here, not while the first frame waits

    def answer(self, frame: bytes, watch: Stopwatch) -> NDArray[np.float32]:
        way = self.way
        with watch.part("decode_ms"):
            payload = unpack(frame).payload
            received: NDArray[Any]
            if way.sent == "image":
                received = self.preprocessing.pixels(open_encoded(payload, way.image_format, way.quality))[None]
            elif way.sent == "floats":
                received = np.frombuffer(payload, np.float32).reshape(1, *way.shape)
            else:
                assert way.tables is not None
                channels, height, width = way.shape
                received = coder.decode(payload, (channels, height, width), way.tables)[None]
        with watch.part("edge_ms"):
            batch: NDArray[Any] = self.preprocessing.tensor(received) if way.sent == "image" else received
            logits: NDArray[np.float32] = self.session.run(None, {self.session.get_inputs()[0].name: batch})[0]
        return logits

    def handle(self, frame: bytes) -> bytes:
        logits, parts = timed(lambda watch: self.answer(frame, watch))
        return pack(REPLY_TIMES.pack(parts["decode_ms"], parts["edge_ms"]) + logits.astype("<f4").tobytes(), BUNDLE_ID, Kind.REPLY)


def time_parts(ways: Sequence[Way], images: Pixels, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every part of every way for `images`, `rounds` times TIMED; the ways take turns, each after calls that are not timed.

    A device does one thing all day: what it needs lies in its caches, where the other ways have left nothing of it here.
    """
    sides = [(way, DeviceSide(way), EdgeSide(way) if way.edge else None) for way in ways]
    found: dict[str, dict[str, list[float]]] = {way.name: {part: [] for part in PARTS} for way in ways}
    for pixels in itertools.chain.from_iterable(itertools.repeat(list(images), rounds)):
        for way, device, edge in sides:
            for number in range(WARM + TIMED):
                watch = Stopwatch()
                frame = device.payload(pixels, watch)
                if edge is not None:
                    assert isinstance(frame, bytes)
                    edge.answer(frame, watch)
                if number >= WARM:
                    for part in PARTS:
                        found[way.name][part].append(watch.parts[part])
    return found


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {part: float(np.median(values)) for part, values in samples.items()}


def total_ms(way: Way, parts: Mapping[str, float], slowdown: float, link: Link, classes: int) -> float:
    """From image to answer, with a device `slowdown` times slower than the one `parts` were timed on (METHODS 4)."""
    on_device = slowdown * (parts["device_ms"] + parts["encode_ms"])
    if way.sent == "nothing":
        return on_device
    return on_device + link_ms(way.frame_bytes, reply_frame_bytes(classes), link) + parts["decode_ms"] + parts["edge_ms"]


@dataclass(frozen=True)
class Place:
    """A grid point: which way was picked by prediction, the best baseline by measurement, and what both take; `real_cut` if one of ours cuts there.

    `cut` is the best of our real cuts that hold on test by measurement, if there are any.
    """

    slowdown: float
    rtt_ms: float
    rate_mbps: float
    pick: str
    pick_ms: float
    predicted_ms: float
    baseline: str
    baseline_ms: float
    real_cut: bool
    cut: str | None = None
    cut_ms: float | None = None

    @property
    def ratio(self) -> float:
        return self.pick_ms / self.baseline_ms


def grid(
    ways: Sequence[Way], predicted: Mapping[str, Mapping[str, float]], found: Mapping[str, Mapping[str, float]], floor: float, classes: int
) -> list[Place]:
    """Every grid point: of all ways at or above `floor` that of least predicted latency, against the best baseline there, both by `found`."""
    good = [way for way in ways if way.accuracy >= floor]
    places = []
    for slowdown, rtt, rate in itertools.product(SLOWDOWNS, RTTS_MS, RATES_MBPS):
        link = Link(rate, rtt)
        expected = {way.name: total_ms(way, predicted[way.name], slowdown, link, classes) for way in good}
        actual = {way.name: total_ms(way, found[way.name], slowdown, link, classes) for way in good}
        pick = min(good, key=lambda way: expected[way.name])
        baseline = min((way for way in good if not way.ours), key=lambda way: actual[way.name])
        times = actual[pick.name], expected[pick.name], baseline.name, actual[baseline.name]
        cut = min((way.name for way in good if way.ours and way.real_cut and way.holds), key=actual.__getitem__, default=None)
        places.append(Place(slowdown, rtt, rate, pick.name, *times, pick.ours and pick.real_cut, cut, cut and actual[cut]))
    return places


def through_link(ways: Sequence[Way], images: Pixels, slowdown: float, link: Link) -> dict[str, list[float]]:
    """Milliseconds from image to answer of every way for `images`, in turns, through a process for each edge and the emulated link."""
    with contextlib.ExitStack() as stack:
        sides = []
        for way in ways:
            transport = None
            if way.edge is not None:
                port = stack.enter_context(_edge(way))
                transport = stack.enter_context(contextlib.closing(TcpTransport("127.0.0.1", port, link)))
            sides.append((way, DeviceSide(way), transport))
        found: dict[str, list[float]] = {way.name: [] for way in ways}
        for number, pixels in enumerate([*images[:3], *images]):
            for way, device, transport in sides:
                frame, parts = timed(partial(device.payload, pixels), slowdown)
                start = time.perf_counter()
                if transport is not None:
                    assert isinstance(frame, bytes)
                    transport.request(frame)
                if number >= 3:
                    found[way.name].append(sum(parts.values()) + (time.perf_counter() - start) * 1e3)
        return found


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while (frame := receive_frame(self.request)) is not None:
                self.request.sendall(self.server.side.handle(frame))  # type: ignore[attr-defined]


def _serve(way: Way, ready: multiprocessing.connection.Connection) -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), _Connection) as server:
        server.side = EdgeSide(way)  # type: ignore[attr-defined]
        ready.send(server.server_address[1])
        server.serve_forever()


@contextlib.contextmanager
def _edge(way: Way) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(way, theirs), daemon=True)
    process.start()
    try:
        yield int(ours.recv())
    finally:
        process.terminate()
        process.join()


def frame_size(payload_sizes: Sequence[int]) -> float:
    """Mean bytes of frames that hold payloads of these sizes."""
    return float(np.mean(payload_sizes)) + OVERHEAD_BYTES


def as_raw(places: Sequence[Place]) -> list[dict[str, Any]]:
    return [{**vars(place), "ratio": place.ratio} for place in places]
