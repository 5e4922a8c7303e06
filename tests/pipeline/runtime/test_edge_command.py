"""The commands together, as they are used: keys, an edge with all its ways in, devices, metrics, and a run in MLflow at the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from pipeline.runtime.guard import DeviceKeys
from pipeline.tracking import EXPERIMENT

ROOT = Path(__file__).resolve().parents[3]
COINFER = [sys.executable, "-m", "pipeline.cli"]


def coinfer(*arguments, **options):
    return subprocess.run([*COINFER, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def test_an_edge_with_keys_serves_both_transports_is_watched_and_leaves_a_run(make_bundle, photos, tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'runs.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    bundle, keys = make_bundle(), tmp_path / "keys"
    made = coinfer("keys", keys, "--edge", "edge.example", "--device", "ant", "--device", "bee")
    assert made.stdout.split() == [str(keys / name) for name in ("edge", "ant", "bee")], made.stderr
    command = ["edge", "--bundle", bundle.path, "--port", 0, "--grpc-port", 0, "--metrics", "127.0.0.1:0", "--keys", keys / "edge", "--log-mlflow"]
    with subprocess.Popen([*COINFER, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as edge:
        try:
            assert edge.stdout is not None
            said = [edge.stdout.readline() for _ in range(3)]
            ports = {name: next(int(word) for line in said if name in line for word in line.split() if word.isdigit()) for name in ("gRPC", "metrics")}
            ports["tcp"] = next(int(line.split()[-1]) for line in said if line.startswith("edge listens") and "gRPC" not in line)
            places = {"ant": [f"127.0.0.1:{ports['tcp']}", "--compact"], "bee": [f"grpc://127.0.0.1:{ports['gRPC']}"]}
            for name, place in places.items():
                done = coinfer("device", "--bundle", bundle.path, "--source", photos, "--keys", keys / name, "--deadline", 20_000, "--edge", *place)
                assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == 3 * ["split"], done.stdout + done.stderr
            alone = coinfer("device", "--bundle", bundle.path, "--source", photos, "--deadline", 20_000, "--edge", f"127.0.0.1:{ports['tcp']}")
            assert [json.loads(line)["path"] for line in alone.stdout.splitlines()] == 3 * ["device-only"]
            with urllib.request.urlopen(f"https://127.0.0.1:{ports['metrics']}/metrics", timeout=10, context=DeviceKeys(keys / "ant").context) as reply:
                text = reply.read().decode()
            for name in places:
                assert f'coinfer_device_frames_total{{device="{name}"}} 3.0' in text
            edge.send_signal(signal.SIGTERM)
            _, errors = edge.communicate(timeout=60)
            assert (edge.returncode, errors) == (0, "")
        finally:
            edge.kill()
    client = mlflow.MlflowClient(uri)
    found = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])}
    assert found["serve"].data.metrics["answered"] == found[f"serve {bundle.bundle_id.hex()}"].data.metrics["answered"] == 6
    assert found["serve"].info.status == "FINISHED"


def test_without_mlflow_an_edge_serves_all_the_same_and_its_summary_is_kept(make_bundle, photos, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{gone.getsockname()[1]}")
    bundle = make_bundle()
    command = [*COINFER, "edge", "--bundle", str(bundle.path), "--port", "0", "--log-mlflow"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    with subprocess.Popen(command, **options) as edge:
        try:
            port = edge.stdout.readline().split()[-1]
            done = coinfer("device", "--bundle", bundle.path, "--source", photos, "--deadline", 20_000, "--edge", f"127.0.0.1:{port}")
            assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == 3 * ["split"], done.stdout + done.stderr
            edge.send_signal(signal.SIGTERM)
            _, errors = edge.communicate(timeout=60)
        finally:
            edge.kill()
    (kept,) = tmp_path.glob("coinfer-edge-*.json")
    assert (edge.returncode, errors.count("\n")) == (1, 1), errors
    assert f"could not be logged and is kept in {kept}: MLflow at http://127.0.0.1:" in errors
    assert json.loads(kept.read_text())["bundles"][bundle.bundle_id.hex()]["answered"] == 3


@pytest.mark.parametrize("uri", ["htp://mlflow:5000", "http:/mlflow", "mlflow.lan:5000"])
def test_an_edge_whose_mlflow_cannot_be_says_so_first(make_bundle, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    done = coinfer("edge", "--bundle", make_bundle().path, "--port", 0, "--log-mlflow")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"MLFLOW_TRACKING_URI is '{uri}'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--host", "0.0.0.0"], "needs keys"),
        (["--keys", "nowhere"], "nowhere/tls.key cannot be read"),
        (["--metrics", "somewhere"], "is not HOST:PORT"),
    ],
)
def test_an_edge_that_cannot_start_says_why(make_bundle, arguments, sentence):
    done = coinfer("edge", "--bundle", make_bundle().path, "--port", 0, *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert sentence in done.stderr


def test_an_edge_that_may_not_open_enough_files_says_so(make_bundle):
    command = ["sh", "-c", 'ulimit -n 128; exec "$@"', "sh", *COINFER, "edge", "--bundle", make_bundle().path, "--port", "0"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "may have 128 files open, and 1224 are needed" in done.stderr


def test_without_its_extra_the_command_for_keys_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['cryptography'] = None; from pipeline.cli import main; sys.argv[1:] = ['keys', sys.argv[1], '--edge', 'a']; main()"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "keys")], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'coinfer[edge]'" in done.stderr
