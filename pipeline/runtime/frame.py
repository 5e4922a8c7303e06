"""The wire message: a 9-byte header, the payload, a CRC-32 over both.

byte 0      0xC1: what this is and its version
bytes 1-4   id of the bundle that both halves must come from
byte 5      kind
bytes 6-8   payload length, big-endian, so a stream of frames needs no other delimiter and no frame exceeds 16 MiB
...         payload
last 4      CRC-32 of everything before
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

from pipeline.errors import FrameError

VERSION_1 = 0xC1
BUNDLE_ID_BYTES = 4
MAX_PAYLOAD_BYTES = (1 << 24) - 1
_HEADER = struct.Struct(">B4sI")
_CHECKSUM = struct.Struct(">I")
HEADER_BYTES = _HEADER.size
OVERHEAD_BYTES = _HEADER.size + _CHECKSUM.size


class Kind(IntEnum):
    SYMBOLS = 1  # entropy-coded symbols
    IMAGE = 2  # a WebP file
    REPLY = 3  # float32 decode_ms, edge_ms, then the logits
    ERROR = 4  # UTF-8 text


@dataclass(frozen=True)
class Frame:
    kind: Kind
    bundle_id: bytes
    payload: bytes


def pack(payload: bytes, bundle_id: bytes, kind: Kind) -> bytes:
    """One frame: `payload` and `OVERHEAD_BYTES` more.

    Raises:
        FrameError: the payload is 16 MiB or more.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise FrameError(f"payload of {len(payload)} bytes is too large for a frame; send less than 16 MiB.")
    body = _HEADER.pack(VERSION_1, bundle_id, kind << 24 | len(payload)) + payload
    return body + _CHECKSUM.pack(zlib.crc32(body))


def frame_bytes(header: bytes) -> int:
    """Length of the whole frame that begins with these `HEADER_BYTES` bytes.

    Raises:
        FrameError: no frame of this version begins like this.
    """
    if len(header) < HEADER_BYTES:
        raise FrameError(f"frame of {len(header)} bytes is cut short; send it again.")
    version, _, kind_and_length = _HEADER.unpack_from(header)
    if version != VERSION_1:
        raise FrameError(f"frame starts with {version:#04x}, not {VERSION_1:#04x}; the sender is not coinfer or is of another version.")
    return OVERHEAD_BYTES + int(kind_and_length & MAX_PAYLOAD_BYTES)


def unpack(frame: bytes) -> Frame:
    """Check and open one frame.

    Raises:
        FrameError: anything but the exact bytes `pack` wrote.
    """
    expected = frame_bytes(frame)
    if len(frame) != expected:
        raise FrameError(f"frame has {len(frame)} bytes where its header says {expected}; send it again.")
    body = frame[: -_CHECKSUM.size]
    if _CHECKSUM.pack(zlib.crc32(body)) != frame[-_CHECKSUM.size :]:
        raise FrameError(f"frame of {len(frame)} bytes is damaged, its checksum does not match; send it again.")
    _, bundle_id, kind_and_length = _HEADER.unpack_from(frame)
    try:
        kind = Kind(kind_and_length >> 24)
    except ValueError:
        raise FrameError(f"frame is of unknown kind {kind_and_length >> 24}; the sender is of another version.") from None
    return Frame(kind, bundle_id, body[HEADER_BYTES:])
