"""The CIFAR DenseNets of Huang et al. 2016 (arXiv 1608.06993, section 3), without bottlenecks or compression."""

import torch
from torch import Tensor, nn

from pcafast.models.initial import he_normal

_GROWTH = 12


class CifarDenseNet(nn.Module):
    """Images (N, 3, 32, 32) to class scores; depth = 3 n + 4, with n layers in each of three dense blocks."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        layers = (depth - 4) // 3
        width = 2 * _GROWTH
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.block1 = _block(layers, width)
        width += layers * _GROWTH
        self.transition1 = _transition(width)
        self.block2 = _block(layers, width)
        width += layers * _GROWTH
        self.transition2 = _transition(width)
        self.block3 = _block(layers, width)
        width += layers * _GROWTH
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(width, num_classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition1(self.block1(self.conv1(x)))
        x = self.transition2(self.block2(x))
        scores: Tensor = self.linear(self.head(self.block3(x)))
        return scores


def _block(layers: int, width: int) -> nn.Sequential:
    return nn.Sequential(*(_Layer(width + layer * _GROWTH) for layer in range(layers)))


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(width, _GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.relu(self.bn(x)))], 1)


def _transition(width: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1, bias=False), nn.AvgPool2d(2))
