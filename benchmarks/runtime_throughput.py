"""What one edge sustains: closed loops of 1 to 64 clients against the bare ONNX Runtime loop on the same core, and latency at half of that load.

`python benchmarks/runtime_throughput.py --out FILE` writes what `measure` gives; the machine has to be quiet, and takes 16 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results_file import figure
from benchmarks.runtime_start import edge_program, pictures, untrained_bundle
from pipeline.errors import CoinferError
from pipeline.files import atomic_write_json
from pipeline.runtime.bundle import Bundle
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import REPLY_TIMES, EdgeHalf
from pipeline.runtime.frame import HEADER_BYTES, Kind, frame_bytes, unpack

SERVER_CORE, CLIENT_CORE = 0, 1
PICTURES = 128
BATCHES = (1, 2, 4, 8, 16, 32, 64)
WARM_S, DRAIN_S, LINGER_S = 1.0, 15.0, 0.2
SPIN_S = 0.002  # asyncio's timers are late by up to a millisecond
HALF_LOAD_CLIENTS = 16
TOLERANCE = 1e-4  # of the largest logit: the order of a sum in floating point depends on the batch
COUNTS = ("errors", "lost", "doubled")


@dataclass(frozen=True)
class Load:
    """A network, where it is cut, and the numbers of clients that ask for it at once."""

    backbone: str
    cut: str
    code_channels: int
    clients: tuple[int, ...]


LOADS = {
    "resnet18": Load("cifar_resnet18", "layer4.0", 32, (1, 2, 4, 8, 16, 32, 64)),  # the edge half takes about 2 ms an image
    "resnet20": Load("resnet20", "layer2.0", 8, (1, 8, 64)),
}


def measure(seconds: float = 60, loads: Mapping[str, Load] = LOADS, bare_s: float = 1, max_batch: int = 32) -> dict[str, Any]:
    """Each level of each of `loads` for `seconds`, the bare loop before and after each level, `bare_s` for each batch size, and Poisson arrivals at
    half of the best rate for `seconds`.

    Returns {"seconds", "max_batch", NAME: {"cut", "code_shape", "frame_bytes" (median), "bare" and "bare_with_decode" ({batch size:
    [images a second, before the first level, after it, ...]}), "levels": [{"clients", "sent", "per_s" (by second), "p50_ms", "p99_ms", and `COUNTS`}],
    "half_load": {"clients", "sent", "offered_per_s", "late_ms" (p99 of how late the client sent), "latency_ms" (each, since it was due), and `COUNTS`}}}.
    """
    found: dict[str, Any] = {"seconds": seconds, "max_batch": max_batch}
    options = ("--max-batch", str(max_batch), "--max-per-second", "1e9")  # one address stands for all devices
    for name, load in loads.items():
        with tempfile.TemporaryDirectory(prefix="coinfer-bench-") as folder:
            bundle = untrained_bundle(Path(folder) / "bundle", load.code_channels, load.backbone, load.cut)
            found[name] = {"cut": load.cut, **loaded(bundle, load.clients, seconds, bare_s, options)}
    return found


def loaded(bundle: Bundle, levels: Sequence[int], seconds: float, bare_s: float, options: Sequence[str]) -> dict[str, Any]:
    traffic = Traffic.of(bundle)
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        with _on_core(SERVER_CORE):  # children stay where they were started
            address = stack.enter_context(edge_program([sys.executable, "-m", "pipeline.cli"], bundle.path, *options))
            alone = stack.enter_context(ProcessPoolExecutor(1, context))
            alone.submit(os.getpid).result()  # or it would start later, elsewhere
        stack.enter_context(_on_core(CLIENT_CORE))
        port = int(address.rpartition(":")[2])
        bare = [alone.submit(bare_rates, bundle.path, traffic.frames, bare_s).result()]
        found: list[dict[str, Any]] = []
        for clients in levels:
            found.append(asyncio.run(closed_loop(port, traffic, clients, seconds)))
            bare.append(alone.submit(bare_rates, bundle.path, traffic.frames, bare_s).result())
        sustained_per_s = max(statistics.mean(level["per_s"]) for level in found)
        half_load = asyncio.run(open_loop(port, traffic, HALF_LOAD_CLIENTS, seconds, sustained_per_s / 2))
    return {
        "code_shape": list(bundle.code_shape),
        "frame_bytes": statistics.median(map(len, traffic.frames)),
        **{way: {str(size): [block[way][size] for block in bare] for size in BATCHES} for way in ("bare", "bare_with_decode")},
        "levels": found,
        "half_load": half_load,
    }


@contextlib.contextmanager
def _on_core(core: int) -> Iterator[None]:
    """This thread, and processes that it starts, on one core; elsewhere again after the block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@cache
def _half(path: Path) -> EdgeHalf:
    return EdgeHalf(Bundle.load(path))


def bare_rates(path: Path, frames: Sequence[bytes], seconds: float) -> dict[str, dict[int, float]]:
    """Images a second of ONNX Runtime in this process, by batch size, each for `seconds`: of symbols that are there already ("bare"), and from frames."""
    half = _half(path)
    found: dict[str, dict[int, float]] = {"bare": {}, "bare_with_decode": {}}
    for size in BATCHES:
        batch_frames = [*itertools.islice(itertools.cycle(frames), size)]
        batch = np.concatenate([half.open(frame) for frame in batch_frames])
        found["bare"][size] = _per_s(lambda batch=batch: half.run(batch), size, seconds)
        found["bare_with_decode"][size] = _per_s(
            lambda batch_frames=batch_frames: half.run(np.concatenate([half.open(frame) for frame in batch_frames])), size, seconds
        )
    return found


def _per_s(call: Callable[[], object], size: int, seconds: float) -> float:
    call()
    calls, begin_s = 0, time.perf_counter()
    while (spent_s := time.perf_counter() - begin_s) < seconds:
        call()
        calls += 1
    return round(size * calls / spent_s, 2)


@dataclass(frozen=True)
class Traffic:
    """Frames, and the logits (frames, classes) that answer them, any two of which differ by far more than `tolerance`."""

    frames: list[bytes]
    logits: NDArray[np.float32]

    @classmethod
    def of(cls, bundle: Bundle, count: int = PICTURES) -> Traffic:
        """What a device half sends of so many pictures."""
        device, edge = DeviceHalf(bundle), EdgeHalf(bundle)
        frames = [device.run(Image.open(io.BytesIO(file)))[0] for file in pictures(count)]
        made = cls(frames, np.concatenate([edge.run(edge.open(frame)) for frame in frames]))
        gaps = np.abs(made.logits[:, None] - made.logits).max(axis=2) + np.diag(np.full(count, np.inf))
        if gaps.min() < 10 * made.tolerance:
            raise CoinferError(f"answers to different pictures differ by {gaps.min():.2g} only, so a wrong one might pass for right; take other weights.")
        return made

    @property
    def tolerance(self) -> float:
        return TOLERANCE * float(np.abs(self.logits).max())

    def is_answer(self, reply: bytes, index: int) -> bool:
        """Whether `reply` is the one to frame `index`."""
        try:
            opened = unpack(reply)
        except CoinferError:
            return False
        if opened.kind is not Kind.REPLY or len(opened.payload) != REPLY_TIMES.size + 4 * self.logits.shape[1]:
            return False
        return bool(np.abs(np.frombuffer(opened.payload, "<f4", offset=REPLY_TIMES.size) - self.logits[index]).max() < self.tolerance)


@dataclass
class Talk(asyncio.Protocol):
    """One connection, what was sent over it, when that was due, and what came back when."""

    traffic: Traffic
    next_index: int
    told: Callable[[Talk], None]
    sent: list[int] = field(default_factory=list)
    due_s: list[float] = field(default_factory=list)
    sent_s: list[float] = field(default_factory=list)
    replies: list[bytes] = field(default_factory=list)
    came_s: list[float] = field(default_factory=list)
    is_broken: bool = False
    is_over: bool = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self._buffer = transport, bytearray()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_broken = not self.is_over

    def send(self, due_s: float) -> None:
        self.sent.append(self.next_index)
        self.due_s.append(due_s)
        self.sent_s.append(time.perf_counter())
        self.transport.write(self.traffic.frames[self.next_index])
        self.next_index = (self.next_index + 1) % len(self.traffic.frames)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        self._buffer += data
        while len(self._buffer) >= HEADER_BYTES and len(self._buffer) >= (length := frame_bytes(bytes(self._buffer[:HEADER_BYTES]))):
            self.replies.append(bytes(self._buffer[:length]))
            self.came_s.append(now_s)
            del self._buffer[:length]
            self.told(self)

    def verdict(self) -> dict[str, int]:
        """`COUNTS`: answers that are none, or none to what was asked, and connections that broke; frames without an answer; answers that came again."""
        counts, place = dict.fromkeys(COUNTS, 0), 0
        for reply in self.replies:
            if self._is_answer(reply, place):
                place += 1
            elif self._is_answer(reply, place - 1):
                counts["doubled"] += 1
            elif self._is_answer(reply, place + 1):
                counts["lost"] += 1
                place += 2
            else:
                counts["errors"] += 1
                place += 1
        counts["lost"] += max(0, len(self.sent) - place)
        counts["errors"] += self.is_broken
        return counts

    def _is_answer(self, reply: bytes, place: int) -> bool:
        return 0 <= place < len(self.sent) and self.traffic.is_answer(reply, self.sent[place])


async def _talks(port: int, traffic: Traffic, clients: int, told: Callable[[Talk], None]) -> list[Talk]:
    loop, talks = asyncio.get_running_loop(), []
    for number in range(clients):
        first = number * len(traffic.frames) // clients
        _, talk = await loop.create_connection(lambda first=first: Talk(traffic, first, told), "127.0.0.1", port)
        talks.append(talk)
    return talks


async def _ended(talks: Sequence[Talk]) -> dict[str, int]:
    """The verdict on all, once what was sent is answered or lost, and what comes twice has come."""
    end_s = time.perf_counter() + DRAIN_S
    while any(len(talk.replies) < len(talk.sent) for talk in talks) and time.perf_counter() < end_s:
        await asyncio.sleep(0.01)
    await asyncio.sleep(LINGER_S)
    for talk in talks:
        talk.is_over = True
        talk.transport.abort()
    verdicts = [talk.verdict() for talk in talks]
    return {name: sum(verdict[name] for verdict in verdicts) for name in COUNTS}


async def closed_loop(port: int, traffic: Traffic, clients: int, seconds: float) -> dict[str, Any]:
    """So many clients, each of which sends its next frame when it has its answer."""
    begin_s = time.perf_counter() + WARM_S
    end_s = begin_s + seconds

    def told(talk: Talk) -> None:
        if talk.came_s[-1] < end_s and len(talk.replies) >= len(talk.sent):
            talk.send(time.perf_counter())

    talks = await _talks(port, traffic, clients, told)
    for talk in talks:
        talk.send(time.perf_counter())
    await asyncio.sleep(end_s - time.perf_counter())
    counts = await _ended(talks)
    due_s, came_s = _due_and_came_s(talks).T
    edges_s = np.linspace(begin_s, end_s, max(1, round(seconds)) + 1)
    per_s = np.histogram(came_s, edges_s)[0] / (edges_s[1] - edges_s[0])
    p50_ms, p99_ms = (round(1e3 * float(share), 3) for share in np.quantile((came_s - due_s)[came_s >= begin_s], (0.5, 0.99)))
    sent = sum(len(talk.sent) for talk in talks)
    return {"clients": clients, "sent": sent, "per_s": [round(float(each), 2) for each in per_s], "p50_ms": p50_ms, "p99_ms": p99_ms, **counts}


async def open_loop(port: int, traffic: Traffic, clients: int, seconds: float, per_s: float) -> dict[str, Any]:
    """Frames that come when they come, however long others take: each of the clients sends at random, `per_s` together."""
    random = np.random.default_rng(0)
    count = max(1, round(per_s * seconds))
    after_s = np.cumsum(random.exponential(1 / per_s, count))
    talks = await _talks(port, traffic, clients, lambda talk: None)
    begin_s = time.perf_counter()
    for moment_s, number in zip((begin_s + after_s).tolist(), random.integers(0, clients, count).tolist(), strict=True):
        while (left_s := moment_s - time.perf_counter()) > 0:
            await asyncio.sleep(left_s - SPIN_S if left_s > SPIN_S else 0)
        talks[number].send(moment_s)
    counts = await _ended(talks)
    late_ms = np.concatenate([1e3 * (np.array(talk.sent_s) - talk.due_s) for talk in talks])
    due_s, came_s = _due_and_came_s(talks).T
    return {
        "clients": clients,
        "sent": count,
        "offered_per_s": round(per_s, 2),
        "late_ms": round(float(np.quantile(late_ms, 0.99)), 3),
        "latency_ms": [round(1e3 * float(each), 2) for each in came_s - due_s],
        **counts,
    }


def _due_and_came_s(talks: Sequence[Talk]) -> NDArray[np.float64]:
    """(replies, 2), in the order in which they were due; what came again, after all else of a connection, is left out."""
    return np.array(sorted(pair for talk in talks for pair in zip(talk.due_s, talk.came_s, strict=False)))


def figures(raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, key in (("resnet18", "throughput_ratio"), ("resnet20", "throughput_ratio_resnet20")):
        if name not in raw:
            continue
        row = raw[name]
        best_batch, at = best(row)
        level, bare = row["levels"][at], row["bare"][best_batch]
        per_s, beside = statistics.mean(level["per_s"]), statistics.mean(bare[at : at + 2])
        one_ms = 1e3 / statistics.median(row["bare"]["1"])
        how = f"{level['clients']} clients in closed loops ask an edge ({name} cut at {row['cut']}, half of {one_ms:.2f} ms an image at batch 1; one core, one "
        how += f"thread, --max-batch {raw['max_batch']}), {per_s:.0f} answers a second, over ONNX Runtime alone on that core at batch {best_batch}, its best, "
        how += f"without decoding, {beside:.0f} images a second right before and after; spread: over its slowest and fastest run"
        found[key] = figure(per_s / beside, "x", how, n=len(level["per_s"]), spread=(per_s / max(bare), per_s / min(bare)))
    half_load = raw["resnet18"]["half_load"]
    latency_ms = half_load["latency_ms"]
    parts = [float(np.quantile(part, 0.99)) for part in np.array_split(latency_ms, 5)]
    how = f"resnet18: from when a frame was due to its answer, Poisson arrivals at half of the best rate, {half_load['offered_per_s']:.0f} a second, over "
    how += f"{half_load['clients']} connections; p50 {float(np.median(latency_ms)):.2f} ms; "
    how += f"sent up to {half_load['late_ms']:.2f} ms late (p99), which is in it; spread: of fifths of the time"
    found["p99_ms_half_load"] = figure(float(np.quantile(latency_ms, 0.99)), "ms", how, n=len(latency_ms), spread=(min(parts), max(parts)))
    runs = [run for name in LOADS if name in raw for run in (*raw[name]["levels"], raw[name]["half_load"])]
    for count, what in (("errors", "refused, wrong or of another frame, and connections broken"), ("lost", "missing"), ("doubled", "given again")):
        how = f"answers {what}: logits compared with the known ones of each frame, all levels, both networks"
        found[f"throughput_{count}"] = figure(sum(run[count] for run in runs), "answers", how, n=sum(run["sent"] for run in runs))
    return found


def best(row: dict[str, Any]) -> tuple[str, int]:
    """The batch size at which the bare loop is fastest, and the place of the level with the highest rate."""
    batch = max(row["bare"], key=lambda size: statistics.median(row["bare"][size]))
    return batch, max(range(len(row["levels"])), key=lambda at: statistics.mean(row["levels"][at]["per_s"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--bare-seconds", type=float, default=1)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--networks", nargs="+", choices=LOADS, default=[*LOADS])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    raw = measure(arguments.seconds, {name: LOADS[name] for name in arguments.networks}, arguments.bare_seconds, arguments.max_batch)
    if arguments.out:
        atomic_write_json(arguments.out, raw)
    for name in arguments.networks:
        row = raw[name]
        for way in ("bare", "bare_with_decode"):
            print(name, way, {size: round(statistics.median(rates)) for size, rates in row[way].items()})
        for level in row["levels"]:
            print(f"{name} {level['clients']:3} clients {statistics.mean(level['per_s']):7.1f}/s", {key: level[key] for key in ("p50_ms", "p99_ms", *COUNTS)})
    if "resnet18" in raw:
        print(json.dumps(figures(raw), indent=1))
