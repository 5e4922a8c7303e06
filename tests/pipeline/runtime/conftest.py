"""Bundles of tiny hand-made ONNX halves, so that nothing here needs torch."""

import asyncio
import contextlib
import threading
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.runtime.bundle import DEVICE, DEVICE_ONLY, EDGE, FILES, Bundle, write_bundle
from pipeline.runtime.coder import build_tables
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.grpc_front import GrpcFront
from pipeline.runtime.guard import EdgeKeys
from pipeline.runtime.hello import Hello
from pipeline.runtime.keymaking import make_keys
from pipeline.runtime.lane import Batching
from pipeline.runtime.preprocess import Preprocessing
from pipeline.runtime.server import EdgeServer, Limits
from pipeline.runtime.shelf import Shelf
from tests.pipeline.runtime.calls import Client
from tests.pipeline.runtime.foreign import Foreign
from tests.pipeline.runtime.serving import Gate, Running

SIZE, CODE, BITS, CLASSES = 8, (2, 4, 4), 3, ["ant", "bee", "cat"]


def model(nodes, inputs, outputs, **weights) -> bytes:
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "tiny", [helper.make_tensor_value_info(*inputs)], [helper.make_tensor_value_info(*outputs)], initializers)
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(built)
    return built.SerializeToString()


def halves(seed: int) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    image = ("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    symbols = ("symbols", TensorProto.UINT8, ["batch", *CODE])
    logits = ("logits", TensorProto.FLOAT, ["batch", len(CLASSES)])

    def matrix(*shape: int):
        return rng.normal(size=shape).astype(np.float32)

    node = helper.make_node
    top = np.float32(2**BITS - 1)
    pool = node("AveragePool", ["image"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2])
    encoder = [
        node("Conv", ["pooled", "w"], ["code"]),
        node("Sigmoid", ["code"], ["bounded"]),
        node("Mul", ["bounded", "top"], ["scaled"]),
        node("Round", ["scaled"], ["rounded"]),
        node("Cast", ["rounded"], ["symbols"], to=TensorProto.UINT8),
    ]
    decoder = [
        node("Cast", ["symbols"], ["levels"], to=TensorProto.FLOAT),
        node("Div", ["levels", "top"], ["flat_in"]),
        node("Flatten", ["flat_in"], ["flat"]),
        node("MatMul", ["flat", "w"], ["logits"]),
    ]
    classifier = [node("Flatten", ["image"], ["flat"]), node("MatMul", ["flat", "w"], ["logits"])]
    return {
        DEVICE: model([pool, *encoder], image, symbols, w=matrix(CODE[0], 3, 1, 1), top=top),
        EDGE: model(decoder, symbols, logits, w=matrix(int(np.prod(CODE)), len(CLASSES)), top=top),
        DEVICE_ONLY: model(classifier, image, logits, w=matrix(3 * SIZE * SIZE, len(CLASSES))),
    }


def bundle_in(folder: Path, kind: str = "split", seed: int = 0, quality: int = 100, image_format: str = "webp", **changes) -> Bundle:
    files = halves(seed)
    if kind == "edge-only":
        files[EDGE] = files[DEVICE_ONLY]
    training = np.random.default_rng(seed).integers(0, 2**BITS, (10, *CODE)).astype(np.uint8)
    arguments = {
        "kind": kind,
        "candidate": {"cut": "layer1", "quality": quality if kind == "edge-only" else None, "image_format": image_format},
        "plan": {},
        "preprocessing": Preprocessing(SIZE),
        "classes": CLASSES,
        "files": {name: files[name] for name in FILES[kind] if name in files},
        "points": [build_tables(training, BITS)] if kind == "split" else [],
        "extra": {"opset": 18},
    }
    return write_bundle(folder / f"{kind}-{seed}", **{**arguments, **changes})


@pytest.fixture
def make_bundle(tmp_path: Path):
    """make_bundle(kind="split", seed=0, quality=100, image_format="webp") -> Bundle"""
    return partial(bundle_in, tmp_path)


@pytest.fixture(scope="module")
def make_module_bundle(tmp_path_factory: pytest.TempPathFactory):
    """`make_bundle` for fixtures of a whole module."""
    return partial(bundle_in, tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def picture() -> np.ndarray:
    """uint8 (3, S, S)"""
    return np.random.default_rng(7).integers(0, 256, (3, SIZE, SIZE)).astype(np.uint8)


@pytest.fixture
def run():
    """run(bundle or folder, batching=, limits=, slowdown=, keys=, fronts=) -> Running, drained with the test."""
    ends = []

    def start(path, batching=Batching(), limits=Limits(), slowdown=1.0, keys=None, fronts=()) -> Running:  # noqa: B008
        server, ports, known = EdgeServer(batching, limits, EdgeKeys(keys) if keys else None, fronts), [], threading.Event()
        shelf = Shelf(getattr(path, "path", path), slowdown=slowdown)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(shelf, "127.0.0.1", 0, lambda port: (ports.append(port), known.set()), ())))
        thread.start()
        ends.append((server, thread))
        assert known.wait(10)
        return Running(server, ports[0])

    yield start
    for server, thread in ends:
        with contextlib.suppress(RuntimeError):  # it has ended with the test
            server.loop.call_soon_threadsafe(server.stop)
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def serve(run):
    """serve(bundle, device=, hello=, ...) -> Running and a Client, which has the keys of `device`"""
    clients = []

    def start(bundle, device=None, hello=Hello(), **options):  # noqa: B008
        ports = []
        running = run(bundle, fronts=[GrpcFront("127.0.0.1", 0, announce=ports.append)], **options)
        clients.append(Client(ports[0], device, hello))
        running.grpc_port = ports[0]
        return running, clients[-1]

    yield start
    for client in clients:
        client.channel.close()


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    return Foreign(tmp_path_factory.mktemp("foreign") / "environment")


@pytest.fixture
def key_folder(tmp_path):
    """Keys of an edge and of the devices ant and bee."""
    make_keys(tmp_path / "keys", ["edge.example"], ["ant", "bee"])
    return tmp_path / "keys"


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(EdgeHalf, "run", lambda half, batch: gate.run(half, batch))
    yield gate
    gate.is_open.set()
