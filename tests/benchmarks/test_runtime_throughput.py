import asyncio
import contextlib
import json
import os
import socketserver
import threading
import time

import pytest

from benchmarks import runtime_throughput
from benchmarks.runtime_throughput import COUNTS, Traffic, figures, loaded, open_loop
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.transport import receive_frame
from tests.pipeline.runtime.conftest import bundle_in

EVERY = 5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return bundle_in(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def traffic(bundle):
    return Traffic.of(bundle, 20)


@contextlib.contextmanager
def edge(bundle, answer):
    """The port of an edge that gives what `answer` makes of each frame and its number on its connection."""
    half = EdgeHalf(bundle)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            number = 0
            with contextlib.suppress(ConnectionError):
                while frame := receive_frame(self.request):
                    number += 1
                    self.request.sendall(answer(half, number, frame))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address = True, True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def another_s(half, traffic, frame):
    index = traffic.frames.index(frame)
    return half.reply(traffic.logits[(index + 7) % len(traffic.frames)], 0.0, 0.0)


@pytest.mark.parametrize(
    ("fault", "count"),
    [
        (lambda half, traffic, frame: 2 * half.handle(frame)[0], "doubled"),
        (lambda half, traffic, frame: b"", "lost"),
        (lambda half, traffic, frame: half.refusal("busy"), "errors"),
        (another_s, "errors"),
    ],
    ids=["doubled", "lost", "refused", "another's"],
)
def test_each_faulty_answer_is_counted_once_and_as_what_it_is(bundle, traffic, monkeypatch, fault, count) -> None:
    monkeypatch.setattr(runtime_throughput, "DRAIN_S", 0.5)
    faults = []

    def answer(half, number, frame):
        if number % EVERY:
            return half.handle(frame)[0]
        faults.append(number)
        return fault(half, traffic, frame)

    with edge(bundle, answer) as port:
        found = asyncio.run(open_loop(port, traffic, 4, 1, 200))
    assert len(faults) > EVERY
    assert {name: found[name] for name in COUNTS} == dict.fromkeys(COUNTS, 0) | {count: len(faults)}


def test_a_stall_is_felt_by_all_frames_that_were_due_in_it(bundle, traffic) -> None:
    busy, is_first = threading.Lock(), [True]

    def answer(half, number, frame):
        with busy:
            if is_first:
                is_first.clear()
                time.sleep(0.5)
        return half.handle(frame)[0]

    with edge(bundle, answer) as port:
        found = asyncio.run(open_loop(port, traffic, 4, 1, 100))
    assert sum(latency_ms > 100 for latency_ms in found["latency_ms"]) > 20, "clients that wait for an answer before they send would feel it once each"


def test_a_level_through_the_real_edge_beside_the_bare_loop(bundle) -> None:
    cores = os.sched_getaffinity(0)
    row = json.loads(json.dumps(loaded(bundle, (1, 3), 0.5, 0.01, ("--max-batch", "4", "--max-per-second", "1e9"))))
    assert os.sched_getaffinity(0) == cores
    assert [level["clients"] for level in row["levels"]] == [1, 3]
    assert {count: sum(run[count] for run in (*row["levels"], row["half_load"])) for count in COUNTS} == dict.fromkeys(COUNTS, 0)
    assert all(level["sent"] >= level["per_s"][0] * 0.5 > 0 for level in row["levels"])
    assert row["half_load"]["offered_per_s"] == pytest.approx(max(level["per_s"][0] for level in row["levels"]) / 2, abs=0.01)
    assert all(len(rates) == 3 and min(rates) > 0 for way in ("bare", "bare_with_decode") for rates in row[way].values())


def test_the_ratio_is_of_the_best_level_to_the_best_batch_right_beside_it() -> None:
    def level(clients, rate):
        return {"clients": clients, "sent": 10, "per_s": [rate - 1, rate + 1], "p50_ms": 1, "p99_ms": 2, "errors": 0, "lost": 1, "doubled": 0}

    bare = {"1": [50.0, 50.0, 50.0, 500.0], "8": [100.0, 200.0, 220.0, 100.0]}
    half_load = {"clients": 2, "sent": 100, "offered_per_s": 90.0, "late_ms": 1.0, "latency_ms": [*range(1, 101)], "errors": 2, "lost": 0, "doubled": 0}
    row = {"cut": "layer1", "bare": bare, "levels": [level(1, 60), level(8, 189), level(64, 80)], "half_load": half_load}
    found = figures({"max_batch": 8, "resnet18": row})
    assert found["throughput_ratio"]["value"] == pytest.approx(189 / 210)
    assert "throughput_ratio_resnet20" not in found
    assert found["p99_ms_half_load"]["value"] == pytest.approx(99.01)
    assert [found[f"throughput_{count}"]["value"] for count in COUNTS] == [2, 3, 0]
    assert found["throughput_lost"]["n"] == 130
