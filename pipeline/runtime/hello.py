"""What a device says first on a connection: who it is, and whether its frames come in the compact profile (see `framing`).

byte 0      0xC2: this is a hello, and its version; a connection may also begin with a frame at once
bytes 1-2   length of the rest, big-endian
...         JSON object of the fields of `Hello`, those that are empty left out

Nothing answers a hello: the first frame follows it at once, and what is wrong with the hello is said in an ERROR frame.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pipeline.errors import FrameError
from pipeline.runtime.frame import BUNDLE_ID_BYTES

HELLO_1 = 0xC2
_HEAD = struct.Struct(">BH")
HEAD_BYTES = _HEAD.size
MAX_BYTES = 2048
DEVICE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)

_TOKEN, _BEARER = "authorization", "Bearer "
_PREFIX, _TOLD = "coinfer-", ("device", "version", "alone")
_FORMS = {"version": re.compile(r"[\w.+-]{0,64}", re.ASCII), "token": re.compile("[!-~]*")}
_ID = re.compile(rf"([0-9a-f]{{{2 * BUNDLE_ID_BYTES}}})?")


@dataclass(frozen=True)
class Hello:
    """Args:
    device: its name, letters, digits and `_.-`.
    version: of the coinfer that runs there, up to 64 letters, digits and `_.+-`.
    token: what it may show the edge, see `guard`; printable ASCII without spaces.
    compact: the bundle of all that follows, 8 hexadecimal digits; empty: frames are whole ones.
    alone: pictures that it has classified without the edge since it said so last.
    """

    device: str = ""
    version: str = ""
    token: str = ""
    compact: str = ""
    alone: int = 0

    def pack(self) -> bytes:
        """Raises:
        FrameError: it takes more than `MAX_BYTES`.
        """
        body = json.dumps({name: value for name, value in asdict(self).items() if value}, separators=(",", ":")).encode()
        if len(body) > MAX_BYTES:
            raise FrameError(f"hello of {len(body)} bytes is too long; use a shorter token or name, {MAX_BYTES} bytes together.")
        return _HEAD.pack(HELLO_1, len(body)) + body

    @classmethod
    def unpack(cls, data: bytes) -> Hello:
        """Check and open what `pack` made.

        Raises:
            FrameError: it is anything else.
        """
        try:
            found = json.loads(data[HEAD_BYTES:])
        except (ValueError, RecursionError) as error:
            raise FrameError(f"hello cannot be read ({error}); the sender is not coinfer.") from error
        return cls.checked(found)

    @classmethod
    def checked(cls, found: Any) -> Hello:
        """One with the fields in the object `found`, those that are unknown left out: a later version may say more.

        Raises:
            FrameError: `found` is no object, or a field is not what it should be.
        """
        if not isinstance(found, dict):
            raise FrameError("hello is no JSON object; the sender is not coinfer.")
        known = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        for name, value in known.items():
            if type(value) is not type(getattr(cls, name)) or (name == "alone" and not 0 <= value < 1 << 40):
                raise FrameError(f"hello says {name} {str(value)[:40]!r}; the sender is of another version.")
        for name, form in _FORMS.items():
            if not form.fullmatch(known.get(name, "")):
                raise FrameError(f"hello says a {name} with characters that none has, or too many; the sender is of another version.")
        if known.get("device") and not DEVICE_NAME.fullmatch(known["device"]):
            raise FrameError(f"device is called {known['device'][:80]!r}; give a name of up to 64 letters, digits and _.-")
        if not _ID.fullmatch(known.get("compact", "")):
            raise FrameError(f"hello says bundle {known['compact'][:40]!r}; the sender is of another version.")
        return cls(**known)

    def to_metadata(self) -> list[tuple[str, str]]:
        """What says the same, but for `compact`, in the headers of a gRPC call."""
        said = {_TOKEN: self.token and f"{_BEARER}{self.token}", **{f"{_PREFIX}{name}": str(getattr(self, name) or "") for name in _TOLD}}
        return [(key, value) for key, value in said.items() if value]

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Hello:
        """Open what `to_metadata` made, or nothing at all.

        Raises:
            FrameError: it is anything else.
        """
        found: dict[str, Any] = {name: metadata[key] for name in _TOLD if (key := f"{_PREFIX}{name}") in metadata}
        if "alone" in found:
            found["alone"] = int(found["alone"]) if found["alone"].isdecimal() and len(found["alone"]) < 16 else -1
        if (token := metadata.get(_TOKEN, "")).startswith(_BEARER):
            found["token"] = token.removeprefix(_BEARER)
        return cls.checked(found)

    @property
    def bundle_id(self) -> bytes:
        """Of the compact profile."""
        return bytes.fromhex(self.compact)


def hello_bytes(head: bytes) -> int:
    """Length of the whole hello that begins like this; of its head as long as that is not there.

    Raises:
        FrameError: no hello begins like this.
    """
    if len(head) < HEAD_BYTES:
        return HEAD_BYTES
    magic, length = _HEAD.unpack_from(head)
    if magic != HELLO_1 or length > MAX_BYTES:
        raise FrameError(f"hello of {length} bytes is too long; the sender is not coinfer or is of another version.")
    return HEAD_BYTES + int(length)
