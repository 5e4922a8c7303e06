"""Tiny bundles to be hostile to, what their devices send, and how a target says that something does not hold."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.runtime.bundle import EDGE, FILES, Bundle, write_bundle
from pipeline.runtime.coder import build_embedded_tables, build_tables
from pipeline.runtime.context import fit_contexts
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.frame import Frame, unpack
from pipeline.runtime.preprocess import Preprocessing
from tests.pipeline.runtime.conftest import BITS, CLASSES, CODE, SIZE, halves


class Target(Protocol):
    """Makes inputs and says what becomes of one: `answered` or `refused`. Whatever it raises is a failure of what it tests."""

    def generate(self, rng: random.Random) -> tuple[bytes, bool]:
        """An input, and whether it holds a changed frame or bundle whose checksum or hashes fit."""
        ...

    def check(self, data: bytes) -> str: ...

    def close(self) -> None: ...


class Broken(Exception):
    """What must hold does not."""


def must(holds: Any, else_what: str) -> None:
    if not holds:
        raise Broken(else_what)


def bundles(folder: Path) -> list[Bundle]:
    """A tiny bundle of each kind, codec and image format, written to `folder`."""
    rng = np.random.default_rng(0)
    plain, wide = (rng.integers(0, 1 << bits, (20, *CODE)).astype(np.uint8) for bits in (BITS, 8))
    tables = {
        "plain": [build_tables(plain, BITS)],
        "contexts": [build_tables(plain, BITS, fit_contexts(plain))],
        "points": [build_embedded_tables(wide, 2, 3), build_embedded_tables(wide, 1, 2)],
    }
    made = [_bundle(folder / name, "split", points=points) for name, points in tables.items()]
    made += [_bundle(folder / name, "edge-only", image_format=name, quality=quality) for name, quality in (("webp", 100), ("jpeg", 60), ("jpeg-bare", 60))]
    return [*made, _bundle(folder / "device-only", "device-only")]


def _bundle(path: Path, kind: str, points: Any = (), image_format: str = "webp", quality: int | None = None) -> Bundle:
    files = halves(0)
    if kind == "edge-only":
        files[EDGE] = files["device-only.onnx"]
    return write_bundle(
        path,
        kind=kind,
        candidate={"cut": "layer1", "quality": quality, "image_format": image_format},
        plan={},
        preprocessing=Preprocessing(SIZE),
        classes=CLASSES,
        files={name: files[name] for name in FILES[kind] if name in files},
        points=points,
        extra={"opset": 18},
    )


def sent(bundle: Bundle, count: int = 8) -> list[Frame]:
    """Frames that a device of this bundle sends."""
    device, rng = DeviceHalf(bundle), np.random.default_rng(1)
    found = []
    for index in range(count):
        if len(bundle.points if bundle.kind == "split" else ()) > 1:
            device.point = index % len(bundle.points)
        found.append(unpack(device.run(rng.integers(0, 256, device.shape).astype(np.uint8))[0]))
    return found
