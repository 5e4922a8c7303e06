"""The whole pipeline through DVC, small: two fresh clones agree byte for byte, and a second run has nothing to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def clone(folder: Path) -> Path:
    """What a fresh clone of this working tree holds, without what trained before."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file() and not name.endswith("dvc.lock") and not name.startswith("results/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def quick(folder: Path, **sections: dict[str, Any]) -> Path:
    """Make the parameters in `folder` run in seconds, with further changes by `sections`."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["run"]["threads"] = 1
    params["pretrain"]["epochs"] = params["finetune"]["epochs"] = params["supernet"]["epochs"] = 1
    params["search"] |= {"trials": 2, "codec_steps": 2, "train_images": 64, "images": {"webp": [100]}, "keep": [0.5, 1.0]}
    params["objective"] |= {"max_accuracy_drop": 0.9, "minimize": "wire_bytes"}
    params["evaluate"] |= {"latency_images": 2, "warmup_images": 0}
    for device in params["devices"].values():
        device |= {"slowdown": 1, "memory_mb": 0.2}  # too little for the whole network, so that there is an edge
    for name, values in sections.items():
        params[name] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def call(folder: Path, *command: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "DVC_ROOT")}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def repro(folder: Path) -> str:
    return call(folder, "dvc", "repro")


@pytest.mark.timeout(600)
def test_two_clones_give_one_lock_and_a_second_run_does_nothing(tmp_path):
    first, second = (quick(clone(tmp_path / name)) for name in ("first", "second"))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(repro, (first, second)))
    lock = (first / "dvc.lock").read_bytes()
    assert lock == (second / "dvc.lock").read_bytes()
    assert str(tmp_path).encode() not in lock
    call(first, "git", "add", "-A")
    call(first, "git", "-c", "user.name=n", "-c", "user.email=a@b.c", "commit", "-qm", "what the first run left")
    assert "Data and pipelines are up to date" in repro(first)
    assert call(first, "git", "status", "--porcelain") == ""
    assert (first / "dvc.lock").read_bytes() == lock
    assert (first / "artifacts/camera/timing.json").exists()
    assert (first / "mlflow.db").exists()
    assert "camera" in call(first, "dvc", "metrics", "show")
    call(first, "dvc", "plots", "show")
    assert "latency_vs_rate.csv" in (first / "dvc_plots/index.html").read_text()
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", "edge", "--bundle", "artifacts/camera/bundle", "--port", "0"], cwd=first, stdout=subprocess.PIPE, text=True
    ) as edge:
        assert edge.stdout
        port = edge.stdout.readline().split()[-1]
        picture = tmp_path / "five.png"
        Image.fromarray(np.full((20, 30), 90, np.uint8)).save(picture)
        line = call(first, *f"{sys.executable} -m pipeline.cli device --bundle artifacts/camera/bundle --source {picture} --edge 127.0.0.1:{port}".split())
        edge.terminate()
    record = json.loads(line)
    assert "edge_error" not in record
    assert record["label"] in "0123456789"
    report = subprocess.run([sys.executable, "-m", "pipeline.cli", "report"], cwd=first, capture_output=True, text=True, check=True).stdout
    for words in ("accuracy, %", "device-only", "edge-only", "artifacts/camera/bundle", "make ui"):
        assert words in report


@pytest.mark.timeout(600)
def test_the_cifar10_example_runs_on_a_small_folder_of_images(tmp_path):
    folder = clone(tmp_path) / "examples/cifar10"
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 4)):
        for shade, name in ((60, "cat"), (190, "dog")):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(rng.normal(shade, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{index:04}.jpg")
    quick(folder, backbone={"weights": None}, pretrain={"epochs": 1, "teachers": {}})
    repro(folder)
    assert "Data and pipelines are up to date" in repro(folder)
    assert "artifacts/camera/bundle" in call(folder, sys.executable, "-m", "pipeline.cli", "report")
