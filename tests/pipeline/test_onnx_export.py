from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from models.codec import NearestValue
from pipeline.errors import ModelError
from pipeline.onnx_export import OPSET, export_onnx
from tests.tiny import tiny_backbone as build_tiny

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, torch
from pathlib import Path
from pipeline.onnx_export import export_onnx
from tests.tiny import tiny_backbone
torch.manual_seed(0)
model = tiny_backbone(num_classes=10, image_size=16).eval()
Path(sys.argv[1]).write_bytes(export_onnx(model, torch.zeros(1, 3, 16, 16), input_name="image", output_name="logits"))
"""


@pytest.fixture(scope="module")
def exported() -> bytes:
    torch.manual_seed(0)
    model = build_tiny(num_classes=10, image_size=16).eval()
    return export_onnx(model, torch.zeros(1, 3, 16, 16), input_name="image", output_name="logits")


def test_exported_model_computes_the_same_at_any_batch_size(tiny_backbone: nn.Module, exported: bytes) -> None:
    session = ort.InferenceSession(exported, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        images = torch.rand(batch, 3, 16, 16)
        with torch.no_grad():
            want = tiny_backbone(images).numpy()
        (got,) = session.run(["logits"], {"image": images.numpy()})
        np.testing.assert_allclose(got, want, atol=1e-5)
    assert onnx.load_from_string(exported).opset_import[0].version == OPSET


def test_export_is_quiet_and_leaves_the_module_alone(capfd: pytest.CaptureFixture[str]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export_onnx(module, torch.zeros(1, 3, 4, 4), input_name="image", output_name="logits")
    assert capfd.readouterr() == ("", "")
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_export_of_a_codebook_says_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    export_onnx(NearestValue(nn.Parameter(torch.linspace(0, 1, 8))), torch.zeros(2, 4, 3, 3), input_name="u", output_name="symbols")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


def test_two_folders_and_two_processes_give_the_same_bytes_without_a_path(exported: bytes, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for package in ("pipeline", "models", "tests"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, "model.onnx"], cwd=copy, env=environment, check=True)
    assert (copy / "model.onnx").read_bytes() == exported
    for text in (str(ROOT), str(copy), str(Path.home()), "site-packages", "tiny.py", torch.__version__):
        assert text.encode() not in exported


def test_nothing_of_the_exporter_is_left(exported: bytes) -> None:
    model = onnx.load_from_string(exported)
    graph = model.graph
    for item in [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *model.functions]:
        assert not item.metadata_props
        assert not item.doc_string
    assert not model.producer_version
    names = [name for node in graph.node for name in (node.name, *node.input, *node.output)]
    assert not any("/" in name for name in names)


def test_symbols_may_be_the_output_and_the_input() -> None:
    class Quantise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.round(x.clamp(0, 1) * 15).to(torch.uint8)

    class Dequantise(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return q.float() / 15

    symbols = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    device = ort.InferenceSession(export_onnx(Quantise(), torch.rand(1, 1, 4, 4), input_name="image", output_name="symbols"))
    edge = ort.InferenceSession(export_onnx(Dequantise(), symbols, input_name="symbols", output_name="logits"))
    (values,) = edge.run(None, {"symbols": symbols.numpy()})
    (again,) = device.run(None, {"image": values})
    assert again.dtype == np.uint8
    assert np.array_equal(again, symbols.numpy())


def test_a_half_that_cannot_be_exported_is_one_sentence() -> None:
    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="the half from image to logits cannot be exported") as caught:
        export_onnx(Stubborn(), torch.zeros(1, 3), input_name="image", output_name="logits")
    assert "\n" not in str(caught.value)


def test_weights_too_large_for_one_file_are_refused_before_the_export() -> None:
    with torch.device("meta"):
        module = nn.Linear(30_000, 20_000)
    with pytest.raises(ModelError, match=r"2.4 GB of weights"):
        export_onnx(module, torch.zeros(1, 30_000), input_name="image", output_name="logits")
