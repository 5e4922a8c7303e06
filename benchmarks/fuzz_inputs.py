"""Inputs nobody should send: valid frames, streams and bundles with something changed, and checksums and hashes that fit again afterwards."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx
from google.protobuf.message import DecodeError

from pipeline.runtime.bundle import CODEC, MANIFEST
from pipeline.runtime.frame import HEADER_BYTES, MAX_PAYLOAD_BYTES, VERSION_1, Frame

Files = dict[str, bytes]

EDGES = (0, 1, 2, 7, 8, 15, 16, 31, 127, 128, 129, 254, 255)
INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    8,
    9,
    15,
    16,
    255,
    256,
    257,
    1 << 14,
    1 << 16,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    -(1 << 31),
    1 << 32,
    (1 << 63) - 1,
    1 << 64,
    10**400,
)
STRINGS = ("", "\0", "a", "split", "edge-only", "device-only", "batch", "webp", "jpeg-bare", "../../etc/passwd", "ÿ" * 50, "-1", "nan", "zz" * 32, "0" * 64)
VALUES: tuple[Any, ...] = (None, True, False, *INTEGERS, 0.5, -0.0, 1e308, *STRINGS, [], [0], [1, 2, 3], {}, {"": 0}, [[[[]]]], [1] * 300)
COUNTS = (0, 1, 2, 3, 9, 13, 100, 1000, 4083, 4096, 5000)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to four bytes or runs of them changed, taken out, put in or moved."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 1, 2, 4, 8, 32)))
        what = rng.randrange(9)
        if what == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif what == 1 and at < len(out):
            out[at] = rng.choice(EDGES)
        elif what == 2 and at < len(out):
            out[at] = rng.randrange(256)
        elif what == 3:
            del out[at:end]
        elif what == 4:
            out[at:at] = rng.randbytes(rng.choice((1, 1, 2, 4, 16)))
        elif what == 5:
            out[at:at] = out[at:end] * rng.choice((1, 2, 8))
        elif what == 6:
            del out[at:]
        elif what == 7:
            out += bytes(rng.choice((1, 2, 8, 64)))
        elif len(out) >= 4:
            place = rng.randrange(len(out) - 3)
            out[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(INTEGERS[:-3]) & 0xFFFFFFFF)
    return bytes(out)


def payload_like(payload: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """A payload that resembles `payload`, is one of `others`, or has nothing to do with either."""
    what = rng.random()
    if what < 0.6:
        return damaged(payload, rng)
    if what < 0.75:
        return rng.choice(others)
    if what < 0.85:
        return rng.randbytes(rng.choice((1, 2, 4, len(payload), len(payload) + 1)))
    if what < 0.95:
        return bytes([rng.choice(EDGES)]) * rng.choice(COUNTS)
    return payload


def frame_like(frame: Frame, others: Sequence[bytes], ids: Sequence[bytes], rng: random.Random) -> bytes:
    """A frame with another kind, bundle, payload or length than `frame` has, and a checksum that fits.

    One of them alone, or all; `others` are payloads, `ids` bundle ids to take instead.
    """
    what = rng.choice(("payload", "payload", "payload", "kind", "id", "length", "version", "all"))
    kind, bundle_id, payload, version = int(frame.kind), frame.bundle_id, frame.payload, VERSION_1
    if what in ("kind", "all"):
        kind = rng.choice((*range(7), 127, 128, 255, rng.randrange(256)))
    if what in ("id", "all"):
        bundle_id = rng.choice((*ids, bytes(4), rng.randbytes(4), damaged(bundle_id, rng)[:4].ljust(4, b"\0")))
    if what in ("payload", "all"):
        payload = payload_like(payload, others, rng)
    if what == "version":
        version = rng.choice((VERSION_1 ^ 1, VERSION_1 + 1, 0, 255, rng.randrange(256)))
    length = len(payload)
    if what == "length":
        length = rng.choice((0, length - 1, length + 1, 2 * length, rng.randrange(1 << 24), MAX_PAYLOAD_BYTES)) & MAX_PAYLOAD_BYTES
    return checked(struct.pack(">B4sI", version, bundle_id, kind << 24 | length) + payload)


def checked(body: bytes) -> bytes:
    """With the checksum of a frame."""
    return body + struct.pack(">I", zlib.crc32(body))


def header(length: int, bundle_id: bytes, rng: random.Random) -> bytes:
    """Of a frame that says it has so many bytes of payload, and some of those."""
    return struct.pack(">B4sI", VERSION_1, bundle_id, 1 << 24 | length) + rng.randbytes(rng.choice((0, 1, 4, 60)))


def pieces(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """`data` as a network may cut it."""
    most = rng.choice((1, 3, HEADER_BYTES, 64, 1 << 16)) if len(data) < 500 else rng.choice((64, 1000, 1 << 16))
    at = 0
    while at < len(data):
        size = rng.randint(1, most)
        yield data[at : at + size]
        at += size


def json_like(value: Any, rng: random.Random) -> Any:
    """`value` with one to three of the values in it replaced, left out, doubled or put elsewhere."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(VALUES)
        holder, key = rng.choice(places)
        what = rng.randrange(6)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, list):
            holder.insert(key, holder[key])
        elif what == 2 and isinstance(holder[key], int):
            holder[key] += rng.choice((-1, 1, 255, -holder[key]))
        elif what == 3:
            other, place = rng.choice(places)
            if (isinstance(other, dict) and place in other) or (isinstance(other, list) and place < len(other)):
                holder[key] = copy.deepcopy(other[place])
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _places(value: Any, deepest: int = 6) -> Iterator[tuple[Any, Any]]:
    """Where something is, a few of each long list."""
    keys: Sequence[Any] = list(value) if isinstance(value, dict) else range(min(len(value), 12)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        if deepest:
            yield from _places(value[key], deepest - 1)


def onnx_like(model: bytes, rng: random.Random) -> bytes:
    """A model whose graph has something changed, if it can be read."""
    if rng.random() < 0.3:
        return damaged(model, rng)
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(model)
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice(GRAPH_CHANGES)(proto, rng)
        return proto.SerializeToString()
    except (DecodeError, IndexError, ValueError, TypeError):  # the change does not apply
        return damaged(model, rng)


def _change_node(proto: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(proto.graph.node)
    what = rng.randrange(5)
    if what == 0:
        node.op_type = rng.choice(("Relu", "Reshape", "Loop", "If", "Concat", "Expand", "Tile", "NoSuchOp", "", "Gather", "TopK", "Softmax", "Cast", "Resize"))
    elif what == 1:
        names = [name for each in proto.graph.node for name in (*each.input, *each.output)]
        node.input[rng.randrange(len(node.input))] = rng.choice((*names, "", "nowhere"))
    elif what == 2:
        node.output[0] = rng.choice((node.input[0], "", "logits", "symbols", "image"))
    elif what == 3:
        node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "nowhere"))
    else:
        proto.graph.node.remove(node)


def _change_attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    attribute = rng.choice([each for node in proto.graph.node for each in node.attribute])
    number = max(-(1 << 63), min((1 << 63) - 1, rng.choice(INTEGERS)))
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = number
    else:
        attribute.i = number


def _change_shape(proto: onnx.ModelProto, rng: random.Random) -> None:
    shape = rng.choice((*proto.graph.input, *proto.graph.output)).type.tensor_type
    if rng.random() < 0.2:
        shape.elem_type = rng.randrange(0, 24)
    elif rng.random() < 0.2:
        shape.shape.dim.pop(rng.randrange(len(shape.shape.dim)))
    else:
        rng.choice(shape.shape.dim).dim_value = max(-(1 << 63), min((1 << 63) - 1, rng.choice(INTEGERS)))


def _change_weights(proto: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(proto.graph.initializer)
    what = rng.randrange(5)
    if what == 0:
        tensor.raw_data = damaged(tensor.raw_data, rng)
    elif what == 1:
        tensor.dims[rng.randrange(len(tensor.dims))] = max(-(1 << 63), min((1 << 63) - 1, rng.choice(INTEGERS)))
    elif what == 2:
        tensor.data_type = rng.randrange(0, 24)
    elif what == 3:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=rng.choice(("/etc/passwd", "../manifest.json", "manifest.json", "")))
    else:
        proto.graph.initializer.remove(tensor)


def _change_model(proto: onnx.ModelProto, rng: random.Random) -> None:
    what = rng.randrange(4)
    if what == 0:
        proto.ir_version = rng.choice((0, 3, 99, -1, 1 << 40))
    elif what == 1:
        proto.opset_import[0].version = rng.choice((0, 1, 7, 99, 1 << 40))
    elif what == 2:
        proto.graph.input.add().CopyFrom(proto.graph.input[0])
    else:
        proto.graph.output.add().CopyFrom(rng.choice((proto.graph.output[0], proto.graph.input[0])))


GRAPH_CHANGES: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (_change_node, _change_attribute, _change_shape, _change_weights, _change_model)


def bundle_like(files: Mapping[str, bytes], rng: random.Random) -> Files:
    """The files of a bundle with something changed in one or two of them; hashes and bundle id fit again in nine of ten."""
    changed = dict(files)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice((MANIFEST, MANIFEST, *files))
        if name.endswith(".onnx"):
            changed[name] = onnx_like(changed[name], rng)
        elif rng.random() < (0.25 if name == CODEC else 0.05):
            changed[name] = damaged(changed[name], rng)
        else:
            changed[name] = _json(json_like(_loaded(changed[name]), rng))
    return rehashed(changed) if rng.random() < 0.9 else changed


def _loaded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return {}


def rehashed(files: Mapping[str, bytes]) -> Files:
    """With the hashes in the manifest, and the bundle id, of the files that are there."""
    manifest = _loaded(files[MANIFEST])
    if not isinstance(manifest, dict):
        return dict(files)
    hashes = manifest.get("sha256")
    if isinstance(hashes, dict):
        manifest["sha256"] = {name: hashlib.sha256(files[name]).hexdigest() if name in files else value for name, value in hashes.items()}
    manifest.pop("bundle_id", None)
    manifest["bundle_id"] = hashlib.sha256(_json(manifest)).hexdigest()
    return {**files, MANIFEST: _json(manifest)}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def packed(files: Mapping[str, bytes]) -> bytes:
    """A bundle's files as one input."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def unpacked(data: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
