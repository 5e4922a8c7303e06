"""Image formats an edge-only device may send, lossless and lossy, and how many of a file's bytes are picture and how many container."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DataError

Format = Literal["webp", "jpeg", "jpeg-bare", "png"]
FORMATS: tuple[Format, ...] = get_args(Format)
LOSSLESS = 100
HUFFMAN_TABLE = 0xC4
PILLOW_NAMES: dict[Format, str] = {"webp": "WEBP", "jpeg": "JPEG", "jpeg-bare": "JPEG", "png": "PNG"}
TABLES = (0xDB, HUFFMAN_TABLE)  # DQT, DHT
SOI, EOI = b"\xff\xd8", b"\xff\xd9"
WEBP_CONTAINER_BYTES = 20  # RIFF, size, WEBP, chunk name, chunk size


def encode_image(pixels: NDArray[np.uint8], image_format: Format, quality: int) -> bytes:
    """uint8 (3, S, S) as a file. WebP of quality 100 is lossless; PNG always is and has no quality.

    `jpeg-bare` leaves out what does not change from image to image of one quality: quantisation and Huffman tables, and the JFIF header.
    """
    picture, file = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), io.BytesIO()
    if image_format == "webp":
        picture.save(file, "WEBP", quality=quality, lossless=quality == LOSSLESS, exact=True, method=4)
    elif image_format == "png":
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=quality, optimize=image_format == "jpeg")
    data = file.getvalue()
    return _without_tables(data) if image_format == "jpeg-bare" else data


def open_encoded(data: bytes, image_format: Format, quality: int) -> Image.Image:
    """The picture in `data`, which `encode_image` wrote with the same format and quality.

    Raises:
        DataError: the bytes are no such picture.
    """
    try:
        picture = open_lazily(data, image_format, quality)
        picture.load()
    except Exception as error:  # Pillow raises many unrelated kinds
        raise DataError(f"{image_format} of {len(data)} bytes cannot be decoded ({error}); send the image again.") from error
    return picture


def open_lazily(data: bytes, image_format: Format, quality: int) -> Image.Image:
    """As `open_encoded`, but no pixel is decoded yet: the size is known first. Pillow raises many unrelated kinds on bytes that are no such picture."""
    return Image.open(io.BytesIO(_with_tables(data, quality) if image_format == "jpeg-bare" else data), formats=[PILLOW_NAMES[image_format]])


def container_bytes(data: bytes, image_format: Format) -> int:
    """How many bytes of a file hold no picture: RIFF and chunk headers of WebP, markers and quantisation tables of JPEG, chunks around PNG's data.

    The Huffman tables of `jpeg` are made for each picture, so they are part of it.
    """
    if image_format == "webp":
        return WEBP_CONTAINER_BYTES
    if image_format == "png":
        return len(data) - sum(size for name, size in _png_chunks(data) if name == b"IDAT")
    whole = SOI + data + EOI if image_format == "jpeg-bare" else data
    tables = sum(len(segment) for marker, segment in _segments(whole) if marker == HUFFMAN_TABLE)
    return len(data) - len(_scan(whole)) - tables


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, whole segment) up to and with the start of scan."""
    place = 2
    while place + 4 <= len(data):
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, data[place : place + 2 + size]
        if marker == 0xDA:
            return
        place += 2 + size


def _scan(data: bytes) -> bytes:
    """The entropy-coded picture, without the end marker."""
    return data[2 + sum(len(segment) for _, segment in _segments(data)) : -2]


def _without_tables(data: bytes) -> bytes:
    kept = (segment for marker, segment in _segments(data) if marker not in TABLES and marker != 0xE0)
    return b"".join([*kept, _scan(data)])


def _with_tables(data: bytes, quality: int) -> bytes:
    return SOI + _standard_tables(quality) + data + EOI


@cache
def _standard_tables(quality: int) -> bytes:
    """The tables that Pillow writes at this quality into every JPEG."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality, optimize=False)
    return b"".join(segment for marker, segment in _segments(file.getvalue()) if marker in TABLES)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    place = 8
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8], size
        place += 12 + size
