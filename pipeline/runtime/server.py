"""The edge server: frames of many devices over TCP, answered by lanes of one or several bundles."""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from pipeline.errors import CoinferError
from pipeline.runtime.bundle import Bundle
from pipeline.runtime.connection import Client, refusal
from pipeline.runtime.edge import Asked, EdgeHalf
from pipeline.runtime.guard import EdgeKeys, edge_keys
from pipeline.runtime.lane import BUSY, Batching, Finished, Job, Lane
from pipeline.runtime.shelf import Shelf
from pipeline.runtime.tally import Refusal, Tally

START_TIMEOUT_S = 60.0
SWEEP_S = 1.0
LOOK_S = 1.0
DRAIN_S = 30.0
BACKLOG = 100  # connections that come at once
OTHER_FILES = 100  # open beside connections


@dataclass(frozen=True)
class Limits:
    """What a server takes from its clients.

    Args:
        payload_bytes: of one frame.
        connections: open at once; more are told so and closed.
        waiting: frames in the queue of a bundle; more are answered "busy" at once.
        per_second: frames of one device, or without keys of one address, on average; a burst of as many is let through. inf: any number.
        idle_s: after which a silent connection is closed.
        partial_s: within which a frame that has begun has to be complete.
        patience_s: after which a frame that waits is answered "busy".
    """

    payload_bytes: int = 1 << 20
    connections: int = 1024
    waiting: int = 256
    per_second: float = 1000.0
    idle_s: float = 300.0
    partial_s: float = 30.0
    patience_s: float = 5.0


@dataclass
class Bucket:
    """Frames that somebody may still send now."""

    tokens: float
    filled_s: float

    def take(self, count: int, per_second: float, now_s: float) -> bool:
        self.tokens = min(per_second, self.tokens + (now_s - self.filled_s) * per_second)
        self.filled_s = now_s
        if self.tokens < count:
            return False
        self.tokens -= count
        return True


class Asker(Protocol):
    """Whoever sent a frame; `name` is who that is, as far as it is known for sure."""

    @property
    def name(self) -> str: ...

    def told(self, reply: bytes) -> None:
        """The reply frame, once, on the event loop."""
        ...

    def is_there(self) -> bool:
        """Whether it still waits; asked from any thread."""
        ...


class Front(Protocol):
    """Another way in than TCP: hands what it is asked to the server's `take` or `put`."""

    async def start(self, server: EdgeServer) -> None:
        """Take requests from now on.

        Raises:
            CoinferError: the address cannot be bound.
        """
        ...

    async def stop(self, grace_s: float) -> None:
        """Take no more, and return once those under way are answered, or given up after `grace_s`. May be called before `start`, and again with less."""
        ...


class EdgeServer:
    """Serves bundles that are added and removed while it runs; all but `Lane` work happens on the event loop."""

    def __init__(self, batching: Batching, limits: Limits, keys: EdgeKeys | None = None, fronts: Sequence[Front] = ()) -> None:
        self.batching, self.limits, self.keys, self.fronts = batching, limits, keys, fronts
        self.tally = Tally(math.inf) if keys else Tally()  # keys bound the names that there are
        self.lanes: dict[bytes, Lane] = {}
        self.clients: set[Client] = set()
        self.buckets: dict[str, Bucket] = {}
        self.is_stopping = False
        self.beat_s = time.perf_counter()
        self._stopped, self._hurried = asyncio.Event(), asyncio.Event()
        self.loop: asyncio.AbstractEventLoop

    def add(self, half: EdgeHalf) -> None:
        """Answer frames of its bundle from now on."""
        if half.bundle_id not in self.lanes:
            self.lanes[half.bundle_id] = Lane(half, self.batching, self.limits.waiting, self.limits.patience_s, self._delivered, self.tally)

    def remove(self, bundle_id: bytes) -> None:
        """Refuse frames of that bundle from now on; those that wait are answered."""
        self.lanes.pop(bundle_id).close()

    def over_rate(self, name: str, count: int = 1) -> str | None:
        """Why so many frames from there are refused now; None if they may come. Asked before anything else is done with them."""
        if (per_second := self.limits.per_second) == math.inf:
            return None
        now_s = time.perf_counter()
        if self.buckets.setdefault(name, Bucket(per_second, now_s)).take(count, per_second, now_s):
            return None
        self.tally.refused(Refusal.RATE)
        return f"more than {per_second:g} frames a second from {name}; send fewer."

    def take(self, frame: bytes, asker: Asker) -> None:
        """Queue a whole frame, or refuse it at once; either way `asker` is told once."""
        self.put(frame[1:5], frame, asker)

    def put(self, bundle_id: bytes, frame: Asked, asker: Asker) -> None:
        """Like `take`, for that bundle whatever the frame says."""
        if (lane := self.lanes.get(bundle_id)) is None:
            known = ", ".join(sorted(each.hex() for each in self.lanes)) or "none"
            reason, text = Refusal.BUNDLE, f"frame is for bundle {bundle_id.hex()}, this edge runs {known}; give device and edge the same bundle."
        elif lane.put(Job(frame, asker.told, asker.is_there)):
            return
        else:
            reason, text = Refusal.BUSY, BUSY
        self.tally.refused(reason)
        asker.told(refusal(text, bundle_id))

    def stop(self) -> None:
        """Answer what waits and end; told again, end at once."""
        (self._hurried if self.is_stopping else self._stopped).set()
        self.is_stopping = True

    @property
    def is_ready(self) -> bool:
        """Whether frames are taken."""
        return bool(self.lanes) and not self.is_stopping

    def _delivered(self, finished: Finished, count: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended before its lanes
            self.loop.call_soon_threadsafe(_tell, finished, count)

    async def serve(self, shelf: Shelf, host: str, port: int, announce: Callable[[int], object], signals: Iterable[signal.Signals]) -> None:
        """Answer for the bundles on `shelf` until `stop`, or one of `signals`; then take no more, answer what waits, and end.

        Raises:
            CoinferError: the shelf is empty, the address cannot be bound, or so many connections cannot be open.
        """
        _allow_files(self.limits.connections * (1 + len(self.fronts)) + BACKLOG + OTHER_FILES)
        for half in shelf.first():
            self.add(half)
        self.loop = asyncio.get_running_loop()
        for number in signals:
            self.loop.add_signal_handler(number, self.stop)
        try:
            server = await self.loop.create_server(lambda: Client(self), host, port, backlog=BACKLOG)
        except (OSError, OverflowError, UnicodeError) as error:
            raise CoinferError(f"edge cannot listen on {host}:{port} ({error}); choose another port or address.") from error
        sweeping, following = self.loop.create_task(self._sweep()), self.loop.create_task(self._follow(shelf))
        try:
            for front in self.fronts:
                await front.start(self)
            announce(server.sockets[0].getsockname()[1])
            await self._stopped.wait()
        finally:
            following.cancel()
            server.close()
            await self._drain()
            sweeping.cancel()  # until now, or whoever watches would take the server for dead

    async def _drain(self) -> None:
        self.is_stopping = True
        for client in list(self.clients):
            client.close_when_idle()
        stopping = [self.loop.create_task(front.stop(DRAIN_S)) for front in self.fronts]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while (self.clients or not all(task.done() for task in stopping)) and not self._hurried.is_set():
                    await asyncio.sleep(0.01)
        for front in self.fronts:
            await front.stop(0)
        for task in stopping:
            await task
        for client in list(self.clients):
            client.transport.abort()
        for bundle_id in list(self.lanes):
            self.remove(bundle_id)

    async def _follow(self, shelf: Shelf) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                came, wanted = await self.loop.run_in_executor(None, shelf.look)  # opening a network takes a while
                for half in came:
                    self.add(half)
                for bundle_id in self.lanes.keys() - wanted:
                    self.remove(bundle_id)
            except Exception as error:  # another second it may go well
                print(f"coinfer: {shelf.path} cannot be followed ({error!r}).", file=sys.stderr, flush=True)

    async def _sweep(self) -> None:
        """Close silent connections, and forget addresses whose bucket is full again."""
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = self.beat_s = time.perf_counter()
            for client in list(self.clients):
                client.sweep(now_s)
            self.buckets = {address: bucket for address, bucket in self.buckets.items() if now_s - bucket.filled_s < 1 + SWEEP_S}


def _allow_files(count: int) -> None:
    """So many open at once, or connections would wait in vain, and each be told of at length in the log."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise CoinferError(f"edge may have {hard} files open, and {count} are needed; allow more (LimitNOFILE=, ulimit -n), or give fewer --max-connections.")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _tell(finished: Finished, count: Callable[[], None]) -> None:
    for job, reply in finished:
        job.done(reply)
    count()


def serve(
    path: Path,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    threads: int = 1,
    slowdown: float = 1.0,
    batching: Batching | None = None,
    limits: Limits | None = None,
    keys: Path | None = None,
    check: Callable[[Bundle], object] = lambda bundle: None,
    fronts: Sequence[Front] = (),
    announce: Callable[[int], object] = lambda port: print(f"edge listens on port {port}", flush=True),
    signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
) -> Tally:
    """Answer device halves of the bundle in `path`, or of those that this folder holds meanwhile (see `Shelf`), until one of `signals`.

    Port 0 takes a free one; `announce` is told which. `fronts` are started beside TCP; `check` is as of a `Shelf`. Returns what was counted.

    Raises:
        BundleError: no bundle can be served.
        KeysError: those in the folder `keys` cannot be used, or there are none and `host` is no loopback address (see `guard`).
        CoinferError: the address cannot be bound.
    """
    server = EdgeServer(batching or Batching(), limits or Limits(), edge_keys(keys, host), fronts)
    asyncio.run(server.serve(Shelf(path, threads, slowdown, check), host, port, announce, signals))
    return server.tally


@contextlib.contextmanager
def edge_process(bundle: Bundle, threads: int = 1, slowdown: float = 1.0) -> Iterator[int]:
    """`serve` in a process of its own on 127.0.0.1; yields its port and ends it afterwards.

    Raises:
        CoinferError: the process did not come up.
    """
    context = multiprocessing.get_context("spawn")  # a fork would carry over the parent's thread pools in a broken state
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve_child, args=(bundle.path, threads, slowdown, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        try:
            port = ours.recv() if ours.poll(START_TIMEOUT_S) else "no answer in time"
        except EOFError:
            port = "it ended"
        if not isinstance(port, int):
            raise CoinferError(f"edge process did not start: {port}; run `coinfer edge` with {bundle.path} to see more.")
        yield port
    finally:
        process.terminate()
        process.join()
        process.close()
        ours.close()


def _serve_child(path: Path, threads: int, slowdown: float, ready: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process in its own order
    try:
        serve(path, threads=threads, slowdown=slowdown, announce=ready.send, signals=(signal.SIGTERM,))
    except CoinferError as error:
        ready.send(str(error))
