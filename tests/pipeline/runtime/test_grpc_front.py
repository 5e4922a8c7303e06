"""The edge over gRPC, as any client of the Open Inference Protocol sees it."""

import contextlib
import socket
import subprocess
import sys
import time

import grpc
import numpy as np
import pytest

from pipeline.errors import CoinferError, FrameError
from pipeline.runtime import oip
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.fallback import Fallback
from pipeline.runtime.frame import Kind, pack
from pipeline.runtime.grpc_front import GrpcFront
from pipeline.runtime.grpc_transport import GrpcTransport
from pipeline.runtime.guard import DeviceKeys
from pipeline.runtime.hello import Hello
from pipeline.runtime.lane import Batching
from pipeline.runtime.server import Limits
from pipeline.runtime.server import serve as serve_edge
from pipeline.runtime.transport import EdgeUnreachable, TcpTransport
from tests.pipeline.runtime.calls import CODES, expected, found, refused, request_for, symbols_for
from tests.pipeline.runtime.serving import RUN, eventually, frames_of, logits, said


def test_a_client_that_knows_nothing_of_us_finds_and_asks_our_edge(serve, make_bundle, foreign):
    bundle = make_bundle()
    running, _ = serve(bundle)
    frames = frames_of(bundle, 3)
    symbols = np.concatenate([EdgeHalf(bundle).open(frame) for frame in frames])
    model, edge_model = oip.model_name(bundle.bundle_id), oip.edge_model_name(bundle.bundle_id)
    saw = foreign.ask(f"127.0.0.1:{running.grpc_port}", model, edge_model, [frame.hex() for frame in frames], symbols.tolist())
    assert (saw["live"], saw["ready"], saw["server"], saw["models"]) == (True, True, "coinfer", [True, True, False, False])
    outputs = [{"name": "logits", "datatype": "FP32", "shape": ["-1", "3"]}]
    for metadata, takes in zip(saw["metadata"], [("frame", "BYTES", ["-1", "1"]), ("symbols", "UINT8", ["-1", "2", "4", "4"])], strict=True):
        assert metadata["inputs"] == [dict(zip(("name", "datatype", "shape"), takes, strict=True))]
        assert (metadata["versions"], metadata["outputs"]) == (["1"], outputs)
    for way in ("frames", "symbols"):
        assert np.allclose(saw[way]["logits"], expected(bundle, frames), atol=1e-5)
        assert (saw[way]["id"], saw[way]["version"]) == ("7", "1")
        assert saw[way]["times"]["edge_ms"] > 0
    assert saw["unknown"] == ["StatusCode.NOT_FOUND", f"model 'resnet' is not served; this edge has {model}, {edge_model}."]
    assert saw["damaged"][0] == "StatusCode.INVALID_ARGUMENT"
    assert "is damaged, its checksum does not match" in saw["damaged"][1]


def test_the_elements_of_a_request_run_together_and_are_answered_in_their_order(serve, make_bundle, gate):
    bundle = make_bundle()
    running, client = serve(bundle, batching=Batching(8))
    frames = frames_of(bundle, 6)
    [lane] = running.server.lanes.values()
    first = client.infer(request_for(bundle, frames[0]))
    assert gate.began.wait(10)
    rest = client.infer(request_for(bundle, *frames[1:]))
    eventually(lambda: lane.waiting == 5)
    gate.is_open.set()
    assert np.allclose(found(first.result()), expected(bundle, frames[:1]), atol=1e-5)
    assert np.allclose(found(rest.result()), expected(bundle, frames[1:]), atol=1e-5)
    assert gate.sizes == [1, 5, *6 * [1]]  # the last are those of `expected`


def test_frames_and_symbols_of_a_bundle_run_together(serve, make_bundle):
    bundle = make_bundle()
    _, client = serve(bundle, batching=Batching(8, delay_ms=300))
    [frame] = frames_of(bundle, 1)
    symbols = EdgeHalf(bundle).open(frame)
    too_high = client.infer(symbols_for(bundle, symbols + 8))
    good = [client.infer(request_for(bundle, frame)), client.infer(symbols_for(bundle, np.repeat(symbols, 2, 0)))]
    for future, count in zip(good, (1, 2), strict=True):
        assert np.allclose(found(future.result()), np.repeat(expected(bundle, [frame]), count, 0), atol=1e-5)
    assert too_high.code() is CODES.INVALID_ARGUMENT
    assert "those of this bundle to 7" in too_high.details()
    with pytest.raises(FrameError, match="nothing that this split bundle takes"):
        EdgeHalf(bundle).open(symbols[:, :1])


def test_typed_contents_are_answered_by_typed_contents(serve, make_bundle):
    bundle = make_bundle()
    _, client = serve(bundle)
    frames = frames_of(bundle, 2)
    answer = client.infer(request_for(bundle, *frames, typed=True)).result()
    assert not answer.raw_output_contents
    assert np.allclose(found(answer), expected(bundle, frames), atol=1e-5)
    inputs = [{"name": "frame", "datatype": "BYTES", "shape": [2], "contents": {"bytes_contents": frames}}]
    assert np.allclose(found(client.infer(request_for(bundle, typed=True, inputs=inputs)).result()), found(answer))


def test_what_is_no_request_for_the_model_is_refused_with_a_reason(serve, make_bundle):
    bundle, other = make_bundle(), make_bundle(seed=1)
    _, client = serve(bundle)
    [frame], [foreign_frame] = frames_of(bundle, 1), frames_of(other, 1)
    names = {"frame": oip.model_name(bundle.bundle_id), "symbols": oip.edge_model_name(bundle.bundle_id)}
    tensor = {"name": "frame", "datatype": "BYTES", "shape": [1, 1]}
    for request, code, reason in [
        (request_for(other, foreign_frame), CODES.NOT_FOUND, f"this edge has {names['frame']}, {names['symbols']}"),
        (request_for(bundle, frame, model_version="2"), CODES.NOT_FOUND, "version '2'"),
        (request_for(bundle, foreign_frame), CODES.INVALID_ARGUMENT, "give device and edge the same bundle"),
        (request_for(bundle, frame[:-1]), CODES.INVALID_ARGUMENT, "send it again"),
        (request_for(bundle, b""), CODES.INVALID_ARGUMENT, "cut short"),
        (request_for(bundle, frame, pack(b"\xff" * 500, bundle.bundle_id, Kind.SYMBOLS)), CODES.INVALID_ARGUMENT, ""),
        (request_for(bundle), CODES.INVALID_ARGUMENT, r"takes [N, 1], N 1 to 256"),
        (request_for(bundle, *257 * [frame]), CODES.INVALID_ARGUMENT, "N 1 to 256"),
        (request_for(bundle, frame, inputs=[tensor | {"shape": [1, 2]}]), CODES.INVALID_ARGUMENT, "takes [N, 1]"),
        (request_for(bundle, frame, inputs=[tensor | {"shape": [2, 1]}]), CODES.INVALID_ARGUMENT, "does not hold the 2 elements"),
        (request_for(bundle, frame, inputs=[tensor | {"shape": []}]), CODES.INVALID_ARGUMENT, "takes [N, 1]"),
        (request_for(bundle, frame, inputs=[tensor | {"datatype": "UINT8"}]), CODES.INVALID_ARGUMENT, "is UINT8, not BYTES"),
        (request_for(bundle, frame, inputs=[tensor | {"name": "image"}]), CODES.INVALID_ARGUMENT, "takes one, frame"),
        (request_for(bundle, frame, inputs=[]), CODES.INVALID_ARGUMENT, "takes one, frame"),
        (request_for(bundle, frame, raw_input_contents=[frame, frame]), CODES.INVALID_ARGUMENT, "takes one, frame"),
        (request_for(bundle, frame, outputs=[{"name": "scores"}]), CODES.INVALID_ARGUMENT, "another output than logits"),
        (symbols_for(bundle, np.zeros((1, 2, 4, 5))), CODES.INVALID_ARGUMENT, "takes [N, 2, 4, 4]"),
        (symbols_for(bundle, np.zeros((1,))), CODES.INVALID_ARGUMENT, "takes [N, 2, 4, 4]"),
    ]:
        future = client.infer(request)
        assert future.code() is code, (request, future.details())
        assert reason in future.details()
    garbage = client.channel.unary_unary(oip.path("ModelInfer")).future(b"\xff" * 100, timeout=10)
    assert refused(garbage) == (CODES.INVALID_ARGUMENT, "request of 100 bytes is no ModelInferRequest; check the client's version of the protocol.")
    assert client.channel.unary_unary("/inference.GRPCInferenceService/ModelStreamInfer").future(b"", timeout=10).code() is CODES.UNIMPLEMENTED
    assert np.allclose(found(client.infer(request_for(bundle, frame)).result()), expected(bundle, [frame]), atol=1e-5)


def test_no_request_whatever_is_in_it_makes_the_edge_fail(serve, make_bundle):
    bundle = make_bundle()
    _, client = serve(bundle, limits=Limits(per_second=1e9))
    infer, random = client.channel.unary_unary(oip.path("ModelInfer")), np.random.default_rng(0)
    [frame] = frames_of(bundle, 1)
    requests = [request_for(bundle, frame), request_for(bundle, frame, frame, typed=True), symbols_for(bundle, np.zeros((1, 2, 4, 4)))]
    codes = set()
    for number in range(600):
        data = bytearray(requests[number % 3].SerializeToString())
        for place in random.integers(0, len(data), random.integers(1, 4)):
            data[place] ^= 1 << random.integers(8)
        if number % 4 == 0:
            del data[random.integers(len(data)) :]
        codes.add(infer.future(bytes(data), timeout=20).code())
    assert codes == {CODES.OK, CODES.INVALID_ARGUMENT, CODES.NOT_FOUND}


def test_a_full_queue_is_resource_exhausted_at_once_and_the_device_hears_why(serve, make_bundle, gate, picture):
    bundle = make_bundle()
    running, client = serve(bundle, limits=Limits(waiting=2), batching=Batching(1))
    [frame] = frames_of(bundle, 1)
    [lane] = running.server.lanes.values()
    first = client.infer(request_for(bundle, frame))
    assert gate.began.wait(10)
    second = client.infer(request_for(bundle, frame))
    eventually(lambda: lane.waiting == 1)
    too_many = client.infer(request_for(bundle, frame, frame))  # of which the first finds a place
    assert refused(too_many) == (CODES.RESOURCE_EXHAUSTED, "the edge is busy; try again later.")
    transport = GrpcTransport("127.0.0.1", running.grpc_port)
    assert "busy" in said(transport.request(frame, 10))
    assert "busy" in str(Fallback(DeviceHalf(bundle), transport, 20_000).classify(picture)[1])
    transport.close()
    gate.is_open.set()
    assert len(found(first.result())) == len(found(second.result())) == 1
    client.infer(request_for(bundle, frame)).result()
    assert sum(gate.sizes) == 3, "nobody waits for what is refused"


def test_a_frame_that_waits_too_long_is_resource_exhausted(serve, make_bundle, gate):
    bundle = make_bundle()
    running, client = serve(bundle, limits=Limits(patience_s=0.1), batching=Batching(1))
    [frame] = frames_of(bundle, 1)
    first = client.infer(request_for(bundle, frame))
    assert gate.began.wait(10)
    second = client.infer(request_for(bundle, frame))
    eventually(lambda: [lane.waiting for lane in running.server.lanes.values()] == [1])
    time.sleep(0.2)
    gate.is_open.set()
    assert len(found(first.result())) == 1
    assert refused(second) == (CODES.RESOURCE_EXHAUSTED, "the edge is busy; try again later.")


def test_more_frames_a_second_than_the_limit_are_resource_exhausted_whichever_way_they_come(serve, make_bundle):
    bundle = make_bundle()
    running, client = serve(bundle, limits=Limits(per_second=3))
    [frame] = frames_of(bundle, 1)
    client.infer(request_for(bundle, frame, frame)).result()
    with contextlib.closing(TcpTransport("127.0.0.1", running.port)) as tcp:
        logits(tcp.request(frame))
    future = client.infer(request_for(bundle, frame, frame))
    assert future.code() is CODES.RESOURCE_EXHAUSTED
    assert "3 frames a second from 127.0.0.1" in future.details()


def test_calls_of_any_kind_are_limited(serve, make_bundle):
    running, client = serve(make_bundle(), limits=Limits(per_second=5))
    infer, live = (client.channel.unary_unary(oip.path(name)) for name in ("ModelInfer", "ServerLive"))
    codes = {}
    for name, call, request in (("bad", infer, b"\xff"), ("live", live, b"")):
        running.call(running.server.buckets.clear)
        codes[name] = {future.code() for future in [call.future(request, timeout=20) for _ in range(50)]}
    assert codes == {"bad": {CODES.INVALID_ARGUMENT, CODES.RESOURCE_EXHAUSTED}, "live": {CODES.OK, CODES.RESOURCE_EXHAUSTED}}


def test_what_is_answered_and_what_is_refused_is_counted(serve, make_bundle):
    bundle, other = make_bundle(), make_bundle(seed=1)
    running, client = serve(bundle, hello=Hello("ant", alone=4))
    frames, tally = frames_of(bundle, 3), running.server.tally
    client.call("ServerLive")
    assert tally.devices["ant"].alone == 0
    client.infer(request_for(bundle, *frames)).result()
    assert (tally.devices["ant"].answered, tally.served[bundle.bundle_id].answered, tally.devices["ant"].alone) == (3, 3, 4)
    infer = client.channel.unary_unary(oip.path("ModelInfer"))
    for count, call in enumerate([lambda: client.infer(request_for(bundle)), lambda: infer.future(b"\xff"), lambda: client.infer(request_for(bundle, b""))], 1):
        assert call().code() is CODES.INVALID_ARGUMENT
        assert tally.refusals["frame"] == count
    assert client.infer(request_for(other, *frames)).code() is CODES.NOT_FOUND
    assert (tally.refusals["bundle"], sum(tally.refusals.values())) == (1, 4)


def test_frames_and_messages_above_the_limit_are_refused(serve, make_bundle):
    bundle = make_bundle()
    _, client = serve(bundle, limits=Limits(payload_bytes=1_000))
    [frame] = frames_of(bundle, 1)
    larger, message = (client.infer(request_for(bundle, pack(bytes(size), bundle.bundle_id, Kind.SYMBOLS))) for size in (1_001, 10_000))
    assert larger.code() is CODES.INVALID_ARGUMENT
    assert "send at most 1000" in larger.details()
    assert message.code() is CODES.RESOURCE_EXHAUSTED
    assert "larger than max" in message.details()
    client.infer(request_for(bundle, frame)).result()


def test_more_calls_at_once_than_the_limit_are_refused(serve, make_bundle, gate):
    bundle = make_bundle()
    running, client = serve(bundle, limits=Limits(connections=2))
    [frame] = frames_of(bundle, 1)
    calls = [client.infer(request_for(bundle, frame)) for _ in range(2)]
    assert gate.began.wait(10)
    eventually(lambda: sum(gate.sizes) + sum(lane.waiting for lane in running.server.lanes.values()) == 2)
    assert client.infer(request_for(bundle, frame)).code() is CODES.RESOURCE_EXHAUSTED
    gate.is_open.set()
    for call in calls:
        call.result()


HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # settings, none of them changed


@pytest.mark.parametrize(("limits", "says"), [(Limits(partial_s=0.2), b""), (Limits(idle_s=0.2), HELLO)], ids=["at all", "more"])
def test_a_connection_that_says_nothing_is_closed(serve, make_bundle, limits, says):
    running, _ = serve(make_bundle(), limits=limits)
    with socket.create_connection(("127.0.0.1", running.grpc_port), 10) as connection:
        connection.sendall(says)
        while connection.recv(1 << 16):  # the edge's own settings, and its end
            pass


def test_more_connections_than_the_limit_are_closed(serve, make_bundle):
    running, _ = serve(make_bundle(), limits=Limits(connections=2))
    with contextlib.ExitStack() as stack:
        first, second, third = (stack.enter_context(socket.create_connection(("127.0.0.1", running.grpc_port), 10)) for _ in range(3))
        assert (bool(first.recv(1)), bool(second.recv(1)), third.recv(1)) == (True, True, b"")


def test_a_call_that_is_given_up_is_not_run(serve, make_bundle, gate):
    bundle = make_bundle()
    running, client = serve(bundle, batching=Batching(1))
    [frame] = frames_of(bundle, 1)
    [lane] = running.server.lanes.values()
    first = client.infer(request_for(bundle, frame))
    assert gate.began.wait(10)
    given_up = client.infer(request_for(bundle, frame, frame))
    eventually(lambda: lane.waiting == 2)
    given_up.cancel()
    last = client.infer(request_for(bundle, frame))
    eventually(lambda: lane.waiting == 3)
    gate.is_open.set()
    assert len(found(first.result())) == len(found(last.result())) == 1
    assert sum(gate.sizes) == 2


def test_an_edge_half_that_fails_is_internal_and_the_next_call_may_do_better(serve, make_bundle, monkeypatch):
    bundle = make_bundle()
    _, client = serve(bundle)
    [frame] = frames_of(bundle, 1)
    monkeypatch.setattr(EdgeHalf, "run", lambda half, batch: 1 / 0)
    future = client.infer(request_for(bundle, frame))
    assert future.code() is CODES.INTERNAL
    assert "look at the edge" in future.details()
    monkeypatch.setattr(EdgeHalf, "run", RUN)
    client.infer(request_for(bundle, frame)).result()


def test_bundles_that_come_and_go_are_models_that_come_and_go(serve, make_bundle):
    bundle, other = make_bundle(), make_bundle("edge-only")
    running, client = serve(bundle)

    def ready() -> list[bool]:
        names = [name(each.bundle_id) for each in (bundle, other) for name in (oip.model_name, oip.edge_model_name)]
        return [client.call("ModelReady", name=name).ready for name in names]

    assert ready() == [True, True, False, False]
    running.call(running.server.add, EdgeHalf(other))
    assert ready() == [True, True, True, False]
    assert client.call("ModelMetadata", name=oip.model_name(other.bundle_id)).inputs[0].datatype == "BYTES"
    client.infer(request_for(other, *frames_of(other, 1))).result()
    for each in (bundle, other):
        running.call(running.server.remove, each.bundle_id)
    assert ready() == 4 * [False]
    assert not client.call("ServerReady").ready
    assert client.call("ServerLive").live
    assert client.infer(request_for(bundle, *frames_of(bundle, 1))).details().endswith("this edge has none.")


def test_an_edge_that_stops_answers_what_is_there_and_refuses_the_rest(serve, make_bundle, gate):
    bundle = make_bundle()
    running, client = serve(bundle, batching=Batching(1))
    frames = frames_of(bundle, 2)
    [lane] = running.server.lanes.values()
    first = client.infer(request_for(bundle, frames[0]))
    assert gate.began.wait(10)
    second = client.infer(request_for(bundle, frames[1]))
    eventually(lambda: lane.waiting == 1)
    running.call(running.server.stop)
    transport = GrpcTransport("127.0.0.1", running.grpc_port)
    for ask in (lambda: client.infer(request_for(bundle, frames[0]), 0.5).code(), lambda: unreachable(transport, frames[0])):
        eventually(lambda: ask() is CODES.UNAVAILABLE)  # noqa: B023
    gate.is_open.set()
    assert np.allclose(found(first.result()), expected(bundle, frames[:1]), atol=1e-5)
    assert np.allclose(found(second.result()), expected(bundle, frames[1:]), atol=1e-5)


def unreachable(transport: GrpcTransport, frame: bytes) -> grpc.StatusCode | None:
    try:
        transport.request(frame, 0.5)
    except EdgeUnreachable as error:
        return error.__cause__.code()
    return None


def test_an_edge_that_is_told_twice_to_stop_stops_at_once(serve, make_bundle, gate):
    bundle = make_bundle()
    running, client = serve(bundle)
    call = client.infer(request_for(bundle, *frames_of(bundle, 1)))
    assert gate.began.wait(10)
    running.call(running.server.stop)
    running.call(running.server.stop)
    assert call.code() in (CODES.UNAVAILABLE, CODES.CANCELLED)
    gate.is_open.set()


def test_who_shows_no_token_is_told_why_and_finds_out_nothing(serve, make_bundle, key_folder):
    bundle, ant = make_bundle(), DeviceKeys(key_folder / "ant")
    running, client = serve(bundle, device=ant, hello=Hello("bee", token=ant.token), keys=key_folder / "edge")
    [frame] = frames_of(bundle, 1)
    for name in ("ServerReady", "ServerMetadata", "ModelMetadata"):
        with pytest.raises(grpc.RpcError, match="token is ant's, not bee's"):
            client.call(name)
    code, why = refused(client.infer(request_for(bundle, frame)))
    assert code == CODES.UNAUTHENTICATED
    assert "token is ant's" in why
    assert (running.server.tally.refusals["keys"], running.server.tally.served) == (4, {})
    client.metadata = Hello("ant", token=ant.token).to_metadata()
    client.infer(request_for(bundle, frame)).result()


def test_a_token_is_not_enough_without_its_devices_certificate(serve, make_bundle, key_folder):
    bundle, ant, bee = make_bundle(), DeviceKeys(key_folder / "ant"), DeviceKeys(key_folder / "bee")
    _, client = serve(bundle, device=bee, hello=Hello("ant", token=ant.token), keys=key_folder / "edge")
    code, why = refused(client.infer(request_for(bundle, *frames_of(bundle, 1))))
    assert (code, "certificate is that of 'bee', not of ant" in why) == (CODES.UNAUTHENTICATED, True)


@pytest.mark.parametrize("metadata", [{"coinfer-device": "two words"}, {"coinfer-device": "ant", "coinfer-alone": "-1"}, {"coinfer-alone": "9" * 40}])
def test_metadata_that_is_none_of_ours_is_refused(serve, make_bundle, metadata):
    bundle = make_bundle()
    _, client = serve(bundle)
    client.metadata = list(metadata.items())
    [frame] = frames_of(bundle, 1)
    assert refused(client.infer(request_for(bundle, frame)))[0] == CODES.INVALID_ARGUMENT


def test_a_port_in_use_is_one_sentence(serve, make_bundle):
    bundle = make_bundle()
    running, _ = serve(bundle)
    with pytest.raises(CoinferError, match=rf"cannot listen on 127\.0\.0\.1:{running.grpc_port} for gRPC; choose another port"):
        serve_edge(bundle.path, fronts=[GrpcFront("127.0.0.1", running.grpc_port)], signals=())
    code = "import sys; from pipeline.cli import main; sys.argv[1:] = ['edge', '--port', '0', '--bundle', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", code, str(bundle.path), "--grpc-port", str(running.grpc_port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr


def test_without_the_extra_the_commands_say_what_to_install(make_bundle):
    code = """
import sys
sys.modules["grpc"] = None
from pipeline.cli import main
for arguments in (["edge", "--grpc-port", "0"], ["device", "--edge", "grpc://127.0.0.1:1", "--source", "photos"]):
    sys.argv[1:] = [*arguments, "--bundle", sys.argv[-1]]
    try:
        main()
    except SystemExit as end:
        assert end.code == 1
"""
    done = subprocess.run([sys.executable, "-c", code, str(make_bundle().path)], capture_output=True, text=True, timeout=60, check=False)
    sentence = "coinfer: this command needs the package grpc, which is not installed; install the edge extra: pip install 'coinfer[edge]'.\n"
    assert (done.returncode, done.stderr) == (0, 2 * sentence)
