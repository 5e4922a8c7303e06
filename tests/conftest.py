"""Shared fixtures: a tiny backbone, the digits data, parameters that run in seconds, and a tracker that remembers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.params import Params, parse_params

ROOT = Path(__file__).resolve().parents[1]
QUICK_PLAN = {
    "threads": 1,
    "passes": 1,
    "rounds": 1,
    "repeats": 3,
    "warmup": 1,
    "job_ms": 20,
    "chains": 6,
    "halves": 1,
    "edge_halves": 1,
    "int8_halves": 1,
    "image_sizes": [],
    "qualities": {"webp": [100, 30], "jpeg": [50]},
    "coder_symbols": [64, 512],
}
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


class RecordingTracker:
    """A `Tracker` that keeps in memory what it is told."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.metrics: list[tuple[dict[str, float], int | None]] = []
        self.figures: list[str] = []
        self.files: list[Path] = []
        self.models: list[str] = []
        self.children: dict[str, RecordingTracker] = {}

    def log_params(self, params: Mapping[str, Any]) -> None:
        self.params.update(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.metrics.append((dict(metrics), step))

    def log_figure(self, figure: Any, name: str) -> None:
        self.figures.append(name)

    def log_file(self, path: Path) -> None:
        assert path.is_file()
        self.files.append(path)

    def log_onnx(self, path: Path, name: str, input_example: dict[str, np.ndarray]) -> None:
        assert path.is_file()
        self.models.append(name)

    @contextmanager
    def child(self, name: str, **tags: str) -> Iterator[RecordingTracker]:
        self.children[name] = RecordingTracker()
        yield self.children[name]


@pytest.fixture
def tracker() -> RecordingTracker:
    return RecordingTracker()


@pytest.fixture
def digits_fields() -> dict[str, Any]:
    """params.yaml's fields, cut down so that every stage takes seconds; change a copy, then `parse_params` it."""
    fields: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    fields["run"]["threads"] = 1
    fields["data"]["validation_fraction"] = 0.1
    fields["pretrain"] |= {"epochs": 1}
    fields["supernet"] |= {"epochs": 1}
    fields["search"] |= {"trials": 3, "codec_steps": 2, "train_images": 64, "bits": [2, 4], "images": {"webp": [100, 30]}}
    fields["finetune"] |= {"epochs": 1}
    fields["objective"] |= {"max_accuracy_drop": 0.9}
    fields["evaluate"] |= {"latency_images": 5, "warmup_images": 1}
    fields["backbone"]["name"] = "tests.tiny:tiny_backbone"
    for device in fields["devices"].values():
        device |= {"profile": "measure", "edge_profile": "measure", "slowdown": 1, "memory_mb": 64}
        device["link"] |= {"rate_mbps": 10, "rtt_ms": 1}
    return fields


@pytest.fixture
def digits_params(digits_fields: dict[str, Any]) -> Params:
    return parse_params(digits_fields)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_fields: dict[str, Any]) -> Path:
    """An empty working copy as the current directory: params.yaml of `digits_params`, the committed profiles, and a plan that measures in seconds."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "profiles/measure.json").write_text(json.dumps(QUICK_PLAN))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(digits_fields))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_backbone() -> Any:
    """A traceable classifier with BN and a residual block: (B, 3, 16, 16) -> (B, 10), in eval mode, seeded."""
    import torch

    from tests.tiny import tiny_backbone

    torch.manual_seed(0)
    return tiny_backbone(num_classes=10, image_size=16).eval()
