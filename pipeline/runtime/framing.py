"""How frames follow one another on a connection: whole, or in the compact profile for the narrowest links.

A compact message has 6 bytes around a payload of less than 16 KiB, 10 around a longer one:

bytes 0-1   kind in the upper 2 bits, payload length in the others, big-endian; all of those set: the length follows in 4 bytes
...         payload
last 4      CRC-32 of the bundle's id and everything before

Which bundle the messages belong to is said once (see `hello`).
"""

from __future__ import annotations

import struct
import zlib
from typing import Protocol

from pipeline.errors import FrameError
from pipeline.runtime.frame import HEADER_BYTES, MAX_PAYLOAD_BYTES, Kind, frame_bytes, pack, unpack

_HEAD, _LONG = struct.Struct(">H"), struct.Struct(">I")
_LENGTH = (1 << 14) - 1
KIND_BYTE = 5  # of a whole frame


class Framing(Protocol):
    """What frames look like on a connection."""

    head_bytes: int

    def need(self, head: bytes) -> int:
        """Length of the message that begins like this, or, as long as that is not known, of what tells it; at most `head_bytes` are looked at.

        Raises:
            FrameError: no message begins like this.
        """
        ...

    def outgoing(self, frame: bytes) -> bytes:
        """The message that carries a whole frame."""
        ...

    def incoming(self, message: bytes) -> bytes:
        """The whole frame that a message carries.

        Raises:
            FrameError: the message is damaged, where a later look at the frame would not find that.
        """
        ...


class Whole:
    """Frames as they are."""

    head_bytes = HEADER_BYTES

    def need(self, head: bytes) -> int:
        return HEADER_BYTES if len(head) < HEADER_BYTES else frame_bytes(head)

    def outgoing(self, frame: bytes) -> bytes:
        return frame

    def incoming(self, message: bytes) -> bytes:
        return message


class Compact:
    """The compact profile of a connection on which everything belongs to the bundle of that id; what comes from it carries that id."""

    head_bytes = _HEAD.size + _LONG.size

    def __init__(self, bundle_id: bytes) -> None:
        self._bundle_id = bundle_id
        self._seed = zlib.crc32(bundle_id)

    def need(self, head: bytes) -> int:
        if len(head) < _HEAD.size:
            return _HEAD.size
        if (length := self._length(head)) < _LENGTH:
            return _HEAD.size + length + _LONG.size
        if len(head) < self.head_bytes:
            return self.head_bytes
        length = int(_LONG.unpack_from(head, _HEAD.size)[0])
        if length > MAX_PAYLOAD_BYTES:
            raise FrameError(f"message of {length} bytes is too large; the sender is not coinfer or is of another version.")
        return self.head_bytes + length + _LONG.size

    def outgoing(self, frame: bytes) -> bytes:
        opened = unpack(frame)
        length, kind = len(opened.payload), (opened.kind - 1) << 14
        head = _HEAD.pack(kind | length) if length < _LENGTH else _HEAD.pack(kind | _LENGTH) + _LONG.pack(length)
        body = head + opened.payload
        return body + self._checksum(body)

    def incoming(self, message: bytes) -> bytes:
        body = message[: -_LONG.size]
        if self._checksum(body) != message[-_LONG.size :]:
            raise FrameError(f"message of {len(message)} bytes is damaged, its checksum does not match; send it again.")
        payload = body[_HEAD.size if self._length(body) < _LENGTH else self.head_bytes :]
        return pack(payload, self._bundle_id, Kind((body[0] >> 6) + 1))

    def _length(self, head: bytes) -> int:
        return int(_HEAD.unpack_from(head)[0] & _LENGTH)

    def _checksum(self, body: bytes) -> bytes:
        return _LONG.pack(zlib.crc32(body, self._seed))
