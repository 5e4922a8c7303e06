"""Model repositories in a real Triton server, that of the wheel of nvidia-pytriton; its ONNX Runtime backend alone is not in there (see triton_onnx.py)."""

import json
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.errors import BundleError, CoinferError
from pipeline.runtime.bundle import CODEC, EDGE
from pipeline.runtime.dial import dial
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.frame import Kind, pack, unpack
from pipeline.runtime.lane import Batching
from pipeline.runtime.triton import write_repository
from tests.pipeline.runtime.conftest import CLASSES, CODE, SIZE
from tests.pipeline.runtime.serving import frames_of, logits

ROOT = Path(__file__).resolve().parents[3]
# This Triton is older than its support of numpy 2.
WHEELS = ["nvidia-pytriton==0.7.0", "numpy==1.26.4", f"onnxruntime=={version('onnxruntime')}", f"pillow=={version('pillow')}"]
LIBRARIES = Path(sysconfig.get_config_var("LIBDIR"))
ON_X86_LINUX = (sys.platform, platform.machine()) == ("linux", "x86_64")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where Triton is installed, with what its Python imports: it looks in the working directory first."""
    if not ON_X86_LINUX or sys.version_info >= (3, 13) or not list(LIBRARIES.glob("libpython3.*.so*")):
        pytest.skip("there is no Triton for this machine's Python")
    folder = tmp_path_factory.mktemp("triton")
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(folder)]
    installed = subprocess.run([*uv, *WHEELS], capture_output=True, text=True, check=False)
    if installed.returncode and "CI" not in os.environ:
        pytest.skip(f"Triton cannot be installed: {installed.stderr}")
    assert installed.returncode == 0, installed.stderr
    server = folder / "pytriton/tritonserver"
    stub = f"python_backend_stubs/3.{sys.version_info.minor}/triton_python_backend_stub"
    shutil.copy(server / stub, server / "backends/python")
    return folder


def start(folder: Path, cwd: Path, *options: str, log: Path) -> subprocess.Popen:
    server = folder / "pytriton/tritonserver"
    paths = {
        "LD_LIBRARY_PATH": f"{folder / 'nvidia_pytriton.libs'}:{LIBRARIES}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    fixed = [f"--backend-directory={server / 'backends'}", "--allow-metrics=false", "--exit-timeout-secs=5"]
    with log.open("w") as file:
        return subprocess.Popen([server / "bin/tritonserver", *fixed, *options], cwd=cwd, env=os.environ | paths, stdout=file, stderr=subprocess.STDOUT)


def repository(bundle, out: Path, batching=Batching()) -> Path:  # noqa: B008
    name = write_repository(bundle, out, batching)
    config = out / f"{name}-edge/config.pbtxt"
    assert 'backend: "onnxruntime"\ndefault_model_filename: "edge.onnx"\n' in config.read_text()
    config.write_text(config.read_text().replace('backend: "onnxruntime"\ndefault_model_filename: "edge.onnx"\n', 'backend: "python"\n'))
    shutil.copy(ROOT / "tests/pipeline/runtime/triton_onnx.py", config.with_name("1") / "model.py")
    return out


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Served:
    """A Triton server with the repositories of `bundles`, and how to speak to it (KServe v2 over HTTP, tensors as raw bytes)."""

    def __init__(self, bundles, port: int, grpc_port: int) -> None:
        self.bundles, self.port, self.grpc_port = bundles, port, grpc_port

    def get(self, path: str, data: bytes | None = None, headers=()) -> tuple[bytes, int]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v2/{path}", data, dict(headers))
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read(), int(reply.headers.get("Inference-Header-Content-Length", 0))

    def config(self, bundle, suffix: str = "") -> dict:
        return json.loads(self.get(f"models/coinfer-{bundle.bundle_id.hex()}{suffix}/config")[0])

    def _infer(self, bundle, frames, wanted: dict) -> tuple[bytes, int]:
        raw = b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)
        tensor = {"name": "frame", "shape": [len(frames), 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
        head = json.dumps({"inputs": [tensor], "outputs": [{"name": "logits", "parameters": wanted}]}).encode()
        return self.get(f"models/coinfer-{bundle.bundle_id.hex()}/infer", head + raw, {"Inference-Header-Content-Length": str(len(head))}.items())

    def logits(self, bundle, *frames: bytes) -> np.ndarray:
        data, head_bytes = self._infer(bundle, frames, {"binary_data": True})
        return np.frombuffer(data[head_bytes:], "<f4").reshape(len(frames), -1)

    def labels(self, bundle, *frames: bytes) -> list[str]:
        data, _ = self._infer(bundle, frames, {"classification": 1})
        return [text.split(":")[2] for text in json.loads(data)["outputs"][0]["data"]]

    def refusal(self, bundle, frame: bytes) -> str:
        with pytest.raises(urllib.error.HTTPError) as refused:
            self.logits(bundle, frame)
        assert refused.value.code == 400
        return json.loads(refused.value.read())["error"]


@pytest.fixture(scope="module")
def served(folder, make_module_bundle, tmp_path_factory):
    repositories, port, grpc_port = tmp_path_factory.mktemp("repositories"), free_port(), free_port()
    bundles = {"split": make_module_bundle(), "edge-only": make_module_bundle("edge-only", quality=80), "altered": make_module_bundle(seed=5)}
    for name, bundle in bundles.items():
        repository(bundle, repositories / name, Batching(4, 2.0))
    next((repositories / "altered").rglob(CODEC)).write_text("{}")
    (folder / "pipeline").symlink_to(ROOT / "pipeline")
    options = [f"--model-repository={repositories / name}" for name in bundles]
    options += [f"--http-port={port}", f"--grpc-port={grpc_port}", "--exit-on-error=false", "--strict-readiness=false"]
    log = repositories / "log"
    process, served = start(folder, folder, *options, log=log), Served(bundles, port, grpc_port)
    try:
        end_s = time.monotonic() + 60
        while True:
            try:
                served.get("health/ready")
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end_s, log.read_text()
                time.sleep(0.1)
        yield served
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.mark.parametrize("kind", ["split", "edge-only"])
def test_logits_are_those_of_the_edge_half_to_the_bit(kind, served):
    bundle = served.bundles[kind]
    frames, half, device = frames_of(bundle, 6), EdgeHalf(bundle), dial(f"grpc://127.0.0.1:{served.grpc_port}")
    for frame in frames:
        assert (logits(device.request(frame, 20)) == logits(half.handle(frame)[0])).all()
    device.close()
    together = served.logits(bundle, *frames[:4])
    assert together == pytest.approx(np.stack([logits(half.handle(frame)[0]) for frame in frames[:4]]), rel=1e-5)


def test_frames_that_cannot_be_opened_are_refused_alone(served):
    bundle, other = served.bundles["split"], served.bundles["altered"]
    (good, *_), half = frames_of(bundle, 1), EdgeHalf(bundle)
    bad = {
        good[:-1] + bytes([good[-1] ^ 1]): "is damaged, its checksum does not match",
        good[:20]: "where its header says",
        frames_of(other, 1)[0]: f"frame is for bundle {other.bundle_id.hex()}, this edge runs {bundle.bundle_id.hex()}",
        pack(b"\xff" * 200, bundle.bundle_id, Kind.SYMBOLS): "does not hold",
        pack(unpack(good).payload, bundle.bundle_id, Kind.IMAGE): "this split bundle takes SYMBOLS",
        b"": "is cut short",
    }
    with ThreadPoolExecutor(12) as pool:
        answered = [pool.submit(served.logits, bundle, good) for _ in range(12)]
        refused = [(pool.submit(served.refusal, bundle, frame), why) for frame, why in bad.items()]
        answered += [pool.submit(served.logits, bundle, good) for _ in range(12)]
    assert all((answer.result()[0] == logits(half.handle(good)[0])).all() for answer in answered)
    for refusal, why in refused:
        assert why in refusal.result()


def test_clients_can_ask_for_classes_by_name(served):
    bundle = served.bundles["split"]
    frames = frames_of(bundle, 3)
    assert served.labels(bundle, *frames) == [CLASSES[int(np.argmax(logits(EdgeHalf(bundle).handle(frame)[0])))] for frame in frames]


@pytest.mark.parametrize("kind", ["split", "edge-only"])
def test_triton_reads_the_configuration_as_it_was_meant(kind, served):
    bundle = served.bundles[kind]
    whole, decode, edge = (served.config(bundle, suffix) for suffix in ("", "-decode", "-edge"))
    opened = [CODE, "TYPE_UINT8"] if kind == "split" else [(3, SIZE, SIZE), "TYPE_FP32"]
    assert [decode["output"][0][key] for key in ("dims", "data_type")] == [list(opened[0]), opened[1]]
    assert decode["input"] == whole["input"]
    assert [whole["input"][0][key] for key in ("name", "dims", "data_type")] == ["frame", [1], "TYPE_STRING"]
    assert [whole["output"][0][key] for key in ("name", "dims", "data_type")] == ["logits", [len(CLASSES)], "TYPE_FP32"]
    assert {config["max_batch_size"] for config in (whole, decode, edge)} == {4}
    assert edge["dynamic_batching"]["max_queue_delay_microseconds"] == 2000
    assert edge["dynamic_batching"]["preferred_batch_size"] == [4]
    about = {key: value["string_value"] for key, value in whole["parameters"].items()}
    assert json.loads(about["preprocessing"]) == bundle.preprocessing.to_dict()
    assert about["bundle_id"] == bundle.manifest["bundle_id"]


def test_altered_tables_are_one_sentence_and_no_model(served):
    name = f"coinfer-{served.bundles['altered'].bundle_id.hex()}-decode"
    (model,) = (model for model in json.loads(served.get("repository/index", b"{}")[0]) if model["name"] == name)
    assert model["state"] == "UNAVAILABLE"
    assert "codec.json is not the file this bundle was written with" in model["reason"]


def test_a_triton_without_coinfer_says_what_to_install(folder, make_bundle, tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'pipeline'\")\n")  # found first
    log = tmp_path / "log"
    process = start(
        folder, tmp_path, f"--model-repository={repository(make_bundle(), tmp_path / 'out')}", f"--http-port={free_port()}", "--allow-grpc=false", log=log
    )
    try:
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert "is not installed in Triton's Python" in log.read_text()
    assert "pip install coinfer" in log.read_text()


def test_what_cannot_be_written_leaves_nothing(make_bundle, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BundleError, match="device-only bundle, of which nothing runs on a server"):
        write_repository(make_bundle("device-only"), out, Batching())
    bundle = make_bundle()
    (bundle.path / EDGE).write_bytes(b"other")
    with pytest.raises(BundleError, match="is not the file this bundle was written with"):
        write_repository(bundle, out, Batching())
    assert not list(tmp_path.glob("*out*"))
    out.mkdir()
    with pytest.raises(CoinferError, match="is there already"):
        write_repository(make_bundle(seed=1), out, Batching())
    assert not list(out.iterdir())


def test_the_command_prints_which_model_to_ask_and_refuses_in_one_sentence(make_bundle, tmp_path, monkeypatch, capsys):
    bundle, out = make_bundle(), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["coinfer", "bundle", "triton", str(bundle.path), str(out), "--max-batch", "16", "--max-delay", "0.5"])
    with pytest.raises(SystemExit, match="0"):
        main()
    name = f"coinfer-{bundle.bundle_id.hex()}"
    assert capsys.readouterr().out == f"{name}\n"
    assert sorted(path.name for path in out.iterdir()) == [name, f"{name}-decode", f"{name}-edge"]
    assert "max_queue_delay_microseconds: 500\n" in (out / f"{name}-edge/config.pbtxt").read_text()
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err == f"coinfer: {out} is there already; remove it, or name a new folder.\n"


def test_labels_stay_one_a_line(make_bundle, tmp_path):
    name = write_repository(make_bundle(classes=["an ant", "bee\n(honey)", "cat"]), tmp_path / "out", Batching())
    assert (tmp_path / "out" / name / "labels.txt").read_text() == "an ant\nbee (honey)\ncat\n"
