"""A device whose edge fails in every way still answers each picture, and goes back to splitting."""

import contextlib
import gc
import socket
import subprocess
import sys
import threading
import weakref
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.dial import dial
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.fallback import LONGEST_PAUSE_S, Fallback
from pipeline.runtime.server import edge_process
from pipeline.runtime.transport import EdgeUnreachable, LoopbackTransport, TcpTransport, receive_frame


class Flaky:
    """An edge in this process that is away while `away`, which costs a device on `clock` all the time it gives; counts the requests it sees."""

    alone, message_bytes = 0, staticmethod(len)

    def __init__(self, bundle, clock=None) -> None:
        self.inner, self.away, self.requests, self.timeouts_s = LoopbackTransport(EdgeHalf(bundle)), False, 0, []
        self.clock = clock

    def request(self, frame: bytes, timeout_s: float = 60) -> bytes:
        self.requests += 1
        self.timeouts_s.append(timeout_s)
        if self.away:
            if self.clock:
                self.clock.seconds += timeout_s
            raise EdgeUnreachable("edge is away")
        return self.inner.request(frame, timeout_s)

    def close(self) -> None:
        pass


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def bundle(make_bundle):
    return make_bundle()


@pytest.mark.parametrize("minutes", [1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06])
def test_pictures_go_local_while_the_edge_is_away_and_split_again_within_5_s_of_its_return(bundle, picture, minutes):
    clock = Clock()
    edge = Flaky(bundle, clock)
    fallback = Fallback(DeviceHalf(bundle), edge, 1_000, now_s=clock, draw=lambda: 0.0)
    answer, why = fallback.classify(picture)
    assert (answer.path, why) == ("split", None)
    edge.away, edge.requests, tried_s = True, 0, []
    end_s = clock.seconds + 60 * minutes
    while clock.seconds < end_s:  # ten pictures a second
        before, begin_s = edge.requests, clock.seconds
        answer, why = fallback.classify(picture)
        assert (answer.path, why) == ("device-only", "edge is away")
        assert answer.parts["total_ms"] >= 1e3 * (clock.seconds - begin_s), "waiting in vain counts"
        tried_s += [begin_s] * (edge.requests - before)
        clock.seconds += 0.1
    pauses = [later - earlier for earlier, later in pairwise(tried_s)]
    assert all(later >= earlier - 0.11 for earlier, later in pairwise(pauses)), "ever longer"
    assert max(pauses) <= LONGEST_PAUSE_S + 0.11
    assert len(tried_s) < 22, "an edge that is away is asked no more than now and then"
    edge.away, returned_s = False, clock.seconds
    while fallback.classify(picture)[1] is not None:
        clock.seconds += 0.1
    assert clock.seconds - returned_s < 5
    assert fallback.classify(picture)[0].path == "split"


def test_devices_do_not_come_back_all_at_once(bundle, picture):
    pauses_s = set()
    for draw in (0.0, 0.4, 0.99):
        edge, clock = Flaky(bundle), Clock()
        edge.away = True
        fallback = Fallback(DeviceHalf(bundle), edge, 1_000, now_s=clock, draw=lambda: draw)  # noqa: B023
        while edge.requests < 3:
            fallback.classify(picture)
            clock.seconds += 0.001
        pauses_s.add(round(clock.seconds, 3))
    assert len(pauses_s) == 3


def test_the_edge_gets_what_the_device_alone_does_not_need_of_the_deadline(bundle, picture):
    edge = Flaky(bundle)
    Fallback(DeviceHalf(bundle), edge, 1_000).classify(picture)
    assert 0.5 < edge.timeouts_s[-1] < 1
    edge.timeouts_s.clear()
    fallback = Fallback(DeviceHalf(bundle), edge, 1_000)
    fallback._local_ms.append(2_000)
    fallback.classify(picture)
    assert edge.timeouts_s[-1] > 0.9, "where the device alone misses it anyway, all"


def test_an_edge_of_another_bundle_is_a_reason_to_answer_alone(bundle, make_bundle, picture):
    fallback = Fallback(DeviceHalf(bundle), LoopbackTransport(EdgeHalf(make_bundle(seed=1))), 1_000)
    answer, why = fallback.classify(picture)
    assert answer.path == "device-only"
    assert "give device and edge the same bundle" in str(why)
    assert np.array_equal(answer.logits, DeviceHalf(bundle).classify_locally(picture).logits)


@pytest.fixture
def peer():
    """peer(talk) -> port of a server that does `talk` with each connection and an event that ends it."""
    servers, over = [], threading.Event()

    def start(talk) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def run() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(connection, over), daemon=True).start()

        threading.Thread(target=run, daemon=True).start()
        return server.getsockname()[1]

    yield start
    over.set()
    for server in servers:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def silent(connection: socket.socket, over: threading.Event) -> None:
    with connection:
        connection.recv(1)
        over.wait(30)


def trickling(connection: socket.socket, over: threading.Event) -> None:
    """A reply that never ends, a byte at a time: no single wait is long."""
    with connection:
        connection.recv(1 << 16)
        try:
            for byte in b"\xc1\1\2\3\4\3\0\xff\xff" + bytes(1_000):
                connection.sendall(bytes([byte]))
                over.wait(0.05)
        except OSError:
            pass


def garbage(connection: socket.socket, over: threading.Event) -> None:
    with connection:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def half(connection: socket.socket, over: threading.Event) -> None:
    with connection:
        connection.recv(1 << 16)
        connection.sendall(b"\xc1\1\2\3\4\3\0\0\x20" + bytes(10))


@pytest.mark.parametrize(
    ("talk", "deadline_ms", "reason"),
    [(silent, 300, "timed out"), (trickling, 300, "timed out"), (garbage, 20_000, "not coinfer"), (half, 20_000, "inside a frame")],
)
def test_an_edge_that_answers_nothing_slowly_garbage_or_half_is_a_reason_to_answer_alone(bundle, picture, peer, talk, deadline_ms, reason):
    transport = TcpTransport("127.0.0.1", peer(talk))
    answer, why = Fallback(DeviceHalf(bundle), transport, deadline_ms).classify(picture)
    transport.close()
    assert answer.path == "device-only"
    assert reason in str(why)
    assert answer.parts["total_ms"] > answer.parts["link_ms"] > 0, "waiting in vain counts"


def test_a_large_picture_is_prepared_once_and_counts(bundle):
    edge = Flaky(bundle)
    edge.away = True
    large, decoded = Image.new("RGB", (3_000, 2_000)), []
    device = DeviceHalf(bundle)
    fallback = Fallback(device, edge, 5_000)
    prepare = device.pixels
    device.pixels = lambda picture: (decoded.append(1) if isinstance(picture, Image.Image) else None, prepare(picture))[1]
    local_ms = device.classify_locally(prepare(large)).parts["total_ms"]
    answer, _ = fallback.classify(large)
    assert decoded == [1]
    assert answer.parts["device_ms"] > 5 * local_ms


def test_a_reply_that_comes_twice_is_not_taken_for_the_next_pictures(bundle, peer):
    def twice(connection: socket.socket, over: threading.Event) -> None:
        half = EdgeHalf(bundle)
        with connection, contextlib.suppress(ConnectionResetError):
            while (frame := receive_frame(connection)) is not None:
                connection.sendall(2 * half.handle(frame)[0])

    transport, device = TcpTransport("127.0.0.1", peer(twice)), DeviceHalf(bundle)
    for seed in range(4):
        picture = np.random.default_rng(seed).integers(0, 256, (3, 8, 8)).astype(np.uint8)
        answer = device.classify(picture, transport)
        assert np.allclose(answer.logits, device.classify(picture, LoopbackTransport(EdgeHalf(bundle))).logits, atol=1e-5)
    transport.close()


def test_a_name_that_cannot_be_looked_up_in_time_holds_up_nobody(bundle, picture, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: over.wait(30) and [])
    _, why = Fallback(DeviceHalf(bundle), TcpTransport("edge.local", 7070), 100).classify(picture)
    over.set()
    assert "looked up in time" in str(why)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere.invalid:9", "grpc://127.0.0.1:9"])
def test_a_picture_that_the_edge_did_not_answer_is_let_go_at_once_not_when_the_garbage_collector_comes(bundle, picture, address, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.dial.device_keys", lambda folder, host: None)  # of an edge beyond loopback
    fallback, own = Fallback(DeviceHalf(bundle), dial(address), 1_000), picture.copy()
    known = weakref.ref(own)
    gc.collect()
    gc.disable()
    try:
        assert fallback.classify(own)[1]
        del own
        assert known() is None
    finally:
        gc.enable()
        fallback._transport.close()


def test_a_deadline_too_short_for_the_device_half_says_so(bundle, picture):
    with pytest.raises(EdgeUnreachable, match="the device half took all"):
        DeviceHalf(bundle).classify(picture, TcpTransport("127.0.0.1", 1), 1e-6)


def test_an_edge_that_was_killed_and_started_again_is_used_again(bundle, picture):
    clock = Clock()
    with edge_process(bundle) as port:
        transport = TcpTransport("127.0.0.1", port)
        fallback = Fallback(DeviceHalf(bundle), transport, 5_000, now_s=clock)
        assert fallback.classify(picture)[1] is None
    assert "does not answer" in str(fallback.classify(picture)[1])
    command = [sys.executable, "-m", "pipeline.cli", "edge", "--bundle", str(bundle.path), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as edge:
        try:
            assert edge.stdout is not None
            assert str(port) in edge.stdout.readline()
            clock.seconds += LONGEST_PAUSE_S
            assert fallback.classify(picture)[1] is None
        finally:
            edge.terminate()
    transport.close()
