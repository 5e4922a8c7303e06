"""A thousand odd JPEG files through torchvision and torch, and through the device: the same answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_images
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from models.codec import CodecSpec
from models.coinference import CoInference, build_split
from pipeline.data import normalise
from pipeline.onnx_export import export_onnx
from pipeline.runtime.bundle import DEVICE, DEVICE_ONLY, EDGE, Bundle, write_bundle
from pipeline.runtime.coder import build_tables
from pipeline.runtime.device import DeviceHalf
from pipeline.runtime.edge import EdgeHalf
from pipeline.runtime.pictures import pictures
from pipeline.runtime.preprocess import MEAN, MOST_ASPECT, STD, Preprocessing
from pipeline.runtime.transport import LoopbackTransport
from tests.pipeline.runtime.odd_jpegs import odd_jpegs
from tests.tiny import tiny_backbone

SIZE, COUNT, BITS = 24, 1000, 4
TORCHVISION = v2.Compose(
    [v2.Resize(SIZE), v2.CenterCrop(SIZE), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)],
)
LEVEL = 1 / 255 / min(STD)  # of a pixel, in what a network takes


def digits_on_photos(photos: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's digits in colours, each on a part of a photo: uint8 (N, 3, S, S), and which digits they are."""
    digits, rng = load_digits(), np.random.default_rng(0)
    found = np.empty((len(digits.images), SIZE, SIZE, 3), np.uint8)
    for image, digit in zip(found, digits.images, strict=True):
        photo = photos[rng.integers(len(photos))]
        top, left = (int(rng.integers(side - SIZE)) for side in photo.shape[:2])
        ink = np.asarray(Image.fromarray((digit * 15).astype(np.uint8)).resize((SIZE, SIZE)), np.float64)[..., None] / 255
        image[:] = photo[top : top + SIZE, left : left + SIZE] * (1 - ink) + rng.integers(0, 256, 3) * ink
    return torch.from_numpy(np.ascontiguousarray(found.transpose(0, 3, 1, 2))), torch.from_numpy(digits.target)


def train(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int) -> None:
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (64,))
        optimiser.zero_grad()
        F.cross_entropy(network.train()(normalise(images[chosen])), labels[chosen]).backward()
        optimiser.step()
    network.eval()


@torch.no_grad()
def logits(network: nn.Module, tensors: torch.Tensor) -> np.ndarray:
    return np.concatenate([network(part).numpy() for part in tensors.split(250)])


def exported(backbone: nn.Module, network: CoInference, images: torch.Tensor, path: Path) -> Bundle:
    example = torch.zeros(2, 3, SIZE, SIZE)
    with torch.no_grad():
        symbols = network.device_half().eval()(normalise(images[:200]))
    return write_bundle(
        path,
        kind="split",
        candidate={"cut": "block1", "quality": None},
        plan={},
        preprocessing=Preprocessing(SIZE),
        classes=[str(digit) for digit in range(10)],
        files={
            DEVICE: export_onnx(network.device_half().eval(), example, input_name="image", output_name="symbols"),
            EDGE: export_onnx(network.edge_half().eval(), symbols[:2], input_name="symbols", output_name="logits"),
            DEVICE_ONLY: export_onnx(backbone, example, input_name="image", output_name="logits"),
        },
        points=[build_tables(symbols.numpy(), BITS)],
        extra={"opset": 20},
    )


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory):
    """A folder of odd files, the two trained networks, and the bundle of both."""
    folder = tmp_path_factory.mktemp("odd")
    photos = load_sample_images().images
    torch.manual_seed(0)
    images, labels = digits_on_photos(photos)
    backbone = tiny_backbone(10, SIZE)
    train(backbone, images, labels, 80)
    network = build_split(backbone, torch.zeros(2, 3, SIZE, SIZE), "block1", CodecSpec("uniform", 4, 2, BITS))
    train(network, images, labels, 60)
    (folder / "files").mkdir()
    for index, data in enumerate(odd_jpegs([*photos, *images[:300].permute(0, 2, 3, 1).numpy()], COUNT, SIZE)):
        (folder / "files" / f"{index:04}.jpg").write_bytes(data)
    return folder / "files", backbone, network, exported(backbone, network, images, folder / "bundle")


def test_the_device_answers_a_thousand_odd_jpegs_as_torch_does(odd):
    folder, backbone, network, bundle = odd
    device, edge = DeviceHalf(bundle), LoopbackTransport(EdgeHalf(bundle))
    expected, given, alone, split, strips = [], [], [], [], []
    for shot in pictures(str(folder)):
        upright = ImageOps.exif_transpose(Image.open(shot.name["file"])).convert("RGB")
        strips.append(max(upright.size) > MOST_ASPECT * min(upright.size))
        expected.append(TORCHVISION(upright))
        pixels = device.pixels(shot.picture)
        given.append(bundle.preprocessing.tensor(pixels[None])[0])
        alone.append(device.classify_locally(pixels).logits)
        split.append(device.classify(pixels, edge).logits)
    assert len(expected) == COUNT

    away = np.abs(np.stack(given) - torch.stack(expected).numpy()).max((1, 2, 3)) / LEVEL
    assert max(away) < 1.01
    assert max(found for found, is_strip in zip(away, strips, strict=True) if not is_strip) < 1e-4

    whole, parted = (logits(each, torch.stack(expected)) for each in (backbone, network))
    assert np.abs(whole - np.stack(alone))[away < 1e-4].max() < 1e-3
    assert (whole.argmax(1) == np.stack(alone).argmax(1)).sum() == COUNT
    assert (parted.argmax(1) == np.stack(split).argmax(1)).sum() >= 0.999 * COUNT  # of symbols halfway between two levels either may come (METHODS 3)
    assert all(np.bincount(found.argmax(1)).max() < COUNT / 1.5 for found in (whole, parted))  # what answers always the same says nothing
