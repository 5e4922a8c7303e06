from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from models.codec import CodecSpec
from models.coinference import CoInference, build_split
from models.cutting import cut_points, split
from models.pruning import prune_head
from pipeline.errors import ModelError


def session(half: nn.Module, example: Tensor, path: Path) -> onnxruntime.InferenceSession:
    program = torch.onnx.export(half, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), external_data=False, verbose=False)
    assert program is not None
    program.save(path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(half: onnxruntime.InferenceSession, array: np.ndarray) -> Any:
    return half.run(None, {half.get_inputs()[0].name: array})[0]


@pytest.mark.parametrize("kind", ["uniform", "codebook", "rate"])
@pytest.mark.parametrize(("cut", "stride", "bits", "size"), [("block2", 1, 2, 16), ("block2", 2, 8, 14), ("mean", 1, 3, 16)])
def test_exported_halves_match_torch(tiny_backbone: nn.Module, kind: str, cut: str, stride: int, bits: int, size: int, tmp_path: Path) -> None:
    """14 px make a 7x7 feature, odd under stride 2; after the mean over both axes crosses a vector."""
    network = build_split(tiny_backbone, torch.randn(2, 3, size, size), cut, CodecSpec(kind, 8, stride, bits))
    network.train()
    with torch.no_grad():
        for _ in range(3):  # statistics like a trained network's
            network(torch.randn(32, 3, size, size))
    network.eval()
    images = torch.randn(64, 3, size, size)
    device, edge = network.device_half(), network.edge_half()
    with torch.no_grad():
        symbols = device(images)
        logits = edge(symbols)
        assert torch.equal(logits, network(images)), "training computes what the two halves compute"
    assert symbols.dtype == torch.uint8
    assert symbols.shape[1:] == network.codec.code_shape

    exported = run(session(device, images[:2], tmp_path / "device.onnx"), images.numpy())
    assert exported.dtype == np.uint8
    difference = np.abs(exported.astype(int) - symbols.numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).sum() <= 1 + 1e-6 * 2**bits * difference.size
    np.testing.assert_allclose(run(session(edge, symbols[:2], tmp_path / "edge.onnx"), symbols.numpy()), logits.numpy(), atol=1e-4)


def test_each_half_holds_only_what_it_runs(tiny_backbone: nn.Module) -> None:
    network = build_split(tiny_backbone, torch.randn(1, 3, 16, 16), "block1", CodecSpec("uniform", 4, 2, 4))
    ids = [{id(parameter) for parameter in half.parameters()} for half in (network.device_half(), network.edge_half())]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {id(parameter) for parameter in network.parameters()}


def test_a_pass_shows_what_distillation_compares(tiny_backbone: nn.Module) -> None:
    image = torch.randn(3, 3, 16, 16)
    network = build_split(tiny_backbone, image, "block1", CodecSpec("uniform", 4, 2, 4))
    seen = network.run(image)
    assert seen.feature.shape == seen.decoded.shape == (3, 8, 16, 16)
    assert torch.equal(seen.feature, split(tiny_backbone, image, "block1")[0](image))
    assert torch.equal(seen.logits, network(image))


@pytest.mark.parametrize("bits", [1, 2])
def test_a_split_trains_at_few_bits_and_leaves_the_teacher_alone(tiny_backbone: nn.Module, bits: int) -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 10
    before = {name: tensor.clone() for name, tensor in tiny_backbone.state_dict().items()}
    network = build_split(tiny_backbone, images, "block1", CodecSpec("uniform", 4, 2, bits)).train()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in network.codec.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_backbone.state_dict().items()), "neither weights nor batch-norm statistics may move"
    assert not tiny_backbone.training


def test_a_pruned_split_is_the_pruned_head_and_saves_and_loads(tiny_backbone: nn.Module) -> None:
    image = torch.randn(2, 3, 16, 16)
    head, _ = split(tiny_backbone, image, "block2")
    layers = {point.name: point.layers for point in cut_points(tiny_backbone, image) if point.layers}
    pruned, plan = prune_head(head, image, {"block1": 0.5, "block2": 0.5}, layers)
    network = build_split(tiny_backbone, image, "block2", CodecSpec("uniform", 4, 1, 4), plan)
    assert torch.equal(network.head(image), pruned(image))
    again: CoInference = build_split(tiny_backbone, image, "block2", CodecSpec("uniform", 4, 1, 4), plan)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(image), network(image))


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_the_backbones(tiny_backbone: nn.Module, training: bool) -> None:
    network = build_split(tiny_backbone.train(training), torch.randn(2, 3, 16, 16), "block1", CodecSpec("uniform", 4, 2, 4))
    assert {module.training for module in network.modules()} == {training}


@pytest.mark.parametrize("kind", ["jscc-awgn", "jscc-bec", "jscc-bsc"])
def test_a_codec_without_symbols_trains_but_has_no_halves(tiny_backbone: nn.Module, kind: str) -> None:
    network = build_split(tiny_backbone, torch.randn(2, 3, 16, 16), "block1", CodecSpec(kind, 4, 2, 8)).train()
    network(torch.randn(4, 3, 16, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.head.parameters())
    for half in (network.device_half, network.edge_half):
        with pytest.raises(ModelError, match=f"codec {kind} sends no symbols a frame could carry and can only be evaluated"):
            half()
