"""Frames of many devices, run together: each gets its own answer, and one that fails spoils no other."""

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.frame import Kind, pack
from pipeline.runtime.lane import Batching
from pipeline.runtime.server import Limits
from pipeline.runtime.transport import receive_frame
from tests.pipeline.runtime.serving import RUN, ask, eventually, frames_of, logits, said


@pytest.mark.parametrize("batching", [Batching(1), Batching(8), Batching(8, delay_ms=50)])
def test_many_devices_at_once_get_each_its_own_answers(run, make_bundle, gate, batching):
    bundle = make_bundle()
    running, frames, half = run(bundle, batching=batching), frames_of(bundle, 40), EdgeHalf(bundle)
    expected = [RUN(half, half.open(frame))[0] for frame in frames]
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
        assert running.server.tally.refusals["busy"] == 1, "who has left was told nothing"


def test_an_edge_half_that_fails_answers_so_and_goes_on(run, make_bundle, monkeypatch):
    bundle = make_bundle()
    running, [frame] = run(bundle), frames_of(bundle, 1)
    right = EdgeHalf.run
    with running.connect() as connection:
        monkeypatch.setattr(EdgeHalf, "run", lambda half, batch: 1 / 0)
        assert "the edge half failed (ZeroDivisionError" in said(ask(connection, frame))
        monkeypatch.setattr(EdgeHalf, "run", right)
        logits(ask(connection, frame))
