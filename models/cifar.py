"""Small classifiers for small images: the CIFAR ResNets of He et al. 2016 (arXiv 1512.03385, section 4.2) and an MLP of equal layers."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class CifarResNet(nn.Module):
    """ResNet of depth 6n+2: a 3x3 stem, three stages of n basic blocks with 16, 32 and 64 channels, 1x1-convolution shortcuts, global average pool, linear.

    Input float (B, 3, H, W), H and W from 4 up; output logits (B, num_classes).
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        _initialise(self)

    @staticmethod
    def _stage(inputs: int, width: int, stride: int, blocks: int) -> nn.Sequential:
        shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)) if stride > 1 else None
        return nn.Sequential(BasicBlock(inputs, width, stride, shortcut), *(BasicBlock(width, width) for _ in range(blocks - 1)))

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def cifar_resnet18(num_classes: int) -> ResNet:
    """torchvision's ResNet-18 with the stem of METHODS 1's table: 3x3 at stride 1, no max-pool."""
    model = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class MLP(nn.Module):
    """Flattened image, `depth` hidden layers of `width` neurons with ReLU, linear: the equal-neuron network of METHODS 7.3.

    Input float (B, 3, image_size, image_size); output logits (B, num_classes).
    """

    def __init__(self, num_classes: int, image_size: int, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        inputs = [3 * image_size**2, *[width] * (depth - 1)]
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(n, width), nn.ReLU()) for n in inputs))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.layers(image.flatten(1)))
