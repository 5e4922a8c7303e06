"""The profile agent over a real socket, with its client and with others."""

import json
import math
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

from pipeline.costs.remote_bench import RemoteBench
from pipeline.errors import CoinferError, ParamsError, ProfileError
from pipeline.runtime import bench_wire
from pipeline.runtime.bench import CoderWork, ImageWork, LocalBench, ModelWork, Repeats, Samples
from pipeline.runtime.bench_server import serve_bench
from pipeline.runtime.bundle import DEVICE
from tests.pipeline.runtime.conftest import halves

ONCE = Repeats(threads=1, rounds=1, repeats=3, warmup=1, job_ms=100)


@pytest.fixture
def agent():
    """start(bench) -> address of a profile agent in a thread."""

    def start(bench=None):
        ports, ready = [], threading.Event()

        def announce(port):
            ports.append(port)
            ready.set()

        threading.Thread(target=serve_bench, kwargs={"bench": bench, "announce": announce}, daemon=True).start()
        assert ready.wait(10)
        return f"127.0.0.1:{ports[0]}"

    return start


def talk(address, data):
    """What the agent answers to raw bytes, and whether it then closes."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answered = bench_wire.receive(connection)
        return answered and answered[0], connection.recv(1)


def test_an_agent_measures_what_this_machine_would(agent):
    jobs = [ModelWork(halves(0)[DEVICE]), ImageWork("encode", 16, "jpeg", 50), CoderWork("decode", 64)]
    here = LocalBench()
    with RemoteBench(agent()) as there:
        assert there.describe() == here.describe()
        for _ in range(2):
            found, expected = there.measure(jobs, ONCE, halves(0)[DEVICE]), here.measure(jobs, ONCE, halves(0)[DEVICE])
            assert [len(samples.ms) for samples in found] == [len(samples.ms) for samples in expected] == [3, 3, 3]
            assert found[0].optimised == expected[0].optimised
            assert [event["name"] for event in found[0].events] == [event["name"] for event in expected[0].events]


def test_a_model_that_cannot_run_there_is_refused_and_the_agent_goes_on(agent):
    address = agent()
    with RemoteBench(address) as there:
        with pytest.raises(ProfileError, match=r"the profile agent at .* refuses: a job cannot be measured"):
            there.measure([ModelWork(b"nonsense")], ONCE)
        assert len(there.measure([CoderWork("encode", 64)], ONCE)) == 1


def test_a_second_client_is_told_to_wait(agent, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.bench_server.HANDOVER_S", 0.1)
    address = agent()
    with RemoteBench(address) as first, RemoteBench(address) as second:
        first.measure([CoderWork("encode", 64)], ONCE)
        with pytest.raises(ProfileError, match=r"refuses: .* measuring for another client; try again when that is done"):
            second.describe()
        assert first.measure([CoderWork("encode", 64)], ONCE)[0].ms


def test_a_client_that_comes_while_another_leaves_is_served(agent):
    address = agent()
    with RemoteBench(address) as first, RemoteBench(address) as second:
        first.measure([CoderWork("encode", 64)], ONCE)
        leaving = threading.Timer(0.3, first.close)
        leaving.start()
        assert second.describe()["runtime"]
        leaving.join()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "no message between a profile agent and"),
        (bytes(200), "no message between"),
        (struct.pack(">4sII", bench_wire.MAGIC, 2, 2**32 - 1) + b"{}", "4294967295 bytes of models is more than"),
        (struct.pack(">4sII", bench_wire.MAGIC, 2**32 - 1, 0), "bytes of JSON is more than"),
        (bench_wire.packed({}, b"")[:8] + struct.pack(">I", 0) + b"[]", "holds no JSON object"),
    ],
)
def test_garbage_is_answered_in_one_sentence_and_closed(agent, data, message):
    address = agent()
    answered, rest = talk(address, data)
    assert message in answered["error"]
    assert rest == b""
    with RemoteBench(address) as there:
        assert there.describe()["runtime"]


MEASURE = {"ask": "measure", "repeats": vars(ONCE), "jobs": [], "beside": None}


@pytest.mark.parametrize(
    ("fields", "blob", "message"),
    [
        ({"ask": "reboot"}, b"", "can describe and measure, not reboot"),
        ({}, b"", "can describe and measure, not None"),
        ({"ask": "measure"}, b"", "is not understood"),
        ({**MEASURE, "jobs": [{"model": 10}]}, b"short", "is not understood"),
        ({**MEASURE, "jobs": [{"model": -1}]}, b"short", "is not understood"),
        ({**MEASURE, "jobs": [{"model": 1, "image": {}}]}, b"s", "is not understood"),
        ({**MEASURE, "jobs": [{"shell": "ls"}]}, b"", "is not understood"),
        ({**MEASURE, "jobs": [{"image": {"work": "encode", "size": 1e9}}]}, b"", "there is no image work"),
        ({**MEASURE, "jobs": [{"coder": {"work": "encode", "symbols": 64, "colour": 1}}]}, b"", "is not understood"),
        ({**MEASURE, "jobs": 3}, b"", "is not understood"),
        ({**MEASURE, "repeats": {**vars(ONCE), "repeats": 10**9}}, b"", "cannot be repeated"),
        ({**MEASURE, "repeats": {**vars(ONCE), "threads": "many"}}, b"", "cannot be repeated"),
        ({**MEASURE, "repeats": {**vars(ONCE), "job_ms": 10**400}}, b"", "a request cannot be answered"),
        ({**MEASURE, "jobs": [{"coder": {"work": "encode", "symbols": 1 << 20}}]}, b"", "there is no coder work"),
        (MEASURE, b"left over", "is not understood"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_says_why(agent, fields, blob, message):
    answered, _ = talk(agent(), bench_wire.packed(fields, blob))
    assert message in answered["error"]


def test_a_client_that_leaves_in_the_middle_harms_nobody(agent):
    address = agent()
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(bench_wire.packed(MEASURE)[:20])
    with RemoteBench(address) as there:
        assert there.describe()["runtime"]


def test_an_agent_that_tired_of_waiting_is_asked_again(agent, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.bench_server.SILENCE_S", 0.1)
    with RemoteBench(agent()) as there:
        for _ in range(2):
            assert there.measure([CoderWork("encode", 64)], ONCE)[0].ms
            time.sleep(0.5)


def test_an_agent_that_answers_less_than_was_asked_is_not_believed(agent):
    class Forgetful(LocalBench):
        def measure(self, jobs, repeats, beside=None):
            return [Samples((1.0,))]

    with RemoteBench(agent(Forgetful())) as there, pytest.raises(ProfileError, match="answered 1 of 2 jobs"):
        there.measure([CoderWork("encode", 64)] * 2, ONCE)


@pytest.mark.parametrize("times", [(), (math.nan,), (1.0, math.inf), (-1.0,), (10**400,), ("fast",)])
def test_an_agent_whose_times_are_none_is_not_believed(times):
    rows = [{"ms": list(times), "optimised": 0, "events": []}]
    with pytest.raises(ProfileError, match="reply is not understood") as caught:
        bench_wire.replied({"samples": rows}, b"")
    assert "\n" not in str(caught.value)


def test_nobody_there_and_no_address_are_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(ProfileError, match=rf"no profile agent answers at 127.0.0.1:{port} .*coinfer profile-agent"):
        RemoteBench(f"127.0.0.1:{port}").describe()
    for address in ("here", "host:", ":70000", "host:99999", "a..b:1"):
        with pytest.raises(ParamsError, match="is not HOST:PORT"):
            RemoteBench(address)


def test_an_address_in_use_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(CoinferError, match=r"cannot listen on 127\.0\.0\.1"):
        serve_bench(port=taken.getsockname()[1])


def test_the_command_needs_the_light_install_only():
    hidden = "import sys; [sys.modules.__setitem__(name, None) for name in ('torch', 'onnx', 'sklearn', 'matplotlib', 'yaml')]"
    code = f"{hidden}; sys.argv = ['coinfer', 'profile-agent', '--port', '0']; from pipeline.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            port = int(process.stdout.readline().split()[-1])
            with RemoteBench(f"127.0.0.1:{port}") as there:
                (found,) = there.measure([ModelWork(halves(0)[DEVICE])], ONCE)
            assert len(json.dumps(found.events)) > 100
        finally:
            process.terminate()
