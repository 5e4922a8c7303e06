"""A device at any server of the Open Inference Protocol, ours or not, there or not."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

from pipeline.errors import FrameError
from pipeline.runtime import oip
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.dial import dial
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.fallback import LONGEST_PAUSE_S, Fallback
from pipeline.runtime.grpc_transport import GrpcTransport
from pipeline.runtime.hello import Hello
from pipeline.runtime.keymaking import make_keys
from pipeline.runtime.transport import EdgeUnreachable, LoopbackTransport
from tests.pipeline.runtime.calls import expected
from tests.pipeline.runtime.foreign import SERVER
from tests.pipeline.runtime.serving import frames_of, logits


@pytest.mark.parametrize("kind", ["split", "edge-only"])
def test_a_device_over_grpc_gets_what_the_edge_half_gives(serve, make_bundle, picture, kind):
    bundle = make_bundle(kind)
    running, _ = serve(bundle)
    transport = dial(f"grpc://127.0.0.1:{running.grpc_port}")
    near, far = (DeviceHalf(bundle).classify(picture, each) for each in (LoopbackTransport(EdgeHalf(bundle)), transport))
    transport.close()
    assert np.array_equal(near.logits, far.logits)
    assert near.path == far.path
    assert near.frame_bytes < far.frame_bytes <= near.frame_bytes + 60
    assert far.parts["decode_ms"] > 0
    assert far.parts["edge_ms"] > 0
    assert far.parts["link_ms"] > 0


def test_a_device_asks_a_server_that_knows_nothing_of_us(make_bundle, picture, foreign):
    bundle = make_bundle()
    device = DeviceHalf(bundle)
    frame, _ = device.run(picture)
    with foreign.popen(SERVER) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        answers = {frame.hex(): expected(bundle, [frame])[0].tolist()}
        print(json.dumps([oip.model_name(bundle.bundle_id), answers]), file=server.stdin, flush=True)
        port = int(server.stdout.readline())

        def ask(way: str):
            with contextlib.closing(GrpcTransport("127.0.0.1", port, hello=Hello(way))) as transport:
                return device.classify(picture, transport)

        for way in ("raw", "typed"):
            answer = ask(way)
            assert np.array_equal(answer.logits, expected(bundle, [frame])[0])
            assert (answer.parts["decode_ms"], answer.parts["edge_ms"]) == (0, 0)
        for way, reason in [
            ("nameless", "no logits"),
            ("half", "is FP16, not FP32"),
            ("short", r"holds 1\.5 numbers"),
            ("few", "1 raw contents for 2 outputs"),
            ("late", "cannot be"),
            ("RESOURCE_EXHAUSTED", "the edge refused: so RESOURCE_EXHAUSTED it is"),
            ("UNAUTHENTICATED", "the edge refused: so UNAUTHENTICATED it is"),
            ("INTERNAL", "the edge refused: so INTERNAL it is"),
        ]:
            with pytest.raises(FrameError, match=reason):
                ask(way)
        with pytest.raises(EdgeUnreachable, match="so UNAVAILABLE it is"):
            ask("UNAVAILABLE")
        print(file=server.stdin, flush=True)
        assert server.wait(10) == 0


@contextlib.contextmanager
def edge_command(bundle, grpc_port: int):
    """`coinfer edge` with gRPC at that port, or a free one; yields the port."""
    command = [sys.executable, "-m", "pipeline.cli", "edge", "--bundle", str(bundle.path), "--port", "0", "--grpc-port", str(grpc_port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as edge:
        try:
            assert edge.stdout is not None
            assert edge.stderr is not None
            lines = sorted(edge.stdout.readline() for _ in range(2))
            assert lines[1].endswith("for gRPC\n") or lines[0].endswith("for gRPC\n")
            yield int(next(line for line in lines if "gRPC" in line).split()[4])
            edge.terminate()
            assert edge.wait(20) == 0
            assert edge.stderr.read() == ""
        finally:
            edge.kill()


def test_an_edge_that_restarts_is_not_noticed_and_one_that_went_and_came_back_is_used_again(make_bundle, picture):
    bundle, seconds = make_bundle(), [100.0]
    with edge_command(bundle, 0) as port:
        transport = dial(f"grpc://127.0.0.1:{port}")
        fallback = Fallback(DeviceHalf(bundle), transport, 20_000, now_s=lambda: seconds[0])
        assert fallback.classify(picture)[1] is None
    with edge_command(bundle, port):
        answer, why = fallback.classify(picture)
        assert (answer.path, why) == ("split", None)
    for _ in range(3):
        answer, why = fallback.classify(picture)
        assert (answer.path, f"edge grpc://127.0.0.1:{port} does not answer" in str(why)) == ("device-only", True)
        seconds[0] += LONGEST_PAUSE_S
    with edge_command(bundle, port):
        answer, why = fallback.classify(picture)
        assert (answer.path, why) == ("split", None)
    transport.close()


@pytest.mark.parametrize(
    ("says", "deadline_ms", "reason"),
    [(b"", 300, "timed out"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", 20_000, "does not answer"), (None, 20_000, "does not answer")],
)
def test_an_edge_that_says_nothing_or_something_else_is_a_reason_to_answer_alone(make_bundle, picture, says, deadline_ms, reason):
    """None: it hangs up."""
    bundle, connections = make_bundle(), []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def talk() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connections.append(connection)
                    connection.recv(1)
                    if says:
                        connection.sendall(says)
                    if says is None:
                        connection.close()

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        transport = GrpcTransport("127.0.0.1", server.getsockname()[1])
        answer, why = Fallback(DeviceHalf(bundle), transport, deadline_ms).classify(picture)
        transport.close()
        server.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()
    assert answer.path == "device-only"
    assert reason in str(why)


def test_opening_the_channel_is_part_of_the_time_there_is(serve, make_bundle, monkeypatch):
    bundle, opened = make_bundle(), grpc.insecure_channel
    running, _ = serve(bundle)
    [frame] = frames_of(bundle, 1)

    def slowly(*arguments):
        time.sleep(0.5)
        return opened(*arguments)

    monkeypatch.setattr("grpc.insecure_channel", slowly)
    with contextlib.closing(GrpcTransport("127.0.0.1", running.grpc_port)) as transport, pytest.raises(EdgeUnreachable, match="timed out"):
        transport.request(frame, 0.4)


def test_the_port_of_frames_over_tcp_is_no_grpc_and_the_device_says_so(run, make_bundle):
    bundle = make_bundle()
    [frame] = frames_of(bundle, 1)
    with contextlib.closing(GrpcTransport("127.0.0.1", run(bundle).port)) as transport, pytest.raises(EdgeUnreachable):
        transport.request(frame, 5)


def test_a_device_with_its_keys_is_answered_and_known(serve, make_bundle, key_folder):
    bundle = make_bundle()
    running, _ = serve(bundle, keys=key_folder / "edge")
    [frame] = frames_of(bundle, 1)
    with contextlib.closing(dial(f"grpc://127.0.0.1:{running.grpc_port}", key_folder / "ant")) as transport:
        transport.alone = 2
        for _ in range(3):
            assert np.allclose(logits(transport.request(frame)), expected(bundle, [frame]), atol=1e-5)
        assert transport.message_bytes(frame) > len(frame)
    known = running.server.tally.devices["ant"]
    assert (known.answered, known.alone) == (3, 2)


def test_certificates_are_asked_for_and_checked_on_both_sides(serve, make_bundle, key_folder, tmp_path):
    bundle = make_bundle()
    running, _ = serve(bundle, keys=key_folder / "edge")
    [frame] = frames_of(bundle, 1)
    make_keys(tmp_path / "other", ["edge.example"], ["ant"])
    (tmp_path / "trusting").mkdir()
    for path in (tmp_path / "other/ant/tls.crt", tmp_path / "other/ant/tls.key", tmp_path / "other/ant/token", key_folder / "ca.crt"):
        (tmp_path / "trusting" / path.name).write_bytes(path.read_bytes())
    for keys, reason in (
        (tmp_path / "other/ant", r"do not trust each other \(unable to get local issuer certificate\); look at the dates and names in the keys"),
        (tmp_path / "trusting", "check address and keys"),
        (None, "check the address"),
    ):
        with contextlib.closing(dial(f"grpc://127.0.0.1:{running.grpc_port}", keys)) as transport, pytest.raises(EdgeUnreachable, match=reason):
            transport.request(frame, 5)
    assert not running.server.tally.served


def test_an_edge_of_another_name_is_refused(serve, make_bundle, key_folder, monkeypatch):
    monkeypatch.setattr("pipeline.runtime.keymaking.ALWAYS", ())
    make_keys(key_folder, ["elsewhere.example"], [])
    bundle = make_bundle()
    running, _ = serve(bundle, keys=key_folder / "edge")
    [frame] = frames_of(bundle, 1)
    transport = dial(f"grpc://127.0.0.1:{running.grpc_port}", key_folder / "ant")
    with contextlib.closing(transport), pytest.raises(EdgeUnreachable, match=r"do not trust each other \(Hostname mismatch\)"):
        transport.request(frame, 5)
