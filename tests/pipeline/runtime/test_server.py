"""The edge server as its clients see it: every frame is answered once and in order, whatever else goes on, and no limit can be crossed."""

import contextlib
import math
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.frame import Kind, pack, unpack
from pipeline.runtime.hello import Hello
from pipeline.runtime.server import Limits
from pipeline.runtime.transport import receive_frame
from tests.pipeline.runtime.serving import ask, eventually, frames_of, logits, said


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


def test_a_frame_larger_than_the_limit_is_refused_and_its_sender_hears_why(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=Limits(payload_bytes=1_000)), frames_of(bundle, 1)
    with running.connect() as connection:
        connection.sendall(pack(bytes(4_000_000), bundle.bundle_id, Kind.SYMBOLS))
        assert "4000013 bytes carries more than this edge takes; send payloads of at most 1000" in said(receive_frame(connection))
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


def test_messages_that_are_damaged_are_limited_like_others(run, make_bundle):
    bundle = make_bundle()
    running = run(bundle, limits=Limits(per_second=5))
    with running.connect() as connection:
        connection.sendall(Hello(compact=bundle.bundle_id.hex()).pack() + 50 * b"\x00\x00bad!")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    assert running.server.tally.refusals["frame"] < 50
    assert running.server.tally.refusals["frame"] + running.server.tally.refusals["rate"] == 50


def test_without_a_limit_nothing_is_kept_of_who_asks(run, make_bundle):
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=Limits(per_second=math.inf)), frames_of(bundle, 1)
    with running.connect() as connection:
        logits(ask(connection, frame))
        assert not running.server.buckets


def test_as_many_files_may_be_open_as_the_limits_need(run, make_bundle):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        run(make_bundle(), limits=Limits(connections=300))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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


@pytest.mark.parametrize(("limits", "piece_s"), [(Limits(idle_s=0.2), None), (Limits(partial_s=0.3), 0.05)])
def test_a_connection_that_says_nothing_or_trickles_is_closed(run, make_bundle, monkeypatch, limits, piece_s):
    monkeypatch.setattr("pipeline.runtime.server.SWEEP_S", 0.05)
    bundle = make_bundle()
    running, [frame] = run(bundle, limits=limits), frames_of(bundle, 1)
    with running.connect() as connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        eventually(lambda: running.server.clients)
        if piece_s:
            for byte in frame[:1] + bytes(100):  # of a frame that never ends
                connection.sendall(bytes([byte or 1]))
                time.sleep(piece_s)
            pytest.fail("it may trickle on without end")
        assert connection.recv(1) == b""
    eventually(lambda: not running.server.clients)


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
