"""Device and edge half together: in one process, in two, and with what a hostile or mistaken peer may send."""

import io
import math
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pipeline.costs.link import Link, wire_bytes
from pipeline.errors import BundleError, CoinferError, DataError, FrameError
from pipeline.runtime.bundle import DEVICE, DEVICE_ONLY, EDGE
from pipeline.runtime.coder import as_received, build_embedded_tables
from pipeline.runtime.device import PARTS, DeviceHalf
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.frame import Kind, pack, unpack
from pipeline.runtime.images import encode_image, open_encoded
from pipeline.runtime.server import edge_process, serve
from pipeline.runtime.transport import EdgeUnreachable, LoopbackTransport, TcpTransport


def answer_of(bundle, name, batch):
    session = bundle.session(name, 1)
    return session.run(None, {session.get_inputs()[0].name: batch})[0]


def test_a_split_gives_the_logits_of_its_two_halves(make_bundle, picture):
    bundle = make_bundle()
    answer = DeviceHalf(bundle).classify(picture, LoopbackTransport(EdgeHalf(bundle)))
    symbols = answer_of(bundle, DEVICE, bundle.preprocessing.tensor(picture[None]))
    assert np.array_equal(answer.logits, answer_of(bundle, EDGE, symbols)[0])
    assert answer.path == "split"
    assert tuple(answer.parts) == PARTS
    assert answer.parts["total_ms"] == pytest.approx(sum(answer.parts[name] for name in PARTS[:-1]))
    assert min(answer.parts.values()) > 0


@pytest.fixture
def several_points(make_bundle):
    training = np.random.default_rng(0).integers(0, 256, (10, 2, 4, 4)).astype(np.uint8)
    return make_bundle(points=[build_embedded_tables(training, 2, 3), build_embedded_tables(training, 1, 2)])


def test_one_bundle_serves_several_operating_points(several_points, picture):
    edge = LoopbackTransport(EdgeHalf(several_points))
    symbols = answer_of(several_points, DEVICE, several_points.preprocessing.tensor(picture[None]))
    half, sizes = DeviceHalf(several_points), []
    for half.point, tables in enumerate(several_points.points):
        answer = half.classify(picture, edge)
        assert np.array_equal(answer.logits, answer_of(several_points, EDGE, as_received(symbols, tables))[0])
        sizes.append(answer.frame_bytes)
    assert sizes[1] < sizes[0]
    assert DeviceHalf(several_points, point=1).run(picture)[0] == half.run(picture)[0]


def test_points_that_are_not_there_are_refused(several_points, picture):
    with pytest.raises(BundleError, match="has operating points 0 to 1, not 2; choose one of them"):
        DeviceHalf(several_points, point=2)
    half = DeviceHalf(several_points)
    with pytest.raises(BundleError, match="has operating points 0 to 1, not -1"):
        half.point = -1
    payload = unpack(half.run(picture)[0]).payload
    for wrong in (b"", bytes([2]) + payload[1:], bytes([255])):
        reply, _ = EdgeHalf(several_points).handle(pack(wrong, several_points.bundle_id, Kind.SYMBOLS))
        assert unpack(reply).kind is Kind.ERROR
        assert b"names no operating point of this bundle, which has 2" in unpack(reply).payload


def test_edge_only_lossless_gives_the_logits_of_the_image_itself(make_bundle, picture):
    bundle = make_bundle("edge-only")
    answer = DeviceHalf(bundle).classify(picture, LoopbackTransport(EdgeHalf(bundle)))
    assert np.array_equal(answer.logits, answer_of(bundle, EDGE, bundle.preprocessing.tensor(picture[None]))[0])
    assert answer.frame_bytes == len(encode_image(picture, "webp", 100)) + 13


def test_edge_only_sends_less_at_a_lower_quality(make_bundle, picture):
    sizes = [len(DeviceHalf(make_bundle("edge-only", quality=quality)).run(picture)[0]) for quality in (100, 60, 5)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


@pytest.mark.parametrize(("image_format", "quality"), [("jpeg", 60), ("jpeg-bare", 60), ("png", 100)])
def test_edge_only_sends_what_the_candidate_says(make_bundle, picture, image_format, quality):
    bundle = make_bundle("edge-only", quality=quality, image_format=image_format)
    answer = DeviceHalf(bundle).classify(picture, LoopbackTransport(EdgeHalf(bundle)))
    file = encode_image(picture, image_format, quality)
    assert answer.frame_bytes == len(file) + 13
    arrived = bundle.preprocessing.pixels(open_encoded(file, image_format, quality))
    assert np.array_equal(arrived, picture) == (image_format == "png")
    assert np.array_equal(answer.logits, answer_of(bundle, EDGE, bundle.preprocessing.tensor(arrived[None]))[0])


def test_device_only_answers_alone_and_sends_nothing(make_bundle, picture):
    bundle = make_bundle("device-only")
    answer = DeviceHalf(bundle).classify_locally(picture)
    assert np.array_equal(answer.logits, answer_of(bundle, DEVICE_ONLY, bundle.preprocessing.tensor(picture[None]))[0])
    assert (answer.frame_bytes, answer.parts["link_ms"]) == (0, 0)
    with pytest.raises(BundleError, match=r"device-only bundle and has no device\.onnx"):
        DeviceHalf(bundle).run(picture)
    with pytest.raises(BundleError, match=r"device-only bundle and has no edge\.onnx"):
        EdgeHalf(bundle)


def test_a_picture_is_preprocessed_by_the_bundles_rule(make_bundle):
    bundle = make_bundle()
    photo = Image.effect_noise((40, 30), 80).convert("RGB")
    device = DeviceHalf(bundle)
    assert device.run(photo)[0] == device.run(bundle.preprocessing.pixels(photo))[0]
    with pytest.raises(DataError, match=r"uint8 \(3, 8, 8\)"):
        device.run(np.zeros((3, 9, 9), np.uint8))


def test_halves_of_different_bundles_refuse_each_other(make_bundle, picture):
    ours, theirs = make_bundle(seed=0), make_bundle(seed=1)
    with pytest.raises(FrameError, match=f"the edge refused: frame is for bundle {ours.bundle_id.hex()}, this edge runs {theirs.bundle_id.hex()}"):
        DeviceHalf(ours).classify(picture, LoopbackTransport(EdgeHalf(theirs)))


class Replies:
    """An edge that answers whatever it is told to."""

    alone, message_bytes = 0, staticmethod(len)

    def __init__(self, reply: bytes) -> None:
        self.reply = reply

    def request(self, frame: bytes, timeout_s: float) -> bytes:
        return self.reply

    def close(self) -> None:
        pass


NO_ANSWERS = [(math.nan, 0, 0, 0, 0), (0, math.inf, 0, 0, 0), (-1, 0, 0, 0, 0), (0, 0, 1, math.nan, 0), (0, 0, 0, 0, math.inf), (0, 0, -math.inf, 0, 0)]


def test_a_device_refuses_replies_that_cannot_be_its_own(make_bundle, picture):
    bundle = make_bundle()
    device = DeviceHalf(bundle)
    for reply, message in (
        (pack(bytes(20), b"abcd", Kind.REPLY), "same bundle"),
        (pack(bytes(20), bundle.bundle_id, Kind.IMAGE), "same bundle"),
        (pack(bytes(24), bundle.bundle_id, Kind.REPLY), "3 classes"),
        *((pack(struct.pack("<5f", *numbers), bundle.bundle_id, Kind.REPLY), "no numbers") for numbers in NO_ANSWERS),
        (pack(b"\xff\xfe", bundle.bundle_id, Kind.ERROR), "the edge refused"),
        (b"noise", "cut short"),
    ):
        with pytest.raises(FrameError, match=message):
            device.classify(picture, Replies(reply))


def test_a_device_repeats_no_more_of_a_refusal_than_a_record_can_hold(make_bundle, picture):
    bundle = make_bundle()
    with pytest.raises(FrameError) as refused:
        DeviceHalf(bundle).classify(picture, Replies(pack(b"no\n\x1b[2J" + 100_000 * b"no", bundle.bundle_id, Kind.ERROR)))
    assert str(refused.value).startswith("the edge refused: no  [2Jnono")
    assert len(str(refused.value)) < 600
    assert str(refused.value).isprintable()


def test_a_bundle_that_sends_what_this_version_does_not_know_is_refused(make_bundle, picture):
    with pytest.raises(BundleError, match="sends images as avif, this version knows webp, jpeg, jpeg-bare, png"):
        DeviceHalf(make_bundle("edge-only", image_format="avif")).run(picture)


@pytest.mark.parametrize(("kind", "image_format"), [("split", "webp"), ("edge-only", "webp"), ("edge-only", "jpeg"), ("edge-only", "jpeg-bare")])
def test_an_edge_half_answers_nonsense_with_an_error_frame(make_bundle, picture, kind, image_format):
    bundle = make_bundle(kind, quality=60, image_format=image_format)
    edge = EdgeHalf(bundle)
    large = io.BytesIO()
    Image.new("RGB", (600, 600)).save(large, "WEBP")
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    webp = encode_image(picture, "webp", 100)
    for payload in (b"", b"\0", b"\xff" * 500, large.getvalue(), png.getvalue(), webp[: len(webp) // 2], webp[:12] + b"\xff" * 40):
        for sent in (Kind.SYMBOLS, Kind.IMAGE, Kind.REPLY, Kind.ERROR):
            reply = unpack(edge.handle(pack(payload, bundle.bundle_id, sent))[0])
            if payload or sent is not Kind.SYMBOLS or kind == "edge-only":  # no bytes at all are a valid code
                assert reply.kind is Kind.ERROR
                assert reply.payload


def test_two_processes_over_tcp_with_a_link_survive_garbage_and_refuse_another_bundle(make_bundle, picture):
    bundle, other = make_bundle(), make_bundle(seed=1)
    expected = DeviceHalf(bundle).classify(picture, LoopbackTransport(EdgeHalf(bundle)))
    with edge_process(bundle) as port:
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\xc1" * 9, bytes(1000), pack(b"x", bundle.bundle_id, Kind.SYMBOLS)[:-1] + b"\0", b"\xc1"):
            with socket.create_connection(("127.0.0.1", port), 10) as client:
                client.sendall(garbage)
                received = b""
                try:
                    client.shutdown(socket.SHUT_WR)
                    while chunk := client.recv(4096):
                        received += chunk
                except OSError:  # it has closed already
                    pass
                assert not received or unpack(received).kind is Kind.ERROR

        transport = TcpTransport("127.0.0.1", port, Link(rate_mbps=1, rtt_ms=4))
        with pytest.raises(FrameError, match="give device and edge the same bundle"):
            DeviceHalf(other).classify(picture, transport)
        answer = DeviceHalf(bundle).classify(picture, transport)
        assert np.array_equal(answer.logits, expected.logits)
        assert answer.frame_bytes == expected.frame_bytes
        assert answer.parts["link_ms"] >= 4 + 8 * wire_bytes(answer.frame_bytes) / 1e3
        transport.close()


def test_an_edge_process_that_cannot_start_is_one_sentence(make_bundle):
    with pytest.raises(CoinferError, match=r"did not start: .*device-only bundle and has no edge\.onnx"), edge_process(make_bundle("device-only")):
        pass


def test_a_port_in_use_is_one_sentence(make_bundle):
    bundle = make_bundle()
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(CoinferError, match="cannot listen"):
        serve(bundle.path, "127.0.0.1", server.getsockname()[1])
    with pytest.raises(CoinferError, match="cannot listen"):
        serve(bundle.path, "127.0.0.1", 70000)


def test_the_edge_is_unreachable_once_its_process_has_ended(make_bundle, picture):
    bundle = make_bundle()
    with edge_process(bundle) as port:
        transport = TcpTransport("127.0.0.1", port)
        DeviceHalf(bundle).classify(picture, transport)
    with pytest.raises(EdgeUnreachable, match="does not answer"):
        DeviceHalf(bundle).classify(picture, transport)


def test_the_runtime_never_imports_what_a_device_does_not_have():
    code = (
        "import sys, pipeline.runtime.records, pipeline.runtime.edge, pipeline.runtime.relay\n"
        "print(sorted({'torch', 'onnx', 'mlflow', 'lightning', 'optuna', 'matplotlib', 'scipy', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
