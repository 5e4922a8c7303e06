"""Replicas of the edge half on a real Ray cluster of one machine, behind Serve's own gRPC proxy."""

import os
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from pipeline.errors import BundleError
from pipeline.runtime import oip
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.dial import dial
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.fallback import Fallback
from pipeline.runtime.signing import sign
from tests.pipeline.runtime.conftest import CLASSES, CODE, SIZE
from tests.pipeline.runtime.serving import frames_of, logits, said

ray = pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
ray_cluster = pytest.importorskip("benchmarks.ray_cluster", reason="ray is not installed (extra `cluster`)")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),  # ray leaves its sockets and logs open
    pytest.mark.filterwarnings("ignore:Tip.*RAY_ACCEL_ENV_VAR:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`:DeprecationWarning"),  # ray's own models, on import
]
ROOT = Path(__file__).resolve().parents[3]
NAME = f"coinfer-{os.getpid()}"


@pytest.fixture(scope="module")
def bundle(make_module_bundle):
    return make_module_bundle()


@pytest.fixture(scope="module")
def signed_by(bundle, tmp_path_factory):
    """Whose signature the bundle has."""
    key, folder = Ed25519PrivateKey.generate(), tmp_path_factory.mktemp("release")
    (folder / "release.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / "release.pem").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    sign(bundle, folder / "release.key")
    return folder / "release.pem"


@pytest.fixture(scope="module")
def address(bundle, signed_by):
    """Of the proxy in front of two replicas."""
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    from pipeline.runtime.ray_edge import Settings, app

    functions, http = ["pipeline.runtime.ray_edge.add_to_server"], HTTPOptions(host="127.0.0.1", port=ray_cluster.free_port())
    options = gRPCOptions(port=ray_cluster.free_port(), grpc_servicer_functions=functions)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("PYTHONPATH", str(ROOT))
        try:
            head = stack.enter_context(ray_cluster.ray_cluster(cpus=2, nodes_beside=0))
        except TimeoutError as error:
            pytest.skip(str(error))
        ray.init(head, logging_level="ERROR", log_to_driver=False)
        serve.start("HeadOnly", http_options=http, grpc_options=options)
        serve.run(app(Settings(bundle=bundle.path, replicas=2, signed_by=signed_by)), name=NAME)
        yield f"127.0.0.1:{options.port}"
        serve.shutdown()


@pytest.fixture
def call(address):
    """call(method, request) -> response, as any client of the protocol would."""
    with grpc.insecure_channel(address) as channel:

        def call(method, **fields):
            answer = channel.unary_unary(oip.path(method))(oip.message(f"{method}Request")(**fields).SerializeToString(), timeout=20)
            return oip.message(f"{method}Response").FromString(answer)

        yield call


def test_answers_are_those_of_the_edge_half(address, bundle):
    transport, half = dial(f"grpc://{address}"), EdgeHalf(bundle)
    frames = frames_of(bundle, 8)
    for frame in frames:
        assert (logits(transport.request(frame, 20)) == logits(half.handle(frame)[0])).all()
    assert "its checksum does not match" in said(transport.request(frames[0][:-1] + bytes([frames[0][-1] ^ 1]), 20))
    transport.close()


def test_clients_of_the_protocol_learn_what_is_served(call, bundle):
    name = oip.model_name(bundle.bundle_id)
    assert call("ServerLive").live
    assert call("ServerReady").ready
    assert call("ModelReady", name=name).ready
    assert call("ServerMetadata").name == "coinfer"
    (given,) = call("ModelMetadata", name=name).outputs
    assert (given.name, given.datatype, list(given.shape)) == ("logits", "FP32", [-1, len(CLASSES)])
    (taken,) = call("ModelMetadata", name=f"{name}-edge").inputs
    assert (taken.name, taken.datatype, list(taken.shape)) == ("symbols", "UINT8", [-1, *CODE])
    with pytest.raises(grpc.RpcError) as refused:
        call("ModelInfer", model_name="resnet")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert name in refused.value.details()


def test_no_image_is_lost_when_a_replica_dies_and_it_comes_back(address, bundle):
    half, rng = EdgeHalf(bundle), np.random.default_rng(3)
    pictures = rng.integers(0, 256, (16, 3, SIZE, SIZE)).astype(np.uint8)
    split = [logits(half.handle(DeviceHalf(bundle).run(picture)[0])[0]) for picture in pictures]
    alone = [DeviceHalf(bundle).classify_locally(picture).logits for picture in pictures]
    is_over, asked, answers, reasons = threading.Event(), [], [], []

    def device(number: int) -> None:
        transport = dial(f"grpc://{address}")
        fallback = Fallback(DeviceHalf(bundle), transport, 10_000)
        while not is_over.is_set():
            which = (number + len(asked)) % len(pictures)
            asked.append(which)
            answer, reason = fallback.classify(pictures[which])
            answers.append((which, answer))
            reasons.extend([reason] if reason else [])
            time.sleep(0.01)
        transport.close()

    devices = [threading.Thread(target=device, args=(number,)) for number in range(6)]
    for each in devices:
        each.start()
    try:
        before = replicas()
        assert len(before) == 2
        in_time(lambda: len(answers) > 50)
        killed = before.pop()
        os.kill(killed, signal.SIGKILL)
        in_time(lambda: len(replicas() - {killed}) == 2)
        came_s, count = time.monotonic(), len(answers)
        in_time(lambda: len(answers) > count + 50 and time.monotonic() > came_s + 0.5)
    finally:
        is_over.set()
        for each in devices:
            each.join(30)
    assert len(answers) == len(asked)
    for which, answer in answers:
        assert answer.logits == pytest.approx((alone if answer.path == "device-only" else split)[which], rel=1e-5, abs=1e-6)
    assert all(answer.path == "split" for _, answer in answers[-20:])
    assert all("The actor died" in reason for reason in reasons), "only what was in the hands of the replica"


def in_time(check) -> None:
    """Ray takes its time to start a process, ten seconds of an idle machine."""
    end_s = time.monotonic() + 120
    while not check():
        assert time.monotonic() < end_s
        time.sleep(0.1)


def replicas() -> set[int]:
    """Process ids."""
    found = set()
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cmdline").read_bytes().startswith(f"ray::ServeReplica:{NAME}:".encode()):
                found.add(int(process.name))
        except OSError:  # it has ended
            pass
    return found


def test_a_bundle_without_an_edge_half_is_refused_before_anything_starts(make_bundle):
    from pipeline.runtime.ray_edge import Settings, app

    with pytest.raises(BundleError, match=r"has no edge\.onnx"):
        app(Settings(bundle=make_bundle("device-only").path))


def test_a_bundle_that_nobody_signed_is_refused_before_anything_starts(make_bundle, signed_by):
    from pipeline.runtime.ray_edge import Settings, app

    with pytest.raises(BundleError, match="sign the bundle with `coinfer bundle sign`"):
        app(Settings(bundle=make_bundle().path, signed_by=signed_by))
