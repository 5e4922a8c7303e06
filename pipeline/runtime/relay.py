"""A link between any TCP client and server on one machine: a relay that holds bytes back as METHODS 1's link would, and fails as links do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.costs.link import TCP_SEGMENT_BYTES, Link, Serialiser, wire_bytes
from pipeline.costs.trace import Trace
from pipeline.errors import CoinferError, ParamsError
from pipeline.runtime.guard import is_loopback
from pipeline.runtime.transport import CONNECT_TIMEOUT_S

RETRANSMIT_MS = 200.0  # Linux's least, after which a lost segment is sent again
MOST_SEGMENTS = 1024  # on their way in one direction of a connection; then its sender is no longer read from
SPIN_MS = 2.0  # a sleep of the event loop may overshoot by so much


@dataclass(frozen=True)
class Weather:
    """What a link does beyond delay and rate.

    Args:
        trace: its rate over time, instead of the link's.
        jitter_ms: most that a segment comes later than it should, uniformly distributed; the order stays.
        loss: probability that a segment is lost and sent again `RETRANSMIT_MS`, or two round trips where those are more, later.
        cut_every_s, cut_for_s: in the last `cut_for_s` of every `cut_every_s` connections are reset, new ones as soon as they are accepted; None: never.

    Raises:
        ParamsError: a number that cannot be.
    """

    trace: Trace | None = None
    jitter_ms: float = 0.0
    loss: float = 0.0
    cut_every_s: float | None = None
    cut_for_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.jitter_ms < math.inf:
            raise ParamsError(f"the link's jitter is {self.jitter_ms} ms; give 0 or more.")
        if not 0 <= self.loss < 1:
            raise ParamsError(f"the link's loss is {self.loss}; give the share of segments that are lost, at least 0 and below 1.")
        if self.cut_every_s is not None and not 0 < self.cut_for_s < self.cut_every_s < math.inf:
            raise ParamsError(f"a cut of {self.cut_for_s:g} s every {self.cut_every_s:g} s leaves no time or is none; give a shorter one, above 0.")


@dataclass(frozen=True)
class Traffic:
    """What passed so far; bytes are those of the connections, without headers."""

    connections: int
    up_bytes: int
    down_bytes: int
    lost_segments: int
    cuts: int


class _Way:
    """One direction of the link, which all connections share."""

    def __init__(self, link: Link, weather: Weather, seed: int) -> None:
        self._link, self._weather, self._random = link, weather, np.random.default_rng(seed)
        self.passed_bytes = self.lost_segments = 0
        self.clear()
        self._again_ms = max(RETRANSMIT_MS, 2 * link.rtt_ms)

    def clear(self) -> None:
        """Forget what is on its way."""
        self._line = Serialiser(self._link, self._weather.trace)

    def arrival_ms(self, now_ms: float, n_bytes: int) -> float:
        arrival_ms, late_ms = self._line.arrival_ms(now_ms, wire_bytes(n_bytes)), 0.0
        while self._weather.loss and self._random.random() < self._weather.loss:
            self.lost_segments += 1
            late_ms += self._again_ms
            arrival_ms = self._line.arrival_ms(now_ms, wire_bytes(n_bytes))
        return arrival_ms + late_ms + float(self._random.random()) * self._weather.jitter_ms


class Relay:
    """Carries connections to `to` over an emulated `link`; both its directions serialise apart, and all connections share them.

    Opening a connection costs a round trip. The same `seed` gives the same losses and jitter to the same segments.
    """

    def __init__(self, link: Link, weather: Weather, to: tuple[str, int], seed: int = 0) -> None:
        self.link, self.weather, self.to = link, weather, to
        self._up, self._down = (_Way(link, weather, child) for child in np.random.SeedSequence(seed).generate_state(2))
        self._connections = self._n_cuts = 0
        self._began_ms = 0.0
        self._is_cut = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def traffic(self) -> Traffic:
        return Traffic(self._connections, self._up.passed_bytes, self._down.passed_bytes, self._up.lost_segments + self._down.lost_segments, self._n_cuts)

    async def serve(self, host: str, port: int, announce: Callable[[int], object]) -> None:
        """Accept and relay until cancelled; `announce` is told the port.

        Raises:
            CoinferError: the address cannot be bound.
        """
        self._began_ms = time.perf_counter() * 1e3
        try:
            server = await asyncio.start_server(self._accept, host, port)
        except (OSError, OverflowError, UnicodeError) as error:
            raise CoinferError(f"the link cannot listen on {host}:{port} ({error}); choose another port or address.") from error
        announce(server.sockets[0].getsockname()[1])
        try:
            await self._cuts()
        finally:
            server.close()
            self.cut()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def cut(self) -> None:
        """Reset all connections, and new ones as soon as they are accepted, until `mend`; what was on its way is lost."""
        self._is_cut = True
        for task in self._tasks:
            task.cancel()
        for way in (self._up, self._down):
            way.clear()

    def mend(self) -> None:
        self._is_cut = False

    async def _cuts(self) -> None:
        every_s, for_s = self.weather.cut_every_s, self.weather.cut_for_s
        while every_s is None:
            await asyncio.sleep(3600)
        while True:
            await asyncio.sleep(every_s - for_s)
            self._n_cuts += 1
            self.cut()
            await asyncio.sleep(for_s)
            self.mend()

    def _now_ms(self) -> float:
        return time.perf_counter() * 1e3 - self._began_ms

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            _reset(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(asyncio.CancelledError, Exception):  # a connection that is cut or breaks ends here
            await self._carry(reader, writer)
        self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        ready_ms = self._now_ms() + self.link.rtt_ms
        ends = [writer]
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                far_reader, far_writer = await asyncio.open_connection(*self.to)
            ends.append(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, self._up, ready_ms))
                group.create_task(self._pump(far_reader, writer, self._down, ready_ms))
            for end in ends:
                end.close()
        finally:
            for end in ends:
                if not end.is_closing():
                    _reset(end)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: _Way, ready_ms: float) -> None:
        """Bytes in one direction, segment by segment, until the sender closes; what it sent before still arrives."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MOST_SEGMENTS)

        async def deliver() -> None:
            while True:
                moment_ms, segment = await under_way.get()
                await self._until(moment_ms)
                if not segment:
                    writer.write_eof()
                    return
                writer.write(segment)
                await writer.drain()

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            while segment := await reader.read(TCP_SEGMENT_BYTES):
                way.passed_bytes += len(segment)
                await under_way.put((way.arrival_ms(max(self._now_ms(), ready_ms), len(segment)), segment))
            await under_way.put((self._now_ms() + self.link.rtt_ms / 2, b""))

    async def _until(self, moment_ms: float) -> None:
        if (left_ms := moment_ms - self._now_ms()) > SPIN_MS:
            await asyncio.sleep((left_ms - SPIN_MS) / 1e3)
        while self._now_ms() < moment_ms:
            await asyncio.sleep(0)


def link_and_weather(
    rate_mbps: float | None, rtt_ms: float, trace: Path | None, jitter_ms: float, loss: float, stall: str | None, cut: str | None
) -> tuple[Link, Weather]:
    """Link and weather as the command line gives them: `rate_mbps` or a `trace`, outages as EVERY:FOR in seconds.

    Raises:
        ParamsError: a value that cannot be, or two that exclude each other.
    """
    if (rate_mbps is None) == (trace is None):
        raise ParamsError("a link has a rate or a trace; give one of --rate and --trace.")
    if trace is not None and stall is not None:
        raise ParamsError("a trace has stalls of its own, where its rate is 0; leave out --stall.")
    cut_every_s, cut_for_s = _outage("--cut", cut) if cut else (None, 0.0)
    rates = Trace.load(trace) if trace else None
    link = Link(rates.mean_mbps if rates else rate_mbps or 0.0, rtt_ms)
    if stall:
        rates = Trace.stalling(link.rate_mbps, *_outage("--stall", stall))
    return link, Weather(rates, jitter_ms, loss, cut_every_s, cut_for_s)


def _outage(option: str, text: str) -> tuple[float, float]:
    try:
        every_s, for_s = map(float, text.split(":"))
    except ValueError:
        raise ParamsError(f"{option} {text!r} is not EVERY:FOR in seconds; give for instance 30:2.") from None
    return every_s, for_s


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a host does that has lost it, not as one that has finished."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def serve_link(relay: Relay, host: str, port: int, for_anyone: bool = False) -> None:
    """Run `relay` until Ctrl-C or SIGTERM, then print what passed as a JSON line. Port 0 takes a free one.

    Raises:
        ParamsError: `host` is no loopback address, and the link is not `for_anyone`: whoever reaches it reaches the server behind it.
        CoinferError: the address cannot be bound.
    """
    if not for_anyone and not is_loopback(host):
        raise ParamsError(
            f"on {host} other machines reach the link, and so the server behind it; listen on 127.0.0.1, or say --anyone if that server wants keys."
        )

    async def run() -> None:
        task = asyncio.ensure_future(relay.serve(host, port, lambda port: print(f"link listens on port {port}", flush=True)))
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
    print(json.dumps(asdict(relay.traffic)), flush=True)
