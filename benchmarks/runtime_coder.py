"""What entropy coding 4,096 symbols takes, beside compressors and plain packing of the same symbols; `python benchmarks/runtime_coder.py --out FILE`."""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import figure
from benchmarks.runtime_start import PICTURES, pictures, untrained_bundle
from pipeline.files import atomic_write_json
from pipeline.runtime import coder, rans_twin
from pipeline.runtime.bundle import DEVICE, DEVICE_ONLY, EDGE, Bundle, write_bundle
from pipeline.runtime.coder import CodecTables, build_tables, decode, encode
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import FrameOpener

CODE_CHANNELS, BITS = 16, 4  # of 16 x 16
ROUNDS, TWIN_ROUNDS, WARM_UP = 2000, 60, 20
TURN = 50  # codes that a way gets at once

Symbols = np.ndarray[Any, np.dtype[np.uint8]]
Way = tuple[Callable[[Symbols], bytes], Callable[[bytes], Symbols]]


def bundles(folder: Path) -> tuple[Bundle, Bundle]:
    """In `folder`, a split whose code is 4,096 symbols of 4 bits with the tables that `export` chooses, in contexts, and one with one table a channel."""
    chosen = untrained_bundle(folder / "chosen", CODE_CHANNELS)
    manifest = chosen.manifest
    static = write_bundle(
        folder / "static",
        kind=chosen.kind,
        candidate=manifest["candidate"],
        plan=manifest["plan"],
        preprocessing=chosen.preprocessing,
        classes=chosen.classes,
        files={name: chosen.read(name) for name in (DEVICE, EDGE, DEVICE_ONLY)},
        points=[build_tables(symbols_of(chosen), BITS)],
        extra={"opset": manifest["opset"]},
    )
    return chosen, static


def images(bundle: Bundle) -> list[Symbols]:
    """Pictures as `bundle` preprocesses them: uint8 (3, 32, 32) each."""
    return [bundle.preprocessing.pixels(Image.open(io.BytesIO(file))) for file in pictures(PICTURES)]


def symbols_of(bundle: Bundle) -> Symbols:
    """What its device half makes of `images`: uint8 (images, 16, 16, 16)."""
    device, opener = DeviceHalf(bundle), FrameOpener(bundle)
    return np.concatenate([opener.open(device.run(image)[0]) for image in images(bundle)])


def ways(tables: CodecTables, static: CodecTables, shape: tuple[int, int, int]) -> dict[str, Way]:
    """By name, functions that encode symbols uint8 `shape` and decode them again."""
    zstd = pa.Codec("zstd")
    size = int(np.prod(shape))

    def packed(symbols: Symbols) -> bytes:
        pairs = symbols.ravel()
        return bytes((pairs[0::2] << 4 | pairs[1::2]).tobytes())

    def unpacked(payload: bytes) -> Symbols:
        pairs = np.frombuffer(payload, np.uint8)
        return np.stack([pairs >> 4, pairs & 15], axis=1).reshape(shape)

    def restored(payload: bytes) -> Symbols:
        return np.frombuffer(payload, np.uint8).reshape(shape)

    coded: Way = (lambda symbols: encode(symbols, tables)), (lambda payload: decode(payload, shape, tables))
    return {
        "c": coded,
        "c_static": ((lambda symbols: encode(symbols, static)), (lambda payload: decode(payload, shape, static))),
        "python": (_by_twin(coded[0]), _by_twin(coded[1])),
        "zlib": ((lambda symbols: zlib.compress(symbols.tobytes())), (lambda payload: restored(zlib.decompress(payload)))),
        "zstd": ((lambda symbols: zstd.compress(symbols.tobytes(), asbytes=True)), (lambda payload: restored(zstd.decompress(payload, size, asbytes=True)))),
        "raw": (packed, unpacked),
    }


def _by_twin(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` as an install without the C extension does it."""

    def done(argument: Any) -> Any:
        coded = coder._encode, coder._decode
        coder._encode, coder._decode = rans_twin.encode, rans_twin.decode
        try:
            return work(argument)
        finally:
            coder._encode, coder._decode = coded

    return done


def measure(rounds: int = ROUNDS, twin_rounds: int = TWIN_ROUNDS) -> dict[str, Any]:
    """Encode and decode the codes of pictures, all ways in turns of `TURN` in an order drawn anew, on the last core; Python only in the first rounds.

    Returns {"symbols", "ms": {way: {"encode": [...], "decode": [...]}}, "bytes": {way: one for each picture}}.

    Raises:
        RuntimeError: the C extension is not built, or a way does not give back what it was given.
    """
    with tempfile.TemporaryDirectory() as folder:
        chosen, static = bundles(Path(folder))
        symbols, (tables,), (plain,) = symbols_of(chosen), chosen.points, static.points
    return compared(symbols, tables, plain, rounds, twin_rounds)


def compared(symbols: Symbols, tables: CodecTables, static: CodecTables, rounds: int, twin_rounds: int) -> dict[str, Any]:
    """What `measure` gives, of the codes `symbols` uint8 (N, h, H, W)."""
    if not coder.HAVE_C:
        raise RuntimeError("the C coder is not built; run `make` first.")
    _, channels, height, width = symbols.shape
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        return {"symbols": symbols[0].size, **_timed(ways(tables, static, (channels, height, width)), symbols, rounds, twin_rounds)}
    finally:
        os.sched_setaffinity(0, cores)


def _timed(found: Mapping[str, Way], symbols: Symbols, rounds: int, twin_rounds: int) -> dict[str, Any]:
    ms: dict[str, dict[str, list[float]]] = {name: {"encode": [], "decode": []} for name in found}
    sizes: dict[str, list[int]] = {name: [] for name in found}
    draw = random.Random(0)
    for begin in range(-WARM_UP, rounds, TURN):
        end = min(begin + TURN, rounds)
        for name in draw.sample(list(found), len(found)):
            pack, unpack = found[name]
            for number in range(begin, end if name != "python" else min(end, twin_rounds)):
                code = symbols[number % len(symbols)]
                begin_s = time.perf_counter()
                payload = pack(code)
                middle_s = time.perf_counter()
                restored = unpack(payload)
                end_s = time.perf_counter()
                if not np.array_equal(restored, code):
                    raise RuntimeError(f"{name} does not give back what it was given")
                if number >= 0:
                    ms[name]["encode"].append(round(1e3 * (middle_s - begin_s), 5))
                    ms[name]["decode"].append(round(1e3 * (end_s - middle_s), 5))
                    if number < len(symbols):
                        sizes[name].append(len(payload))
    return {"ms": ms, "bytes": sizes}


SAID = {
    "c": "rANS with the tables that `export` chooses, in contexts, C extension",
    "c_static": "rANS with one table a channel, C extension",
    "python": "as c, by the pure-Python twin",
    "zlib": "zlib, level 6, a byte a symbol",
    "zstd": "Zstandard as pyarrow has it, its default level, a byte a symbol",
    "raw": "two symbols a byte, packed with numpy",
}


def figures(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`coder_ms_4096.*` and `coder_bytes_4096.*`."""
    found = {}
    for name, parts in raw["ms"].items():
        both = np.add(parts["encode"], parts["decode"])
        how = f"median (quartiles) of encode plus decode of {raw['symbols']} symbols of 4 bits from an untrained ResNet-20, one core: {SAID[name]}"
        found[f"coder_ms_4096.{name}"] = figure(float(np.median(both)), "ms", how, n=len(both), spread=_quartiles(both))
        sizes = raw["bytes"][name]
        how = f"mean (least, most) of the payload of the same symbols: {SAID[name]}"
        found[f"coder_bytes_4096.{name}"] = figure(float(np.mean(sizes)), "bytes", how, n=len(sizes), spread=(min(sizes), max(sizes)))
    return found


def _quartiles(values: Iterable[float]) -> tuple[float, float]:
    low, high = np.percentile(list(values), [25, 75])
    return float(low), float(high)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(";")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    measured = measure(arguments.rounds)
    if arguments.out:
        atomic_write_json(arguments.out, measured)
    for key, row in figures(measured).items():
        print(f"{key:24} {row['value']:9.4f} {row['unit']:5} {row['spread']}  n={row['n']}")
