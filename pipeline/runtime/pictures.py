"""Where a device's pictures come from: files, JPEG images on standard input, a video, a camera or a stream."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from pipeline.errors import CoinferError, DataError
from pipeline.runtime.preprocess import IMAGE_SUFFIXES, open_image

STDIN = "stdin"
CAMERAS = ("/dev/video", "/dev/v4l/")
MOST_JPEG_BYTES = 64 << 20
OPEN_TIMEOUT_S, FRAME_TIMEOUT_S = 10.0, 10.0
SOI, EOI, SOS = 0xD8, 0xD9, 0xDA
ALONE = {0x01, *range(0xD0, 0xD8)}  # JPEG markers without a length: TEM and RST


class _NoVideo(DataError):
    """A video, camera or stream cannot be read, or no further, for the `reason` alone."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{_public(source)} cannot be read as a video ({reason}); check that it is one, and there.")
        self.reason = reason


@dataclass(frozen=True)
class Shot:
    """A picture, what a record calls it ({"file": path} or {"frame": number from 0}), and instead of a picture why there is none."""

    name: dict[str, Any]
    picture: Image.Image | None
    error: str = ""


def pictures(source: str) -> Iterator[Shot]:
    """The pictures of `source`, each valid until the next is asked for.

    An image, or a folder, searched for images in name order; `stdin`: JPEG images one after another; a video file; /dev/video0 or another camera of Linux;
    an URL, such as rtsp://HOST/STREAM. Of a camera or an URL the newest picture is given, and those that came meanwhile are left out.

    Raises:
        DataError: there is no such source, it holds no picture, or a camera or stream ends.
        CoinferError: a video needs the package av.
    """
    path = Path(source)
    if source == STDIN:
        yield from _stream(sys.stdin.buffer)
    elif source.startswith(CAMERAS) or "://" in source:
        yield from _camera(source)
    elif os.path.isdir(source) or path.suffix.lower() in IMAGE_SUFFIXES:
        yield from _files(path)
    elif source and os.path.exists(source):
        for number, frame in enumerate(_frames(source)):
            yield _shot(number, frame)
    else:
        named = source or "an empty name"
        raise DataError(f"{named} does not exist; give an image, a folder of images, a video, a camera such as /dev/video0, an URL or {STDIN}.")


def _files(path: Path) -> Iterator[Shot]:
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))
        if not files:
            raise DataError(f"{path} holds no image; give a folder with files that end in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    elif not os.path.exists(path):
        raise DataError(f"{path} does not exist; give an image or a folder of images.")
    for file in files:
        try:
            picture = open_image(file)
        except Exception as error:  # Pillow raises many unrelated kinds
            yield Shot({"file": str(file)}, None, f"{file} cannot be read as an image ({error}); replace or remove it.")
            continue
        with picture:
            yield Shot({"file": str(file)}, picture)


def _stream(stream: BinaryIO) -> Iterator[Shot]:
    number = -1
    for number, data in enumerate(jpegs(stream)):
        try:
            picture = Image.open(io.BytesIO(data), formats=["JPEG"])
        except Exception as error:  # Pillow raises many unrelated kinds
            yield Shot({"frame": number}, None, f"image {number} on standard input cannot be read ({error}).")
            continue
        yield Shot({"frame": number}, picture)
    if number < 0:
        raise DataError("standard input holds no image; send JPEG images one after another, or give another source.")


def jpegs(stream: BinaryIO) -> Iterator[bytes]:
    """The JPEG files in `stream`, written one after another, each as soon as it is complete.

    Raises:
        DataError: something else comes between, one is cut short, or one has more than `MOST_JPEG_BYTES`.
    """
    reader = _Reader(stream)
    number = 0
    while reader.begin():
        reader.expect_start(number)
        while (marker := reader.marker(number)) != EOI:
            if marker in ALONE:
                continue
            length = int.from_bytes(reader.take(2, number), "big")
            reader.take(max(0, length - 2), number)
            if marker == SOS:
                reader.scan(number)
        yield reader.finish()
        number += 1


class _Reader:
    """Of the JPEG file that began last in a stream."""

    def __init__(self, stream: BinaryIO) -> None:
        self._read = getattr(stream, "read1", stream.read)  # no more than is there, so that an image does not wait for the next
        self._ahead = b""
        self._taken = bytearray()

    def begin(self) -> bool:
        return self._fill()

    def finish(self) -> bytes:
        data = bytes(self._taken)
        self._taken.clear()
        return data

    def take(self, count: int, number: int) -> bytes:
        if len(self._taken) + count > MOST_JPEG_BYTES:
            raise DataError(f"image {number} on standard input has more than {MOST_JPEG_BYTES >> 20} MiB; send smaller ones.")
        start = len(self._taken)
        while len(self._taken) < start + count:
            if not self._fill():
                raise DataError(f"standard input ends inside image {number}; the {number} before it are answered.")
            some = self._ahead[: start + count - len(self._taken)]
            self._taken += some
            self._ahead = self._ahead[len(some) :]
        return bytes(self._taken[start:])

    def expect_start(self, number: int) -> None:
        if self.take(2, number) != bytes([0xFF, SOI]):
            raise DataError(f"what begins as image {number} on standard input is no JPEG; send JPEG images one after another and nothing between.")

    def marker(self, number: int) -> int:
        first = self.take(1, number)[0]
        while first == 0xFF and (second := self.take(1, number)[0]) == 0xFF:
            pass  # fill bytes
        if first != 0xFF:
            raise DataError(f"image {number} on standard input is damaged; the {number} before it are answered.")
        return second

    def scan(self, number: int) -> None:
        """Over entropy-coded data, up to the next marker."""
        while True:
            if not self._ahead and not self._fill():
                self.take(1, number)
            found = self._ahead.find(b"\xff")
            if found < 0:
                self.take(len(self._ahead), number)
                continue
            self.take(found, number)
            while len(self._ahead) < 2:
                if not self._fill(more=True):
                    self.take(2, number)
            if self._ahead[1] == 0 or self._ahead[1] in ALONE:
                self.take(2, number)
            else:
                return

    def _fill(self, more: bool = False) -> bool:
        if self._ahead and not more:
            return True
        some = self._read(1 << 16)
        self._ahead += some
        return bool(some)


def _camera(source: str) -> Iterator[Shot]:
    """The newest frame each time one is asked for; decoding goes on meanwhile in a thread."""
    ready, closing = threading.Condition(), threading.Event()
    newest: list[tuple[int, Any]] = []
    ended: list[Exception] = []

    def watch() -> None:
        end: Exception = _NoVideo(source, "it ended")
        try:
            for frame in enumerate(_frames(source)):
                with ready:
                    newest[:] = [frame]
                    ready.notify()
                if closing.is_set():
                    return
        except Exception as error:  # whatever it is, who waits must hear of it
            end = error
        with ready:
            ended.append(end)
            ready.notify()

    threading.Thread(target=watch, daemon=True).start()
    seen = 0
    try:
        while True:
            with ready:
                if not ready.wait_for(lambda: newest or ended, OPEN_TIMEOUT_S + FRAME_TIMEOUT_S):
                    ended.append(_NoVideo(source, f"nothing came for {OPEN_TIMEOUT_S + FRAME_TIMEOUT_S:g} s"))
                if not newest:
                    if not seen:
                        raise DataError(_public(str(ended[0])))
                    reason = getattr(ended[0], "reason", None) or _public(str(ended[0]))
                    raise DataError(f"{_public(source)} gives no more pictures after {seen} ({reason}); check the camera and start again.")
                number, frame = newest.pop()
            seen = number + 1
            yield _shot(number, frame)
    finally:
        closing.set()


def _shot(number: int, frame: Any) -> Shot:
    if isinstance(frame, str):
        return Shot({"frame": number}, None, frame)
    return Shot({"frame": number}, Image.fromarray(frame.to_ndarray(format="rgb24")))


def _frames(source: str) -> Iterator[Any]:
    """Frames of a video, camera or stream, in order, as av has them; for one that is damaged, what is wrong with it."""
    try:
        import av
    except ModuleNotFoundError:
        raise CoinferError(f"{_public(source)} is no image, and videos and cameras need the package av; install it: pip install 'coinfer[camera]'.") from None
    options = {"rtsp_transport": "tcp"} if source.startswith("rtsp") else {}
    try:
        layout = "v4l2" if source.startswith("/dev/") else None
        with av.open(source, format=layout, options=options, timeout=(OPEN_TIMEOUT_S, FRAME_TIMEOUT_S)) as container:
            if not container.streams.video:
                raise DataError(f"{_public(source)} holds no video; give another source.")
            for packet in container.demux(video=0):
                try:
                    yield from packet.decode()
                except av.InvalidDataError as error:
                    yield f"a frame of {_public(source)} is damaged ({error})."
    except av.ExitError as error:  # how a timeout ends it
        raise _NoVideo(source, f"nothing came for {FRAME_TIMEOUT_S:g} s") from error
    except (av.FFmpegError, ValueError) as error:
        raise _NoVideo(source, _public(str(error))) from error


def _public(text: str) -> str:
    """`text` without the user names and passwords in its URLs."""
    return re.sub(r"//[^/\s]*@", "//", text)
