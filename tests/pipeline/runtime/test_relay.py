"""The emulated link as programs see it: their bytes arrive whole and in order, never earlier than the formula says, unless it is cut."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from pipeline.cli import app
from pipeline.costs.link import Link, wire_bytes
from pipeline.costs.trace import Trace
from pipeline.errors import CoinferError, ParamsError
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.relay import RETRANSMIT_MS, Relay, Weather, _Way
from pipeline.runtime.server import edge_process
from pipeline.runtime.transport import EdgeUnreachable, LoopbackTransport, TcpTransport

FAST = Link(rate_mbps=1_000, rtt_ms=0)


class _Echo(socketserver.BaseRequestHandler):
    def handle(self):
        with contextlib.suppress(OSError):
            while data := self.request.recv(1 << 16):
                self.request.sendall(data)


class _Echoes(socketserver.ThreadingTCPServer):
    daemon_threads = True


@pytest.fixture
def echo():
    """Port of a server that sends back what it is sent."""
    with _Echoes(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@dataclass
class Running:
    relay: Relay
    port: int
    loop: asyncio.AbstractEventLoop

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 10)

    def call(self, function) -> None:
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(10)


@pytest.fixture
def relayed():
    """relayed(link, port, weather=..., seed=0) -> Running, ended with the test."""
    ends = []

    def start(link: Link, to: int, weather: Weather | None = None, seed: int = 0) -> Running:
        relay, ports, known = Relay(link, weather or Weather(), ("127.0.0.1", to), seed), [], threading.Event()
        loop = asyncio.new_event_loop()
        task = loop.create_task(relay.serve("127.0.0.1", 0, lambda port: (ports.append(port), known.set())))

        def run():
            try:
                loop.run_until_complete(task)
            except asyncio.CancelledError:
                pass
            finally:
                loop.close()

        thread = threading.Thread(target=run)
        thread.start()
        ends.append((loop, task, thread))
        assert known.wait(10)
        return Running(relay, ports[0], loop)

    yield start
    for loop, task, thread in ends:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        assert not thread.is_alive()


def exchange(connection: socket.socket, data: bytes) -> bytes:
    """What an echo sends back to `data`."""
    sender = threading.Thread(target=connection.sendall, args=(data,))
    sender.start()
    received = bytearray()
    while len(received) < len(data) and (chunk := connection.recv(1 << 16)):
        received += chunk
    sender.join()
    return bytes(received)


def elapsed_ms(work) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


@pytest.mark.parametrize("weather", [Weather(), Weather(jitter_ms=5), Weather(loss=0.02), Weather(Trace((0, 0.01), (1_000, 0), 0.02))])
def test_bytes_of_several_connections_arrive_whole_and_in_order(relayed, echo, weather):
    running = relayed(FAST, echo, weather)
    datas = [np.random.default_rng(seed).bytes(100_000) for seed in range(3)]

    def one(data: bytes) -> bytes:
        with running.connect() as connection:
            return exchange(connection, data)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(one, datas)) == datas
    traffic = running.relay.traffic
    assert (traffic.connections, traffic.up_bytes, traffic.down_bytes) == (3, 300_000, 300_000)
    assert (traffic.lost_segments > 0) == (weather.loss > 0)


def test_nothing_arrives_before_the_link_could_have_carried_it(relayed, echo):
    running = relayed(Link(rate_mbps=0.1, rtt_ms=20), echo)
    one_way_ms, begin_s = 8 * wire_bytes(300) / 100, time.perf_counter()
    with running.connect() as connection:
        exchange(connection, bytes(300))
        assert 1e3 * (time.perf_counter() - begin_s) >= 2 * one_way_ms + 2 * 20, "and a round trip to connect"
        assert elapsed_ms(lambda: exchange(connection, bytes(300))) >= 2 * one_way_ms + 20


def test_connections_share_the_link(relayed, echo):
    running = relayed(Link(rate_mbps=1, rtt_ms=0), echo)
    with ThreadPoolExecutor(4) as pool, running.connect() as a, running.connect() as b, running.connect() as c, running.connect() as d:
        total_ms = elapsed_ms(lambda: list(pool.map(lambda connection: exchange(connection, bytes(1_448)), (a, b, c, d))))
    assert total_ms >= 4 * 8 * 1_500 / 1e3


def test_what_is_lost_comes_late_and_the_same_seed_loses_the_same(relayed, echo):
    lost = []
    for seed in (3, 3):
        running = relayed(FAST, echo, Weather(loss=0.5), seed)
        with running.connect() as connection:
            late_ms = elapsed_ms(lambda: [exchange(connection, b"x") for _ in range(4)])
        lost.append(running.relay.traffic.lost_segments)
        assert late_ms >= RETRANSMIT_MS * lost[-1]
    assert lost[0] == lost[1] > 0


def test_what_was_sent_before_a_half_closed_end_still_arrives_and_so_does_the_end(relayed, echo):
    running = relayed(Link(rate_mbps=1, rtt_ms=10), echo)
    with running.connect() as connection:
        connection.sendall(bytes(5_000))
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(1 << 16):
            received += chunk
    assert received == bytes(5_000)


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def refuses(running) -> bool:
    try:
        with running.connect() as connection:
            return is_closed(connection)
    except ConnectionResetError:
        return True


def test_a_cut_ends_connections_and_refuses_new_ones_until_it_is_mended(relayed, echo):
    running = relayed(FAST, echo)
    with running.connect() as connection:
        assert exchange(connection, b"before") == b"before"
        running.call(running.relay.cut)
        assert is_closed(connection)
    assert refuses(running)
    running.call(running.relay.mend)
    with running.connect() as connection:
        assert exchange(connection, b"after") == b"after"


def test_cuts_come_by_the_clock_and_reset(relayed, echo):
    running = relayed(FAST, echo, Weather(cut_every_s=3, cut_for_s=1))
    with running.connect() as connection:
        assert exchange(connection, b"before") == b"before"
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert running.relay.traffic.cuts >= 1


def test_what_was_on_its_way_when_the_link_was_cut_keeps_nobody_waiting(relayed, echo):
    running = relayed(Link(rate_mbps=0.1, rtt_ms=0), echo)
    with running.connect() as connection:
        connection.sendall(bytes(1_000_000))
        while running.relay.traffic.up_bytes < 100_000:
            time.sleep(0.01)
        running.call(running.relay.cut)
    running.call(running.relay.mend)
    with running.connect() as connection:
        assert elapsed_ms(lambda: exchange(connection, b"x")) < 8 * 100_000 / 100


def test_nothing_passes_in_a_stall(relayed, echo):
    trace, begin_s = Trace((0, 1.5), (1, 0), 100), time.monotonic()
    running = relayed(Link(1, rtt_ms=0), echo, Weather(trace))
    with running.connect() as connection:
        assert exchange(connection, b"x") == b"x"
        time.sleep(begin_s + 2 - time.monotonic())
        connection.sendall(b"x")
        connection.settimeout(1)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_jitter_and_loss_come_on_top_of_the_link_and_as_often_as_they_should():
    link = Link(rate_mbps=1, rtt_ms=10)
    late = {}
    for name, weather in (("jitter", Weather(jitter_ms=6)), ("loss", Weather(loss=0.2))):
        way = _Way(link, weather, seed=1)
        late[name] = np.array([way.arrival_ms(1e4 * number, 73) - 1e4 * number - 1 - 5 for number in range(1_000)])
    assert 0 <= late["jitter"].min() < 0.1
    assert 5.9 < late["jitter"].max() <= 6
    assert late["jitter"].mean() == pytest.approx(3, abs=0.2)
    assert (late["loss"] > 1).mean() == pytest.approx(0.2, abs=0.03)
    assert late["loss"][late["loss"] > 1].min() == pytest.approx(RETRANSMIT_MS + 1), "and its bits once more"


def test_where_nobody_listens_the_connection_ends(relayed):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert refuses(relayed(FAST, port))


def test_a_port_in_use_is_one_sentence(echo):
    with pytest.raises(CoinferError, match=rf"cannot listen on 127\.0\.0\.1:{echo}"):
        asyncio.run(Relay(FAST, Weather(), ("127.0.0.1", echo)).serve("127.0.0.1", echo, print))


@pytest.mark.parametrize(
    "changes",
    [
        {"jitter_ms": -1},
        {"jitter_ms": float("nan")},
        {"loss": 1},
        {"loss": -0.1},
        {"loss": float("nan")},
        {"cut_every_s": 1, "cut_for_s": 2},
        {"cut_every_s": 0},
    ],
)
def test_weather_that_cannot_be_is_refused(changes):
    with pytest.raises(ParamsError):
        Weather(**changes)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_device_reaches_its_edge_through_the_command(make_bundle, picture, end):
    bundle = make_bundle()
    expected = DeviceHalf(bundle).classify(picture, LoopbackTransport(EdgeHalf(bundle)))
    with edge_process(bundle) as edge:
        command = [sys.executable, "-m", "pipeline.cli", "link", "--to", f"127.0.0.1:{edge}", "--rate", "1", "--rtt", "4", "--port", "0"]
        with subprocess.Popen(
            [*command, "--cut", "1000:1", "--host", "0.0.0.0", "--anyone"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as link:
            assert link.stdout is not None
            port = int(re.findall(r"link listens on port (\d+)", link.stdout.readline())[0])
            transport = TcpTransport("127.0.0.1", port)
            answer = DeviceHalf(bundle).classify(picture, transport)
            link.send_signal(end)  # while the connection is open
            printed, complaints = link.communicate(timeout=10)
            assert (link.returncode, complaints) == (0, "")
            traffic = json.loads(printed)
    assert np.array_equal(answer.logits, expected.logits)
    assert answer.parts["link_ms"] >= 2 * 4 + 8 * wire_bytes(answer.frame_bytes) / 1e3
    assert (traffic["connections"], traffic["up_bytes"]) == (1, answer.frame_bytes)
    with pytest.raises(EdgeUnreachable):
        transport.request(b"gone")
    transport.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --rate and --trace"),
        (["--rate", "1", "--trace", "a.csv"], "give one of --rate and --trace"),
        (["--trace", "nowhere.csv"], r"nowhere\.csv cannot be read"),
        (["--trace", "a.csv", "--stall", "3:1"], "leave out --stall"),
        (["--rate", "-1"], "link.rate_mbps is -1"),
        (["--rate", "0"], "link.rate_mbps is 0"),
        (["--rate", "1", "--rtt", "-1"], "link.rtt_ms is -1"),
        (["--rate", "1", "--loss", "1"], "the link's loss is 1"),
        (["--rate", "1", "--stall", "often"], "--stall 'often' is not EVERY:FOR"),
        (["--rate", "1", "--cut", "1:2"], "a cut of 2 s every 1 s"),
        (["--rate", "1", "--cut", "0:0"], "a cut of 0 s every 0 s"),
        (["--rate", "1", "--to", "edge"], "'edge' is not HOST:PORT"),
        (["--rate", "1", "--host", "0.0.0.0"], "other machines reach the link.*say --anyone"),
    ],
)
def test_options_that_cannot_be_are_one_sentence(workdir, arguments, message):
    with pytest.raises(ParamsError, match=message):
        app(["link", "--to", "127.0.0.1:1", "--port", "0", *arguments], standalone_mode=False)
