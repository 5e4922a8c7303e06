"""The edge server as its clients see it: every frame is answered once and in order, whatever else goes on, and no limit can be crossed."""

import asyncio
import contextlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from pipeline.errors import BundleError
from pipeline.runtime.bundle import EDGE
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import REPLY_TIMES, EdgeHalf
from pipeline.runtime.frame import Kind, pack, unpack
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
        ends.append((server, thread))
        assert known.wait(10)
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


def answer_alone(bundle):
    session = bundle.session(EDGE, 1)

    def answer(frame: bytes) -> bytes:
        half = EdgeHalf(bundle)
        return half.reply(session.run(None, {session.get_inputs()[0].name: half.open(frame)})[0][0], 0, 0)

    return answer


def ask(connection: socket.socket, frame: bytes) -> bytes:
    connection.sendall(frame)
    reply = receive_frame(connection)
    assert reply is not None
    return reply


class Gate:
    """Holds edge halves back while it is shut, and notes how many frames each batch has."""

    def __init__(self) -> None:
        self.is_open, self.began, self.sizes = threading.Event(), threading.Event(), []

    def run(self, half, batch):
        self.sizes.append(len(batch))
        self.began.set()
        assert self.is_open.wait(20)
        return RUN(half, batch)


RUN = EdgeHalf.run


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(EdgeHalf, "run", lambda half, batch: gate.run(half, batch))
    yield gate
    gate.is_open.set()


def eventually(check) -> None:
    end_s = time.monotonic() + 20
    while not check():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@pytest.mark.parametrize("batching", [Batching(1), Batching(8), Batching(8, delay_ms=50)])
def test_many_devices_at_once_get_each_its_own_answers(run, make_bundle, gate, batching):
    bundle = make_bundle()
    running, frames = run(bundle, batching=batching), frames_of(bundle, 40)
    expected = [logits(reply) for reply in map(answer_alone(bundle), frames)]
    [lane] = running.server.lanes.values()

    def device(number: int) -> list[np.ndarray]:
        with running.connect() as connection:
            return [logits(ask(connection, frame)) for frame in frames[number::8]]

    with ThreadPoolExecutor(8) as pool:
        devices = [pool.submit(device, number) for number in range(8)]
        eventually(lambda: lane.waiting + sum(gate.sizes) == 8)
        gate.is_open.set()
        for number, future in enumerate(devices):
            assert np.allclose(future.result(), expected[number::8], atol=1e-5)
    assert sum(gate.sizes) == 40
    assert max(gate.sizes) == 1 if batching.most == 1 else 2 <= max(gate.sizes) <= batching.most


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


def test_bundles_are_served_side_by_side_and_swapped_without_a_failed_request(run, make_bundle, tmp_path, quick_looks):
    old, new = make_bundle(), make_bundle(seed=1)
    frames = {bundle.bundle_id: frames_of(bundle, 3) for bundle in (old, new)}
    shelf, over = tmp_path / "shelf", {bundle.bundle_id: threading.Event() for bundle in (old, new)}
    shutil.copytree(old.path, shelf / "1")
    running = run(shelf, limits=Limits(per_second=1e9))

    def device(bundle) -> int:
        count = 0
        with running.connect() as connection:
            while not over[bundle.bundle_id].is_set():
                for frame in frames[bundle.bundle_id]:
                    logits(ask(connection, frame))
                    count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        try:
            before = [pool.submit(device, old) for _ in range(2)]
            shutil.copytree(new.path, tmp_path / "2")
            (tmp_path / "2").rename(shelf / "2")
            eventually(lambda: new.bundle_id in running.server.lanes)
            after = [pool.submit(device, new) for _ in range(2)]
            time.sleep(0.1)
            over[old.bundle_id].set()
            assert all(future.result() for future in before)
            shutil.rmtree(shelf / "1")
            eventually(lambda: old.bundle_id not in running.server.lanes)
        finally:
            for event in over.values():
                event.set()
        assert all(future.result() for future in after)
    with running.connect() as connection:
        assert f"this edge runs {new.bundle_id.hex()}" in said(ask(connection, frames[old.bundle_id][0]))


def test_a_bundle_that_is_replaced_is_served_from_then_on(run, make_bundle, tmp_path, quick_looks):
    old, new = make_bundle(), make_bundle(seed=1)
    running = run(old)
    shutil.copytree(new.path, tmp_path / "next")
    old.path.rename(tmp_path / "old")
    (tmp_path / "next").rename(old.path)
    eventually(lambda: set(running.server.lanes) == {new.bundle_id})
    with running.connect() as connection:
        logits(ask(connection, frames_of(new, 1)[0]))


def test_a_broken_bundle_beside_a_good_one_is_reported_once_and_served_when_it_is_whole(run, make_bundle, tmp_path, quick_looks, capfd):
    good, half_copied, lonely = make_bundle(), make_bundle(seed=1), make_bundle("device-only")
    shelf = tmp_path / "shelf"
    shutil.copytree(good.path, shelf / "good")
    running = run(shelf)
    lonely.path.rename(shelf / "lonely")
    (shelf / "copied").mkdir()
    for name in ("manifest.json", "codec.json", "device.onnx", "device-only.onnx"):
        shutil.copy(half_copied.path / name, shelf / "copied")
    said_so = ""

    def reported() -> bool:
        nonlocal said_so
        said_so += capfd.readouterr().err
        return "copied/edge.onnx cannot be read" in said_so and "has no edge.onnx" in said_so

    eventually(reported)
    time.sleep(0.3)
    capfd.readouterr()
    time.sleep(0.3)
    assert not capfd.readouterr().err, "not again and again"
    shutil.copy(half_copied.path / "edge.onnx", shelf / "copied")
    eventually(lambda: set(running.server.lanes) == {good.bundle_id, half_copied.bundle_id})


def test_what_replaces_a_good_bundle_and_is_broken_does_not_end_it(run, make_bundle, tmp_path, quick_looks, capfd):
    good, bad = make_bundle(), make_bundle(seed=1)
    running, [frame] = run(good), frames_of(good, 1)
    (bad.path / "edge.onnx").write_bytes(b"altered")
    good.path.rename(tmp_path / "old")
    time.sleep(0.3)
    bad.path.rename(good.path)
    eventually(lambda: "edge.onnx is not the file" in capfd.readouterr().err)
    with running.connect() as connection:
        logits(ask(connection, frame))
    good.path.rename(tmp_path / "bad")
    (tmp_path / "old").rename(good.path)
    time.sleep(0.2)
    assert set(running.server.lanes) == {good.bundle_id}


def test_a_shelf_that_cannot_be_looked_at_ends_nothing(make_bundle, tmp_path, monkeypatch, capfd):
    bundle = make_bundle()
    shelf = Shelf(bundle.path.parent)
    [half] = shelf.first()

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.iterdir", denied)
    for _ in range(3):
        assert shelf.look() == ([], {half.bundle_id})
    assert "cannot be looked at" in capfd.readouterr().err


def test_nothing_to_serve_is_one_sentence(make_bundle, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "empty", "holds no bundle"),
        (tmp_path / "nowhere", "cannot be read"),
        (make_bundle("device-only").path, r"has no edge\.onnx"),
    ):
        with pytest.raises(BundleError, match=message):
            serve(path)


def test_removing_a_bundle_answers_what_waits_for_it(run, make_bundle, gate):
    bundle = make_bundle()
    running, frames = run(bundle), frames_of(bundle, 2)
    [lane] = running.server.lanes.values()
    with running.connect() as a, running.connect() as b:
        a.sendall(frames[0])
        assert gate.began.wait(10)
        b.sendall(frames[1])
        eventually(lambda: lane.waiting == 1)
        running.call(running.server.remove, bundle.bundle_id)
        gate.is_open.set()
        assert logits(receive_frame(a)).shape == logits(receive_frame(b)).shape == (3,)


def test_a_full_queue_answers_busy_at_once(run, make_bundle, gate):
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=Limits(waiting=1), batching=Batching(1)), frames_of(bundle, 1)
    [lane] = running.server.lanes.values()
    with running.connect() as first, running.connect() as second, running.connect() as third:
        first.sendall(frame)
        assert gate.began.wait(10)
        second.sendall(frame)
        eventually(lambda: lane.waiting == 1)
        assert "busy" in said(ask(third, frame))
        gate.is_open.set()
        assert logits(receive_frame(first)).shape == logits(receive_frame(second)).shape == (3,)
        logits(ask(third, frame))


def test_what_waited_too_long_or_whose_sender_has_left_is_not_run(run, make_bundle, gate):
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=Limits(patience_s=0.2)), frames_of(bundle, 1)
    [lane] = running.server.lanes.values()
    with running.connect() as first, running.connect() as second, running.connect() as leaver:
        first.sendall(frame)
        assert gate.began.wait(10)
        leaver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        leaver.sendall(frame)
        eventually(lambda: lane.waiting == 1)
        leaver.close()
        eventually(lambda: len(running.server.clients) == 2)
        second.sendall(frame)
        eventually(lambda: lane.waiting == 2)
        time.sleep(0.3)
        gate.is_open.set()
        logits(receive_frame(first))
        assert "busy" in said(receive_frame(second))
        assert gate.sizes == [1]


def test_a_frame_larger_than_the_limit_is_refused_and_its_sender_hears_why(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=Limits(payload_bytes=1_000)), frames_of(bundle, 1)
    with running.connect() as connection:
        connection.sendall(pack(bytes(4_000_000), bundle.bundle_id, Kind.SYMBOLS))
        assert "payload of 4000000 bytes is more than this edge takes; send at most 1000" in said(receive_frame(connection))
        assert connection.recv(1) == b""
    with running.connect() as connection:
        assert said(ask(connection, pack(bytes(1_000), bundle.bundle_id, Kind.SYMBOLS)))
        logits(ask(connection, frame))


def test_decoding_takes_no_more_than_the_symbols_of_an_image(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle), frames_of(bundle, 1)
    with running.connect() as connection:
        assert said(ask(connection, pack(bytes(1_000_000), bundle.bundle_id, Kind.SYMBOLS)))
        logits(ask(connection, frame))


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


@pytest.mark.parametrize("frames", ["answered", "refused"])
def test_a_client_that_reads_no_replies_is_not_answered_without_end(run, make_bundle, frames):
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=Limits(per_second=1e9, payload_bytes=10_000)), frames_of(bundle, 1)
    flood = {"answered": frame, "refused": pack(b"", b"none", Kind.SYMBOLS)}[frames]
    with running.connect() as greedy, running.connect() as other:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        logits(ask(greedy, frame))
        [client] = [client for client in running.server.clients if client.transport.get_extra_info("peername") == greedy.getsockname()]
        client.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)

        def send() -> None:
            with contextlib.suppress(OSError):
                greedy.sendall(100_000 * flood)

        sender = threading.Thread(target=send)
        sender.start()
        eventually(lambda: client.transport.get_write_buffer_size() > 10_000)
        time.sleep(0.5)
        assert client.transport.get_write_buffer_size() < 100_000
        assert len(client._buffer) < 10_000 + 300_000
        logits(ask(other, frame))
        greedy.shutdown(socket.SHUT_RDWR)
        sender.join()


def test_an_edge_half_that_fails_answers_so_and_goes_on(run, make_bundle, monkeypatch):
    bundle = make_bundle()
    running, [frame] = run(bundle), frames_of(bundle, 1)
    right = EdgeHalf.run
    with running.connect() as connection:
        monkeypatch.setattr(EdgeHalf, "run", lambda half, batch: 1 / 0)
        assert "the edge half failed (ZeroDivisionError" in said(ask(connection, frame))
        monkeypatch.setattr(EdgeHalf, "run", right)
        logits(ask(connection, frame))


@pytest.mark.parametrize(("limits", "piece_s"), [(Limits(idle_s=0.2), None), (Limits(partial_s=0.3), 0.05)])
def test_a_connection_that_says_nothing_or_trickles_is_closed(run, make_bundle, monkeypatch, limits, piece_s):
    monkeypatch.setattr("pipeline.runtime.server.SWEEP_S", 0.05)
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=limits), frames_of(bundle, 1)
    with running.connect() as connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        for byte in frame[:1] + bytes(200) if piece_s else b"":
            connection.sendall(frame[:1] if byte else b"\1")
            time.sleep(piece_s or 0)
            if running.server.clients == set():
                break
        eventually(lambda: running.server.clients == set())
        assert connection.recv(1) == b""
    assert running.server.clients == set()


@contextlib.contextmanager
def slow_edge(bundle, seconds: float):
    """A server in a process of its own, (process, port), that takes so long for an image and prints when it begins."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from pipeline.runtime.edge import EdgeHalf; from pipeline.runtime.server import serve\n"
        "right = EdgeHalf.run\n"
        "def run(half, batch):\n"
        "    print('began', flush=True); time.sleep(float(sys.argv[2])); return right(half, batch)\n"
        "EdgeHalf.run = run\n"
        "serve(Path(sys.argv[1]))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(bundle.path), str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as edge:
        try:
            assert edge.stdout is not None
            yield edge, int(edge.stdout.readline().split()[-1])
        finally:
            edge.kill()


def test_sigterm_answers_what_is_there_and_ends_well(make_bundle):
    bundle = make_bundle()
    [frame] = frames_of(bundle, 1)
    with slow_edge(bundle, 1) as (edge, port):
        with socket.create_connection(("127.0.0.1", port), 10) as asking, socket.create_connection(("127.0.0.1", port), 10) as idle:
            asking.sendall(2 * frame)
            assert edge.stdout.readline() == "began\n"
            edge.send_signal(signal.SIGTERM)
            assert idle.recv(1) == b""
            assert [logits(receive_frame(asking)).shape for _ in range(2)] == [(3,), (3,)]
            assert asking.recv(1) == b""
        assert edge.wait(10) == 0
        assert edge.stderr.read() == ""


def test_a_second_signal_ends_it_at_once(make_bundle):
    bundle = make_bundle()
    [frame] = frames_of(bundle, 1)
    with slow_edge(bundle, 60) as (edge, port), socket.create_connection(("127.0.0.1", port), 10) as asking:
        asking.sendall(frame)
        assert edge.stdout.readline() == "began\n"
        edge.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert edge.poll() is None
        edge.send_signal(signal.SIGTERM)
        assert edge.wait(20) == 0
