"""What a profile agent and its client say to each other: JSON and raw ONNX bytes, nothing pickled.

byte 0-3    "CIB" and the version
bytes 4-11  lengths of the JSON and of the bytes after it, big-endian
...         JSON, then the bytes: of a request its models, of a reply the optimised ones, one after the other as the JSON counts them

A connection is a client's until it closes it. Every message of a client is answered by one of the agent, {"error": sentence} where it cannot be done.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.errors import ProfileError
from pipeline.runtime.bench import CoderWork, ImageWork, ModelWork, Repeats, Samples, Work

MAGIC = b"CIB\x01"
MAX_JSON_BYTES = 64_000_000
MAX_MODELS_BYTES = 1_000_000_000
_HEADER = struct.Struct(">4sII")
_CHUNK = 1 << 16

Message = tuple[dict[str, Any], bytes]


def send(connection: socket.socket, fields: Mapping[str, Any], blob: bytes = b"") -> None:
    """Send one message.

    Raises:
        ProfileError: it is larger than the other side takes.
        OSError: the connection broke.
    """
    connection.sendall(packed(fields, blob))


def packed(fields: Mapping[str, Any], blob: bytes = b"") -> bytes:
    """One message.

    Raises:
        ProfileError: it is larger than the other side takes.
    """
    text = json.dumps(fields, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    _check_size(len(text), len(blob))
    return _HEADER.pack(MAGIC, len(text), len(blob)) + text + blob


def unpacked(data: bytes) -> Message:
    """What `packed` made one message of.

    Raises:
        ProfileError: `data` is no whole message.
    """
    magic, text_bytes, blob_bytes = _HEADER.unpack_from(data.ljust(_HEADER.size, b"\0"))
    if magic != MAGIC or len(data) != _HEADER.size + text_bytes + blob_bytes:
        raise ProfileError("a message between profile agent and client is cut short.")
    return _fields(data[_HEADER.size : _HEADER.size + text_bytes]), data[_HEADER.size + text_bytes :]


def receive(connection: socket.socket) -> Message | None:
    """The next message; None where the other side has closed between two.

    Raises:
        ProfileError: this is no such message, or a larger one than is taken.
        OSError: the connection broke or was silent for too long; also when it closed inside a message.
    """
    header = _bytes(connection, _HEADER.size, may_end=True)
    if not header:
        return None
    magic, text_bytes, blob_bytes = _HEADER.unpack(header)
    if magic != MAGIC:
        raise ProfileError("what came is no message between a profile agent and `coinfer profile --on`; check the port, and that both have the same version.")
    _check_size(text_bytes, blob_bytes)
    text, blob = _bytes(connection, text_bytes), _bytes(connection, blob_bytes)
    return _fields(text), blob


def _fields(text: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ProfileError("a message between profile agent and client holds no JSON object; check that both have the same version.")
    return fields


def _check_size(text_bytes: int, blob_bytes: int) -> None:
    for what, size, most in (("JSON", text_bytes, MAX_JSON_BYTES), ("models", blob_bytes, MAX_MODELS_BYTES)):
        if size > most:
            raise ProfileError(f"a message of {size} bytes of {what} is more than the {most} that a profile agent takes; choose a smaller backbone.")


def _bytes(connection: socket.socket, count: int, *, may_end: bool = False) -> bytes:
    data = bytearray()
    while len(data) < count:
        if not (chunk := connection.recv(min(count - len(data), _CHUNK))):
            if may_end and not data:
                return b""
            raise ConnectionResetError("it closed the connection inside a message")
        data += chunk
    return bytes(data)


def request(jobs: Sequence[Work], repeats: Repeats, beside: bytes | None) -> Message:
    """A client's message that asks for `jobs`, see `Bench.measure`."""
    models = [job.model for job in jobs if isinstance(job, ModelWork)]
    fields = {"ask": "measure", "repeats": asdict(repeats), "jobs": [_job(job) for job in jobs], "beside": None if beside is None else len(beside)}
    return fields, b"".join([*models, beside or b""])


def _job(job: Work) -> dict[str, Any]:
    if isinstance(job, ModelWork):
        return {"model": len(job.model)}
    return {"image" if isinstance(job, ImageWork) else "coder": asdict(job)}


def requested(fields: Mapping[str, Any], blob: bytes) -> tuple[list[Work], Repeats, bytes | None]:
    """What `request` made a message of.

    Raises:
        ProfileError: it is not such a message.
    """
    kinds = {"image": ImageWork, "coder": CoderWork}
    parts = _Parts(blob)
    try:
        jobs: list[Work] = []
        for job in fields["jobs"]:
            ((kind, given),) = job.items()
            jobs.append(ModelWork(parts.take(given)) if kind == "model" else kinds[kind](**given))
        repeats = Repeats(**fields["repeats"])
        beside = None if fields["beside"] is None else parts.take(fields["beside"])
        parts.end()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"a request to measure is not understood ({error!r}); check that profile agent and client have the same version.") from None
    return jobs, repeats, beside


def reply(samples: Sequence[Samples]) -> Message:
    """An agent's message with what was measured."""
    rows = [{"ms": [round(ms, 6) for ms in each.ms], "optimised": len(each.optimised), "events": list(each.events)} for each in samples]
    return {"samples": rows}, b"".join(each.optimised for each in samples)


def replied(fields: Mapping[str, Any], blob: bytes) -> list[Samples]:
    """What `reply` made a message of.

    Raises:
        ProfileError: it is not such a message, or it says why nothing was measured.
    """
    if "error" in fields:
        raise ProfileError(str(fields["error"]))
    parts = _Parts(blob)
    try:
        found = [Samples(_times(row["ms"]), parts.take(row["optimised"]), tuple(row["events"])) for row in fields["samples"]]
        parts.end()
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ProfileError(f"the profile agent's reply is not understood ({error!r}); check that both have the same version.") from None
    return found


def _times(values: Sequence[Any]) -> tuple[float, ...]:
    times = tuple(float(ms) for ms in values)
    if not times or not all(math.isfinite(ms) and ms >= 0 for ms in times):
        raise ValueError(f"{str(list(times))[:80]} as the times of a job")
    return times


class _Parts:
    """The bytes after the JSON, taken piece by piece."""

    def __init__(self, blob: bytes) -> None:
        self._blob, self._place = memoryview(blob), 0

    def take(self, count: int) -> bytes:
        if type(count) is not int or not 0 <= count <= len(self._blob) - self._place:
            raise ValueError(f"{count} bytes of {len(self._blob) - self._place}")
        self._place += count
        return bytes(self._blob[self._place - count : self._place])

    def end(self) -> None:
        if self._place != len(self._blob):
            raise ValueError(f"{len(self._blob) - self._place} bytes too many")
