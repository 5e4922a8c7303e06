"""The edge server as its clients see it: every frame is answered once and in order, whatever else goes on, and no limit can be crossed."""

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from pipeline.errors import BundleError
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import REPLY_TIMES, EdgeHalf
from pipeline.runtime.frame import HEADER_BYTES, Kind, frame_bytes, pack, unpack
from pipeline.runtime.lane import Batching
from pipeline.runtime.server import EdgeServer, Limits, serve
from pipeline.runtime.shelf import Shelf
from pipeline.runtime.transport import receive_frame


@dataclass
class Running:
    server: EdgeServer
    port: int

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), 10)
        connection.settimeout(10)
        return connection

    def call(self, function, *arguments) -> None:
        done = threading.Event()
        self.server.loop.call_soon_threadsafe(lambda: (function(*arguments), done.set()))
        assert done.wait(10)


@pytest.fixture
def run():
    """run(bundle or folder, batching=, limits=, slowdown=) -> Running, drained with the test."""
    ends = []

    def start(path, batching=Batching(), limits=Limits(), slowdown=1.0) -> Running:  # noqa: B008
        server, ports, known = EdgeServer(batching, limits), [], threading.Event()
        shelf = Shelf(getattr(path, "path", path), slowdown=slowdown)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(shelf, "127.0.0.1", 0, lambda port: (ports.append(port), known.set()), ())))
        thread.start()
        assert known.wait(10)
        ends.append((server, thread))
        return Running(server, ports[0])

    yield start
    for server, thread in ends:
        server.loop.call_soon_threadsafe(server.stop)
        thread.join(10)
        assert not thread.is_alive()


def frames_of(bundle, count: int) -> list[bytes]:
    device, rng = DeviceHalf(bundle), np.random.default_rng(0)
    return [device.run(rng.integers(0, 256, (3, 8, 8)).astype(np.uint8))[0] for _ in range(count)]


def logits(reply: bytes) -> np.ndarray:
    opened = unpack(reply)
    assert opened.kind is Kind.REPLY, opened.payload
    return np.frombuffer(opened.payload, "<f4", offset=REPLY_TIMES.size)


def said(reply: bytes) -> str:
    opened = unpack(reply)
    assert opened.kind is Kind.ERROR
    return opened.payload.decode()


def ask(connection: socket.socket, frame: bytes) -> bytes:
    connection.sendall(frame)
    reply = receive_frame(connection)
    assert reply is not None
    return reply


@pytest.mark.parametrize("batching", [Batching(1), Batching(8), Batching(8, delay_ms=5)])
def test_many_devices_at_once_get_each_its_own_answers(run, make_bundle, batching):
    bundle = make_bundle()
    running, frames = run(bundle, batching=batching), frames_of(bundle, 40)
    expected = [logits(EdgeHalf(bundle).handle(frame)[0]) for frame in frames]

    def device(number: int) -> list[np.ndarray]:
        with running.connect() as connection:
            return [logits(ask(connection, frame)) for frame in frames[number::8]]

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(device, range(8))):
            assert np.allclose(found, expected[number::8], atol=1e-5)


def test_a_frame_that_cannot_be_opened_spoils_no_other_of_its_batch(run, make_bundle):
    bundle = make_bundle()
    running, frames = run(bundle, batching=Batching(8, delay_ms=200)), frames_of(bundle, 4)
    broken = pack(b"\xff" * 500, bundle.bundle_id, Kind.SYMBOLS)

    def one(frame: bytes) -> bytes:
        with running.connect() as connection:
            return ask(connection, frame)

    with ThreadPoolExecutor(5) as pool:
        *good, bad = pool.map(one, [*frames, broken])
    assert said(bad)
    assert np.allclose([logits(reply) for reply in good], [logits(EdgeHalf(bundle).handle(frame)[0]) for frame in frames], atol=1e-5)


def test_frames_sent_ahead_are_answered_in_their_order_even_if_their_sender_has_finished(run, make_bundle):
    bundle = make_bundle()
    running, frames = run(bundle), frames_of(bundle, 20)
    with running.connect() as connection:
        connection.sendall(b"".join(frames))
        connection.shutdown(socket.SHUT_WR)
        found = [logits(receive_frame(connection)) for _ in frames]
        assert connection.recv(1) == b""
    assert np.allclose(found, [logits(EdgeHalf(bundle).handle(frame)[0]) for frame in frames], atol=1e-5)


def test_a_frame_in_pieces_is_a_frame(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle), frames_of(bundle, 1)
    with running.connect() as connection:
        for byte in frame:
            connection.sendall(bytes([byte]))
        assert logits(receive_frame(connection)).shape == (3,)


@pytest.fixture
def quick_looks(monkeypatch):
    monkeypatch.setattr("pipeline.runtime.server.LOOK_S", 0.05)


def eventually(check) -> None:
    end_s = time.monotonic() + 10
    while not check():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_bundles_are_served_side_by_side_and_swapped_without_a_failed_request(run, make_bundle, tmp_path, quick_looks):
    old, new = make_bundle(), make_bundle(seed=1)
    frames = {bundle.bundle_id: frames_of(bundle, 3) for bundle in (old, new)}
    shelf, over = tmp_path / "shelf", threading.Event()
    shutil.copytree(old.path, shelf / "1")
    running = run(shelf)

    def device(bundle) -> int:
        count = 0
        with running.connect() as connection:
            while not over.is_set():
                for frame in frames[bundle.bundle_id]:
                    logits(ask(connection, frame))
                    count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        before = [pool.submit(device, old) for _ in range(2)]
        shutil.copytree(new.path, tmp_path / "2")
        (tmp_path / "2").rename(shelf / "2")
        eventually(lambda: new.bundle_id in running.server.lanes)
        after = [pool.submit(device, new) for _ in range(2)]
        time.sleep(0.2)
        over.set()
        assert all(future.result() for future in before + after)
    shutil.rmtree(shelf / "1")
    eventually(lambda: old.bundle_id not in running.server.lanes)
    with running.connect() as connection:
        assert f"this edge runs {new.bundle_id.hex()}" in said(ask(connection, frames[old.bundle_id][0]))
        logits(ask(connection, frames[new.bundle_id][0]))


def test_a_bundle_that_is_replaced_is_served_from_then_on(run, make_bundle, tmp_path, quick_looks):
    old, new = make_bundle(), make_bundle(seed=1)
    running = run(old)
    shutil.copytree(new.path, tmp_path / "next")
    old.path.rename(tmp_path / "old")
    (tmp_path / "next").rename(old.path)
    eventually(lambda: set(running.server.lanes) == {new.bundle_id})
    with running.connect() as connection:
        logits(ask(connection, frames_of(new, 1)[0]))


def test_a_broken_bundle_beside_a_good_one_is_reported_and_passed_over(run, make_bundle, tmp_path, quick_looks, capfd):
    good, bad, lonely = make_bundle(), make_bundle(seed=1), make_bundle("device-only")
    shelf = tmp_path / "shelf"
    shutil.copytree(good.path, shelf / "good")
    running = run(shelf)
    shutil.copytree(bad.path, tmp_path / "bad")
    (tmp_path / "bad/edge.onnx").write_bytes(b"altered")
    (tmp_path / "bad").rename(shelf / "bad")
    lonely.path.rename(shelf / "lonely")
    said_so = ""

    def reported() -> bool:
        nonlocal said_so
        said_so += capfd.readouterr().err
        return "bad/edge.onnx is not the file" in said_so and "has no edge.onnx" in said_so

    eventually(reported)
    time.sleep(0.2)
    assert not capfd.readouterr().err, "once"
    with running.connect() as connection:
        logits(ask(connection, frames_of(good, 1)[0]))


def test_nothing_to_serve_is_one_sentence(make_bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "empty", "holds no bundle"),
        (tmp_path / "nowhere", "cannot be read"),
        (make_bundle("device-only").path, r"has no edge\.onnx"),
    ):
        with pytest.raises(BundleError, match=message):
            serve(path)


def test_removing_a_bundle_answers_what_waits_for_it(run, make_bundle):
    bundle = make_bundle()
    running, frames = run(bundle, batching=Batching(4, delay_ms=300)), frames_of(bundle, 2)
    with running.connect() as a, running.connect() as b:
        a.sendall(frames[0])
        b.sendall(frames[1])
        time.sleep(0.1)
        running.call(running.server.remove, bundle.bundle_id)
        assert logits(receive_frame(a)).shape == logits(receive_frame(b)).shape == (3,)


def test_a_full_queue_answers_busy_at_once(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=Limits(waiting=1), batching=Batching(1), slowdown=20_000), frames_of(bundle, 1)
    connections = [running.connect() for _ in range(4)]
    for connection in connections:
        connection.sendall(frame)
        time.sleep(0.05)
    for connection in connections[2:]:
        assert "busy" in said(receive_frame(connection))
    for connection in connections[:2]:
        assert logits(receive_frame(connection)).shape == (3,)
    for connection in connections:
        connection.close()


def test_a_frame_larger_than_the_limit_is_refused_before_it_is_there(run, make_bundle):
    bundle = make_bundle()
    running = run(bundle, limits=Limits(frame_bytes=1_000))
    with running.connect() as connection:
        large = pack(bytes(2_000), bundle.bundle_id, Kind.SYMBOLS)
        assert frame_bytes(large[:HEADER_BYTES]) > 1_000
        connection.sendall(large[:HEADER_BYTES])
        assert "larger than this edge takes" in said(receive_frame(connection))
        assert connection.recv(1) == b""


def test_more_connections_than_the_limit_are_told_so(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=Limits(connections=2)), frames_of(bundle, 1)
    with running.connect() as a, running.connect() as b:
        assert logits(ask(a, frame)).shape == logits(ask(b, frame)).shape
        with running.connect() as c:
            assert "too many connections" in said(receive_frame(c))
            assert c.recv(1) == b""
        logits(ask(a, frame))
    time.sleep(0.1)
    with running.connect() as d:
        logits(ask(d, frame))


def test_more_frames_a_second_than_the_limit_are_refused(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=Limits(per_second=5)), frames_of(bundle, 1)
    with running.connect() as connection:
        kinds = [unpack(ask(connection, frame)).kind for _ in range(20)]
        assert kinds[:5] == [Kind.REPLY] * 5
        assert "5 frames a second" in said(ask(connection, frame))
        time.sleep(0.5)
        logits(ask(connection, frame))


def test_a_client_that_reads_no_replies_is_not_answered_without_end(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=Limits(per_second=1e9)), frames_of(bundle, 1)
    with running.connect() as greedy, running.connect() as other:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        logits(ask(greedy, frame))
        [client] = [client for client in running.server.clients if client.transport.get_extra_info("peername") == greedy.getsockname()]
        client.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)

        def send() -> None:
            with contextlib.suppress(OSError):
                greedy.sendall(20_000 * frame)

        sender = threading.Thread(target=send)
        sender.start()
        eventually(lambda: client.transport.get_write_buffer_size() > 10_000)
        time.sleep(0.5)
        assert client.transport.get_write_buffer_size() < 100_000
        logits(ask(other, frame))
        greedy.shutdown(socket.SHUT_RDWR)
        sender.join()


def test_an_edge_half_that_fails_answers_so_and_goes_on(run, make_bundle, monkeypatch):
    bundle = make_bundle()
    running, [frame] = run(bundle), frames_of(bundle, 1)
    right = EdgeHalf.run
    with running.connect() as connection:
        monkeypatch.setattr(EdgeHalf, "run", lambda half, batch: 1 / 0)
        assert "the edge half failed (division by zero)" in said(ask(connection, frame))
        monkeypatch.setattr(EdgeHalf, "run", right)
        logits(ask(connection, frame))


@pytest.mark.parametrize(("limits", "begin"), [(Limits(idle_s=0.2), False), (Limits(partial_s=0.2), True)])
def test_a_connection_that_says_nothing_or_stops_inside_a_frame_is_closed(run, make_bundle, monkeypatch, limits, begin):
    monkeypatch.setattr("pipeline.runtime.server.SWEEP_S", 0.05)
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=limits), frames_of(bundle, 1)
    with running.connect() as connection:
        if begin:
            connection.sendall(frame[:-1])
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_sigterm_answers_what_is_under_way_and_ends_well(make_bundle):
    bundle = make_bundle()
    [frame] = frames_of(bundle, 1)
    code = "import sys; from pathlib import Path; from pipeline.runtime.server import serve\nserve(Path(sys.argv[1]), slowdown=20_000)"
    with subprocess.Popen([sys.executable, "-c", code, str(bundle.path)], stdout=subprocess.PIPE, text=True) as edge:
        assert edge.stdout is not None
        port = int(edge.stdout.readline().split()[-1])
        with socket.create_connection(("127.0.0.1", port), 10) as asking, socket.create_connection(("127.0.0.1", port), 10) as idle:
            asking.sendall(frame)
            time.sleep(0.1)
            edge.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b""
            assert logits(receive_frame(asking)).shape == (3,)
            assert asking.recv(1) == b""
        assert edge.wait(10) == 0
