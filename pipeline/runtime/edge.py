"""The edge half: frames in, replies out."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CoinferError, FrameError
from pipeline.runtime.bundle import EDGE, Bundle, run_session
from pipeline.runtime.coder import decode
from pipeline.runtime.frame import Kind, pack, unpack
from pipeline.runtime.images import open_lazily
from pipeline.runtime.timing import Stopwatch, timed

Asked = bytes | NDArray[np.uint8]  # a frame, or the symbols (1, h, H, W) that one would carry

REPLY_TIMES = struct.Struct("<ff")  # decode_ms, edge_ms, before the logits (little-endian float32 like them)


class FrameOpener:
    """Checks and decodes what device halves of one bundle send. Safe to use from several threads."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._expects = Kind.IMAGE if bundle.kind == "edge-only" else Kind.SYMBOLS
        if bundle.kind == "split":
            for tables in bundle.points:
                _ = tables.entry_array, tables.predictor_arrays  # derived here, not while the first frame waits

    @property
    def bundle(self) -> Bundle:
        return self._bundle

    @property
    def bundle_id(self) -> bytes:
        return self._bundle.bundle_id

    def open(self, frame: Asked) -> NDArray[np.uint8]:
        """What a frame carries, as a batch of one: symbols uint8 (1, h, H, W), or of an edge-only bundle pixels uint8 (1, 3, S, S).

        Symbols come back as they are.

        Raises:
            FrameError: it is damaged, of another bundle, or carries something else; or symbols of another shape or above what the codec's bits hold.
        """
        if isinstance(frame, np.ndarray):
            return self._checked(frame)
        received = unpack(frame)
        if received.bundle_id != self._bundle.bundle_id:
            raise FrameError(
                f"frame is for bundle {received.bundle_id.hex()}, this edge runs {self._bundle.bundle_id.hex()}; give device and edge the same bundle."
            )
        if received.kind is not self._expects:
            raise FrameError(f"frame carries {received.kind.name}, this {self._bundle.kind} bundle takes {self._expects.name}; check what the device sends.")
        if self._expects is Kind.IMAGE:
            return self._decode_image(received.payload)
        point, payload = 0, received.payload
        if len(self._bundle.points) > 1:
            point, payload = payload[0] if payload else len(self._bundle.points), payload[1:]
            if point >= len(self._bundle.points):
                raise FrameError(f"frame names no operating point of this bundle, which has {len(self._bundle.points)}; check what the device sends.")
        return decode(payload, self._bundle.code_shape, self._bundle.points[point])[None]

    def tensor(self, opened: NDArray[np.uint8]) -> NDArray[Any]:
        """What edge.onnx takes for N opened frames: the symbols as they are, pixels as float32 (N, 3, S, S)."""
        return self._bundle.preprocessing.tensor(opened) if self._expects is Kind.IMAGE else opened

    def _checked(self, symbols: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._expects is not Kind.SYMBOLS or symbols.shape != (1, *self._bundle.code_shape):
            raise FrameError(f"symbols of shape {symbols.shape} are nothing that this {self._bundle.kind} bundle takes; look at the shapes in its manifest.")
        levels = max(256 if point.embedded else point.levels for point in self._bundle.points)
        if symbols.max() >= levels:
            raise FrameError(f"symbols go up to {symbols.max()}, those of this bundle to {levels - 1}; send what its device.onnx gives.")
        return symbols

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


class EdgeHalf(FrameOpener):
    """Runs edge.onnx on what device halves of the same bundle send. Safe to call from several threads.

    Raises:
        BundleError: the bundle has no edge half.
    """

    def __init__(self, bundle: Bundle, threads: int = 1, slowdown: float = 1.0) -> None:
        super().__init__(bundle)
        self._session = bundle.session(EDGE, threads)
        self.slowdown = slowdown

    def handle(self, frame: Asked) -> tuple[bytes, dict[str, float]]:
        """The reply frame to one frame, and {"decode_ms", "edge_ms"}. What cannot be answered gets an ERROR frame saying why."""
        try:
            logits, parts = timed(lambda watch: self._answer(frame, watch), self.slowdown)
        except CoinferError as error:
            return self.refusal(str(error)), {}
        return self.reply(logits, parts["decode_ms"], parts["edge_ms"]), parts

    def _answer(self, frame: Asked, watch: Stopwatch) -> NDArray[np.float32]:
        with watch.part("decode_ms"):
            received = self.open(frame)
        with watch.part("edge_ms"):
            logits: NDArray[np.float32] = self.run(received)[0]
        return logits

    def run(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits (N, classes) of N opened frames.

        Raises:
            BundleError: the half cannot be run.
        """
        logits: NDArray[np.float32] = run_session(self._session, self.tensor(batch))
        return logits

    def reply(self, logits: NDArray[np.float32], decode_ms: float, edge_ms: float) -> bytes:
        """The frame that answers with `logits` (classes,) and what they took."""
        return pack(REPLY_TIMES.pack(decode_ms, edge_ms) + logits.astype("<f4").tobytes(), self.bundle_id, Kind.REPLY)

    def refusal(self, reason: str) -> bytes:
        """The frame that answers with a reason instead."""
        return pack(reason.encode(), self.bundle_id, Kind.ERROR)
