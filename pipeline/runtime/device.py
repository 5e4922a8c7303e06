"""The device half: an image in, a frame out, and the answer that comes back."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import BundleError, DataError, FrameError
from pipeline.runtime.bundle import DEVICE, DEVICE_ONLY, Bundle, run_session
from pipeline.runtime.coder import encode
from pipeline.runtime.edge import REPLY_TIMES
from pipeline.runtime.frame import Kind, pack, unpack
from pipeline.runtime.images import encode_image
from pipeline.runtime.timing import Stopwatch, timed
from pipeline.runtime.transport import REPLY_TIMEOUT_S, EdgeUnreachable, Transport, excerpt

PARTS = ("device_ms", "encode_ms", "link_ms", "decode_ms", "edge_ms", "total_ms")

Picture = Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Answer:
    """Logits float32 (classes,), milliseconds by `PARTS`, size of the message sent (0: none) and the way taken."""

    logits: NDArray[np.float32]
    parts: dict[str, float]
    frame_bytes: int
    path: str  # the bundle's kind, or device-only where the device answered alone


class DeviceHalf:
    """Runs what a bundle puts on the device. `slowdown` emulates a device that many times slower (see `timed`).

    `point` is the operating point to start with.

    Raises:
        BundleError: the bundle has no such operating point.
    """

    def __init__(self, bundle: Bundle, threads: int = 1, slowdown: float = 1.0, point: int = 0) -> None:
        self._bundle = bundle
        self._threads = threads
        self._slowdown = slowdown
        self._half: ort.InferenceSession | None = bundle.session(DEVICE, threads) if bundle.kind == "split" else None
        self._whole: ort.InferenceSession | None = None
        if bundle.kind == "split":
            for tables in bundle.points:
                _ = tables.start_array, tables.slot_array, tables.predictor_arrays  # derived here, not while the first image waits
        elif bundle.kind == "device-only":
            self._whole = bundle.session(DEVICE_ONLY, threads)
        self.point = point

    @property
    def point(self) -> int:
        """The operating point in force; set it between images as the link changes.

        Raises:
            BundleError: on setting one that the bundle does not have.
        """
        return self._point

    @point.setter
    def point(self, point: int) -> None:
        count = len(self._bundle.points) if self._bundle.kind == "split" else 1
        if not 0 <= point < count:
            raise BundleError(f"{self._bundle.path} has operating points 0 to {count - 1}, not {point}; choose one of them.")
        self._point = point

    def run(self, picture: Picture) -> tuple[bytes, dict[str, float]]:
        """The frame to send for one picture (a PIL image, or uint8 (3, S, S) as preprocessing gives), and {"device_ms", "encode_ms"}.

        Raises:
            BundleError: a device-only bundle sends nothing.
            DataError: the picture is unreadable or of another shape.
        """
        return timed(lambda watch: self._frame(picture, watch), self._slowdown)

    def classify(self, picture: Picture, transport: Transport, deadline_ms: float = 1e3 * REPLY_TIMEOUT_S) -> Answer:
        """Send the frame of one picture through `transport` and open the reply; link_ms is what neither half accounts for.

        Raises:
            EdgeUnreachable: nobody answers, or not before `deadline_ms`, counted from the picture on.
            FrameError: the edge refused the frame, or its reply is damaged or from another bundle.
        """
        end_s = time.monotonic() + deadline_ms / 1e3
        frame, parts = self.run(picture)
        if (left_s := end_s - time.monotonic()) <= 0:
            raise EdgeUnreachable(f"the edge was not asked, as the device half took all of the {deadline_ms:.4g} ms there were; allow more time.")
        watch = Stopwatch()
        with watch.part("round_trip"):
            reply = unpack(transport.request(frame, left_s))
        if reply.kind is Kind.ERROR:
            raise FrameError(f"the edge refused: {excerpt(reply.payload.decode(errors='replace'))}")
        if reply.kind is not Kind.REPLY or reply.bundle_id != self._bundle.bundle_id:
            raise FrameError(f"the edge answered with {reply.kind.name} of bundle {reply.bundle_id.hex()}; give device and edge the same bundle.")
        if len(reply.payload) != REPLY_TIMES.size + 4 * len(self._bundle.classes):
            raise FrameError(f"the edge's reply has {len(reply.payload)} bytes, not the logits of {len(self._bundle.classes)} classes; check its version.")
        parts["decode_ms"], parts["edge_ms"] = REPLY_TIMES.unpack_from(reply.payload)
        logits = np.frombuffer(reply.payload, dtype="<f4", offset=REPLY_TIMES.size).astype(np.float32)
        if not (np.isfinite(logits).all() and 0 <= parts["decode_ms"] < math.inf and 0 <= parts["edge_ms"] < math.inf):
            raise FrameError("the edge's reply holds logits or times that are no numbers; check its bundle and its version.")
        parts["link_ms"] = max(0.0, watch.parts["round_trip"] - parts["decode_ms"] - parts["edge_ms"])
        return Answer(logits, _complete(parts), transport.message_bytes(frame), self._bundle.kind)

    def classify_locally(self, picture: Picture) -> Answer:
        """Classify one picture with device-only.onnx alone.

        Raises:
            DataError: the picture is unreadable or of another shape.
        """
        whole = self._whole = self._whole or self._bundle.session(DEVICE_ONLY, self._threads)
        logits, parts = timed(lambda watch: self._infer(whole, self._pixels(picture, watch), watch), self._slowdown)
        return Answer(logits, _complete(parts), 0, "device-only")

    def _frame(self, picture: Picture, watch: Stopwatch) -> bytes:
        pixels = self._pixels(picture, watch)
        if self._bundle.kind == "edge-only":
            with watch.part("encode_ms"):
                return pack(encode_image(pixels, self._bundle.image_format, self._bundle.quality), self._bundle.bundle_id, Kind.IMAGE)
        half = self._half or self._bundle.session(DEVICE, self._threads)  # the latter says which kind lacks it
        symbols = self._infer(half, pixels, watch)
        with watch.part("encode_ms"):
            payload = encode(symbols, self._bundle.points[self.point])
            which = bytes([self.point]) if len(self._bundle.points) > 1 else b""
            return pack(which + payload, self._bundle.bundle_id, Kind.SYMBOLS)

    def _pixels(self, picture: Picture, watch: Stopwatch) -> NDArray[np.uint8]:
        with watch.part("device_ms"):
            return self.pixels(picture)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of preprocessed pixels: (3, S, S)."""
        size = self._bundle.preprocessing.image_size
        return 3, size, size

    def pixels(self, picture: Picture) -> NDArray[np.uint8]:
        """Preprocessed uint8 (3, S, S), which `run` and the `classify` methods take as well; pixels are given back as they are.

        Raises:
            DataError: the picture is unreadable or of another shape.
        """
        try:
            pixels = picture if isinstance(picture, np.ndarray) else self._bundle.preprocessing.pixels(picture)
        except Exception as error:  # Pillow decodes here and raises many unrelated kinds
            raise DataError(f"image cannot be decoded ({error}); replace it.") from error
        if pixels.shape != self.shape or pixels.dtype != np.uint8:
            raise DataError(f"pixels are {pixels.dtype} {pixels.shape} where the bundle takes uint8 {self.shape}; preprocess them with its rule.")
        return pixels

    def _infer(self, session: ort.InferenceSession, pixels: NDArray[np.uint8], watch: Stopwatch) -> Any:
        with watch.part("device_ms"):
            return run_session(session, self._bundle.preprocessing.tensor(pixels[None]))[0]


def _complete(parts: dict[str, float]) -> dict[str, float]:
    parts = {name: parts.get(name, 0.0) for name in PARTS[:-1]}
    return parts | {"total_ms": sum(parts.values())}
