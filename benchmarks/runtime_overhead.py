"""What device and edge add to their two calls of ONNX Runtime, from a uint8 array to a record, on loopback; `python benchmarks/runtime_overhead.py --out FILE`.

One device asks edges, and echoes of the same payload, in turns of `TURN` images, in an order drawn anew each time. Servers are pinned to one core, the
device to another. Both halves' calls of ONNX Runtime are timed in the very requests they are subtracted from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import runtime_wire
from benchmarks.echo import LENGTH, METHOD, received
from benchmarks.results_file import ROOT, figure
from benchmarks.runtime_coder import bundles, images
from benchmarks.timed_edge import time_onnx
from pipeline.files import atomic_write_json
from pipeline.runtime.bundle import Bundle
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.dial import dial
from pipeline.runtime.fallback import Fallback
from pipeline.runtime.frame import unpack
from pipeline.runtime.framing import Compact
from pipeline.runtime.grpc_transport import OPTIONS
from pipeline.runtime.keymaking import make_keys
from pipeline.runtime.records import record_of

ROUNDS, WARM_UP = 2000, 200
TURN = 50  # with one image a turn, each would find the caches full of another way's tables
HOST, DEADLINE_MS = "127.0.0.1", 1000.0
EDGE_OPTIONS = ("--port", "0", "--max-per-second", "1000000")  # faster than an edge lets a device ask otherwise
PORT = re.compile(r"(\d+)(?: for gRPC)?$")
TIMES = ("total_ms", "onnx_ms", "coder_ms")


@contextlib.contextmanager
def program(*arguments: str | Path, ports: int, core: int) -> Iterator[list[int]]:
    """A Python program, pinned to `core`, and the ports that its first lines name; it ends with the block."""
    pin = partial(os.sched_setaffinity, 0, {core})
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=pin) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline().strip() for _ in range(ports)]
            yield [int(found[1]) for line in lines if (found := PORT.search(line))]
        finally:
            process.terminate()


@contextlib.contextmanager
def asked(edge: str, bundle: Bundle, keys: Path | None = None, compact: bool = False) -> Iterator[Callable[[np.ndarray], dict[str, Any]]]:
    """What `coinfer device` does for each picture once it is preprocessed: pixels uint8 (3, 32, 32) in, a record out; the edge at the address `edge` helps."""
    transport = dial(edge, keys, compact=bundle.bundle_id if compact else b"")
    fallback = Fallback(DeviceHalf(bundle), transport, DEADLINE_MS)

    def ask(pixels: np.ndarray) -> dict[str, Any]:
        answer, why = fallback.classify(pixels)
        if why is not None:
            raise RuntimeError(f"{edge} was asked in vain: {why}")
        return record_of(bundle, answer)

    try:
        yield ask
    finally:
        transport.close()


@contextlib.contextmanager
def tcp_echo(port: int) -> Iterator[Callable[[bytes], object]]:
    """Sends bytes to `echo.py tcp` and waits for them."""
    with socket.create_connection((HOST, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def ask(payload: bytes) -> object:
            connection.sendall(LENGTH.pack(len(payload)) + payload)
            return received(connection, LENGTH.size + len(payload))

        yield ask


@contextlib.contextmanager
def grpc_echo(port: int) -> Iterator[Callable[[bytes], object]]:
    """Sends bytes to `echo.py grpc` and waits for them, over a channel like that of `GrpcTransport`."""
    with grpc.insecure_channel(f"{HOST}:{port}", OPTIONS) as channel:
        yield channel.unary_unary(METHOD)


def measure(rounds: int = ROUNDS, warm_up: int = WARM_UP, wire_images: int = runtime_wire.IMAGES) -> dict[str, Any]:
    """Send pictures all ways, in turns, `rounds` of them after the first `warm_up`, and `wire_images` to have their bytes counted.

    Returns {"payload_bytes": of each picture, "frame_overhead_bytes": {"whole", "compact"}, "ways": {name: {"total_ms", "onnx_ms" (of both halves),
    "coder_ms" (as the parts encode_ms and decode_ms say, with packing and checking the frame)}}, "floor": {name: ms}, "wire": what `runtime_wire`
    counts, or {"why": there is none}}, one sample a round.
    """
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen, static = bundles(folder / "bundles")
        make_keys(folder / "keys", [HOST], ["device"])
        os.sched_setaffinity(0, {max(cores)})
        try:
            found = _asked(folder, chosen, static, min(cores), rounds, warm_up)
        finally:
            os.sched_setaffinity(0, cores)
        frames = [DeviceHalf(chosen).run(image)[0] for image in images(chosen)]
        wire = _wire(chosen, wire_images)
    payloads = [unpack(frame).payload for frame in frames]
    compact = Compact(chosen.bundle_id)
    around = {"whole": len(frames[0]) - len(payloads[0]), "compact": len(compact.outgoing(frames[0])) - len(payloads[0])}
    return {"payload_bytes": [len(payload) for payload in payloads], "frame_overhead_bytes": around, "wire": wire, **found}


def _wire(bundle: Bundle, count: int) -> dict[str, Any]:
    try:
        return runtime_wire.measure(bundle.path, count)
    except RuntimeError as error:
        return {"why": str(error)}


def _asked(folder: Path, chosen: Bundle, static: Bundle, server_core: int, rounds: int, warm_up: int) -> dict[str, Any]:
    files = {"open": folder / "open.json", "tls": folder / "tls.json"}
    pixels = images(chosen)
    payloads = [DeviceHalf(chosen).run(image)[0] for image in pixels]
    device_onnx_ms = time_onnx()
    with contextlib.ExitStack() as stack:
        start = partial(program, core=server_core)
        ports = stack.enter_context(
            start("benchmarks/timed_edge.py", files["open"], "--bundle", folder / "bundles", *EDGE_OPTIONS, "--grpc-port", "0", ports=2)
        )
        keys = folder / "keys"
        tls_options = ("--bundle", folder / "bundles", *EDGE_OPTIONS, "--keys", keys / "edge")
        [tls_port] = stack.enter_context(start("benchmarks/timed_edge.py", files["tls"], *tls_options, ports=1))
        grpc_port, tcp_port = ports
        begun = {
            "tcp": asked(f"{HOST}:{tcp_port}", chosen),
            "tcp_static": asked(f"{HOST}:{tcp_port}", static),
            "tcp_compact": asked(f"{HOST}:{tcp_port}", chosen, compact=True),
            "tcp_tls": asked(f"{HOST}:{tls_port}", chosen, keys / "device"),
            "grpc": asked(f"grpc://{HOST}:{grpc_port}", chosen),
        }
        ways = {name: stack.enter_context(way) for name, way in begun.items()}
        floors = {
            "tcp": stack.enter_context(tcp_echo(*stack.enter_context(start("benchmarks/echo.py", "tcp", ports=1)))),
            "grpc": stack.enter_context(grpc_echo(*stack.enter_context(start("benchmarks/echo.py", "grpc", ports=1)))),
        }
        device_onnx_ms.clear()  # what the fallbacks tried out first
        turns = [(True, name) for name in ways] + [(False, name) for name in floors]
        order: dict[str, list[str]] = {name: [] for name in files}
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        floor_ms: dict[str, list[float]] = {name: [] for name in floors}
        draw = random.Random(0)
        for begin in range(0, warm_up + rounds, TURN):
            drawn = draw.sample(turns, len(turns))
            for (is_edge, name), number in product(drawn, range(begin, min(begin + TURN, warm_up + rounds))):
                image, payload = pixels[number % len(pixels)], payloads[number % len(pixels)]
                begin_s = time.perf_counter()
                record = ways[name](image) if is_edge else floors[name](payload)
                total_ms = 1e3 * (time.perf_counter() - begin_s)
                if is_edge:
                    order["tls" if name == "tcp_tls" else "open"].append(name)
                    [half_ms] = device_onnx_ms
                    device_onnx_ms.clear()
                    samples[name].append({"total_ms": total_ms, "onnx_ms": half_ms, "coder_ms": record["encode_ms"] + record["decode_ms"]})
                else:
                    floor_ms[name].append(total_ms)
    for kind, path in files.items():
        add_edge_times(samples, order[kind], json.loads(path.read_text()))
    kept = {name: {part: [round(sample[part], 4) for sample in rows[warm_up:]] for part in TIMES} for name, rows in samples.items()}
    return {"ways": kept, "floor": {name: [round(ms, 4) for ms in times[warm_up:]] for name, times in floor_ms.items()}}


def add_edge_times(samples: Mapping[str, Sequence[dict[str, float]]], order: Sequence[str], edge_ms: Sequence[float]) -> None:
    """Add to the onnx_ms of `samples` (by way) the calls of one edge, which was asked the ways in `order`.

    Raises:
        RuntimeError: the edge made another number of calls than it was asked for.
    """
    if len(order) != len(edge_ms):
        raise RuntimeError(f"the edge ran {len(edge_ms)} times for {len(order)} requests; its times belong to none of them")
    rows = {name: iter(samples[name]) for name in order}
    for name, ms in zip(order, edge_ms, strict=True):
        next(rows[name])["onnx_ms"] += ms


SAID = {
    "tcp": "over TCP",
    "tcp_static": "over TCP, the bundle having one coder table a channel",
    "tcp_compact": "over TCP in the compact profile",
    "tcp_tls": "over TCP with TLS 1.3 and keys on both sides",
    "grpc": "over gRPC",
}


def figures(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`overhead_ms.*` with the coder's share of it, `floor_ms.*`, `frame_overhead_bytes.*`, and the figures of `runtime_wire`."""
    found: dict[str, Any] = {}
    for name, parts in raw["ways"].items():
        over = np.subtract(parts["total_ms"], parts["onnx_ms"])
        how = (
            f"median (quartiles) from a uint8 image to its record on loopback {SAID[name]}, less the two calls of ONNX Runtime in the same request; "
            f"with the coder, 4,096 symbols, no batching delay, one core each"
        )
        found[f"overhead_ms.{name}"] = figure(float(np.median(over)), "ms", how, n=len(over), spread=_quartiles(over))
        how = "median (quartiles) of what encoding and decoding, with packing and checking the frame, are of that"
        found[f"overhead_coder_ms.{name}"] = figure(float(np.median(parts["coder_ms"])), "ms", how, n=len(over), spread=_quartiles(parts["coder_ms"]))
    servers = {"tcp": "blocking sockets in Python", "grpc": "a grpc.aio server"}
    for name, times_ms in raw["floor"].items():
        how = f"median (quartiles) of a bare echo of the same frames by {servers[name]}, asked in turns with the edge"
        found[f"floor_ms.{name}"] = figure(float(np.median(times_ms)), "ms", how, n=len(times_ms), spread=_quartiles(times_ms))
    for name, count in raw["frame_overhead_bytes"].items():
        key = "frame_overhead_bytes" + ("" if name == "whole" else f".{name}")
        found[key] = figure(count, "bytes", f"length of a {name} frame less that of its payload")
    return found | runtime_wire.figures(raw["wire"])


def _quartiles(values: Any) -> tuple[float, float]:
    low, high = np.percentile(values, [25, 75])
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
        print(f"{key:36} {row['value'] if row['value'] is None else round(row['value'], 4)} {row['unit']} {row['spread']} n={row['n']}")
