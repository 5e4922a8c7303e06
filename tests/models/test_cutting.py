"""Cut points and halves: the same function in two parts, for every backbone we name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models.backbones import build_backbone
from models.cutting import CutPoint, count_macs, cut_points, segment_modules, split
from models.tracing import trace
from pipeline.errors import ModelError
from pipeline.onnx_export import export_onnx

CLASSES = 10
SIZES = {"resnet18": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64, "densenet121": 64, "vit_b_16": 32, "squeezenet1_1": 64}


@cache
def backbone(name: str, image_size: int) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode whose logits differ from image to image (fresh ones are often constant), and three images."""
    torch.manual_seed(0)
    model = build_backbone(name, CLASSES, image_size)
    images = torch.rand(3, 3, image_size, image_size)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # running statistics are those of the one batch below
    with torch.no_grad():
        model.train()(torch.rand(4, 3, image_size, image_size))
        logits = model.eval()(images)
    assert logits.std(0).max() > 1e-3
    return model, images


def onnx_run(half: nn.Module, inputs: Tensor) -> Callable[[Tensor], np.ndarray]:
    session = onnxruntime.InferenceSession(export_onnx(half, inputs, input_name="x", output_name="y"))
    return lambda tensor: session.run(None, {"x": tensor.numpy()})[0]


@pytest.mark.parametrize("name", SIZES)
def test_tail_of_head_is_the_whole_at_every_offered_cut(name: str) -> None:
    model, images = backbone(name, SIZES[name])
    traced = trace(model, images)
    with torch.no_grad():
        whole = model(images)
        for point in cut_points(traced, images):
            head, tail = split(traced, images, point.name)
            feature = head(images)
            assert feature.shape == (3, *point.shape), point.name
            kept = feature.clone()
            torch.testing.assert_close(tail(feature), whole, atol=1e-5, rtol=1e-5, msg=lambda text, cut=point.name: f"cut {cut}: {text}")
            assert torch.equal(feature, kept), f"the tail at {point.name} wrote into the feature"


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("resnet18", 5),
        ("squeezenet1_1", 1),
        ("squeezenet1_1", 5),
        ("mobilenet_v3_small", 7),
        ("efficientnet_b0", 10),
        ("densenet121", 5),
        ("vit_b_16", 1),
    ],
)
def test_halves_run_in_onnx_runtime_at_two_batch_sizes(name: str, position: int) -> None:
    model, images = backbone(name, SIZES[name])
    head, tail = split(model, images, cut_points(model, images)[position].name)
    with torch.no_grad():
        feature = head(images)
        logits = tail(feature)
    run_head, run_tail = onnx_run(head, images), onnx_run(tail, feature)
    for batch in (1, 3):
        np.testing.assert_allclose(run_head(images[:batch]), feature[:batch], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(run_tail(feature[:batch]), logits[:batch], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "image_size", "count"), [("resnet18", 64, 23), ("densenet121", 64, 25), ("vit_b_16", 32, 32), ("efficientnet_b0", 64, 79)])
def test_every_cut_node_is_found(name: str, image_size: int, count: int) -> None:
    """METHODS 1's counts: without the input, with the logits."""
    model, images = backbone(name, image_size)
    points = cut_points(model, images, "all")
    assert len(points) - 1 == count
    assert len({point.name for point in points}) == len(points)
    blocks = {point.name: point.shape for point in cut_points(model, images)}
    assert blocks.items() <= {point.name: point.shape for point in points}.items()


def test_costs_of_the_cifar_resnet18_are_those_of_methods() -> None:
    model, images = backbone("cifar_resnet18", 32)
    points = {point.name: point for point in cut_points(model, images)}
    table = {
        "maxpool": (1_769_472, 1_856, (64, 32, 32)),  # the stem, whose max-pool does nothing
        "layer1.1": (152_764_416, 149_824, (64, 32, 32)),
        "layer2.1": (286_982_144, 675_392, (128, 16, 16)),
        "layer3.1": (421_199_872, 2_775_104, (256, 8, 8)),
        "layer4.1": (555_417_600, 11_168_832, (512, 4, 4)),
        "output": (555_422_720, 11_173_962, (10,)),
    }
    assert {name: (points[name].macs, points[name].params, points[name].shape) for name in table} == table
    assert points["layer1.1"].elements == 65_536


def test_offered_cuts_are_block_ends_from_input_to_output() -> None:
    model, images = backbone("resnet20", 16)
    points = cut_points(model, images)
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert [point.name for point in points] == ["input", "relu", *blocks, "output"]
    assert [point.index for point in points] == list(range(12))
    assert (points[0].macs, points[0].params, points[0].shape) == (0, 0, (3, 16, 16))
    assert points[1].layers == ("conv1", "bn1")
    assert points[5].layers == tuple(f"layer2.0.{layer}" for layer in ("conv1", "bn1", "conv2", "bn2", "downsample.0", "downsample.1"))
    assert points[-1].layers == ("fc",)


def test_cut_point_survives_json() -> None:
    model, images = backbone("resnet20", 16)
    for point in cut_points(model, images):
        assert CutPoint.from_dict(json.loads(json.dumps(point.to_dict()))) == point


@pytest.mark.parametrize(("name", "image_size"), [("resnet20", 16), ("vit_b_16", 32), ("squeezenet1_1", 64)])
def test_macs_by_layer_sum_to_the_flop_counter(name: str, image_size: int) -> None:
    model, images = backbone(name, image_size)
    macs = count_macs(model, images)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # PyTorch does not count the fused layer
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    assert sum(macs.values()) == counter.get_total_flops() // 2 == cut_points(model, images)[-1].macs
    assert macs.keys() <= dict(model.named_modules()).keys()


def test_macs_of_attention_count_under_its_module() -> None:
    model, images = backbone("vit_b_16", 32)
    tokens, width = 5, 768
    products = 2 * tokens * tokens * width
    assert count_macs(model, images)["encoder.layers.encoder_layer_0.self_attention"] == 4 * tokens * width**2 + products


def test_halves_share_the_parameters_under_their_own_names() -> None:
    model, images = backbone("resnet20", 16)
    head, tail = split(model, images, "layer2.0")
    states = head.state_dict(), tail.state_dict()
    assert not states[0].keys() & states[1].keys()
    assert states[0].keys() | states[1].keys() == model.state_dict().keys()
    assert {"conv1.weight", "layer2.0.downsample.1.running_mean"} <= states[0].keys()
    for state in states:
        for name, value in state.items():
            assert value.data_ptr() == model.state_dict()[name].data_ptr()


@pytest.mark.parametrize("training", [True, False])
def test_cutting_leaves_the_model_as_it_was(training: bool) -> None:
    model = copy.deepcopy(backbone("mobilenet_v3_small", 64)[0]).train(training)
    model.features[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    flags = [module.inplace for module in model.modules() if hasattr(module, "inplace")]
    images = torch.rand(2, 3, 64, 64)
    before = images.clone()
    halves = split(model, images, "features.3")
    count_macs(model, images)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for half in halves:
        assert {name: module.training for name, module in half.named_modules()}.items() <= modes.items()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.inplace for module in model.modules() if hasattr(module, "inplace")] == flags
    assert torch.equal(images, before)


def test_segments_in_a_row_are_the_whole() -> None:
    model, images = backbone("resnet20", 16)
    cuts = cut_points(model, images)
    segments = segment_modules(model, images, cuts)
    assert len(segments) == len(cuts) - 1
    x = images
    with torch.no_grad():
        for segment, end in zip(segments, cuts[1:], strict=True):
            x = segment(x)
            assert x.shape == (3, *end.shape)
        torch.testing.assert_close(x, model(images), atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match=r"cut layer3\.0 does not come before cut layer1\.0"):
        segment_modules(model, images, [cuts[8], cuts[2]])


def test_an_unknown_cut_lists_the_known_ones() -> None:
    model, images = backbone("resnet20", 16)
    with pytest.raises(ModelError, match=r"cut 'layer1.9' is unknown; choose one of input, relu, layer1.0, .*, output; did you mean layer1"):
        split(model, images, "layer1.9")


class Flatten(nn.Module):
    """What the networks below end in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Awkward(nn.Module):
    """Functional layers, a layer called twice, in-place writes that others read, tensors outside the state, a size taken from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.scale = torch.tensor([2.0])
        self.head = Flatten(4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        y = self.act(x)
        x = x + y  # the overwritten x
        x = F.relu(self.shared(x), inplace=True)
        x.mul_(self.scale)
        x = F.dropout(x, 0.5, self.training)
        x = self.shared(x).relu_()
        x = x.reshape(x.shape[0], 2, 2, 8, 8).transpose(1, 2).flatten(1, 2)
        return self.head(x * torch.tensor(3.0))


def test_awkward_forward_is_cut_correctly() -> None:
    torch.manual_seed(1)
    model, images = Awkward().eval(), torch.rand(3, 3, 8, 8)
    attributes = set(vars(model))
    points = cut_points(model, images, "all")
    assert set(vars(model)) == attributes
    assert points[-1].params == sum(parameter.numel() for parameter in model.parameters())
    assert {"shared", "shared_2", "dropout"} <= {point.name for point in points}
    with torch.no_grad():
        for point in points:
            head, tail = split(model, images, point.name)
            feature = head(images)
            kept = feature.clone()
            torch.testing.assert_close(tail(feature), model(images), atol=1e-5, rtol=1e-5)
            assert torch.equal(feature, kept)
            assert head.state_dict().keys() | tail.state_dict().keys() == model.state_dict().keys()


def test_functional_dropout_follows_the_mode_of_its_half() -> None:
    model, images = Awkward().eval(), torch.rand(2, 3, 8, 8)
    head, _ = split(model, images, "dropout")
    assert (head(images) == 0).float().mean() < 0.9
    assert torch.equal(head(images), head(images))
    assert not torch.equal(head.train()(images), head(images))
    assert torch.equal(head.eval()(images), head(images))


class Loops(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        x = image.mean((2, 3))
        return x if x.sum() > 0 else -x


class TwoOutputs(nn.Module):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return image.mean((2, 3)), image


class TwoInputs(nn.Module):
    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        return image.mean((2, 3)) + other


class Random(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) + torch.randn(3)


class RandomScale(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) * torch.randn(3)


class OtherInTraining(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) if self.training else image.amax((2, 3))


class FrozenBatch(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)).view(1, 3)


def test_a_wrong_graph_is_seen_on_an_example_of_zeros_too() -> None:
    with pytest.raises(ModelError, match="its graph gives other logits"):
        cut_points(RandomScale(), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Loops(), r"Loops cannot be traced \(.*\); its forward must not branch"),
        (TwoInputs(), "TwoInputs takes more than one input"),
        (TwoOutputs(), "TwoOutputs returns tuple for two images"),
        (Random(), "Random cannot be traced: its graph gives other logits"),
        (OtherInTraining(), "OtherInTraining computes another graph in training"),
        (FrozenBatch(), "FrozenBatch cannot run on 3x8x8 images"),
        (nn.Sequential(nn.Conv2d(3, 4, 9), nn.Flatten(), nn.Linear(4, 2)), "Sequential cannot run on 3x8x8 images"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_backbone_that_cannot_be_cut_gives_one_sentence(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        cut_points(model, torch.rand(1, 3, 8, 8))
    assert "\n" not in str(caught.value)
