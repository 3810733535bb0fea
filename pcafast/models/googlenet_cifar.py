"""GoogLeNet (Szegedy et al. 2014, arXiv 1409.4842, table 1) for small images.

Four things differ from the paper: one 3x3 convolution takes the place of the layers before the first block, every
convolution has a batch norm, two 3x3 convolutions stand for one of 5x5 (as in arXiv 1512.00567), and no auxiliary
classifiers.
"""

import torch
from torch import Tensor, nn

from pcafast.models.initial import he_normal


class CifarGoogLeNet(nn.Module):
    """Images (N, 3, 32, 32) to class scores."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = _convolution(3, 192, 3)
        self.block3a = _Inception(192, 64, (96, 128), (16, 32), 32)
        self.block3b = _Inception(256, 128, (128, 192), (32, 96), 64)
        self.pool3 = nn.MaxPool2d(3, stride=2, padding=1)
        self.block4a = _Inception(480, 192, (96, 208), (16, 48), 64)
        self.block4b = _Inception(512, 160, (112, 224), (24, 64), 64)
        self.block4c = _Inception(512, 128, (128, 256), (24, 64), 64)
        self.block4d = _Inception(512, 112, (144, 288), (32, 64), 64)
        self.block4e = _Inception(528, 256, (160, 320), (32, 128), 128)
        self.pool4 = nn.MaxPool2d(3, stride=2, padding=1)
        self.block5a = _Inception(832, 256, (160, 320), (32, 128), 128)
        self.block5b = _Inception(832, 384, (192, 384), (48, 128), 128)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.linear = nn.Linear(1024, num_classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool3(self.block3b(self.block3a(self.stem(x))))
        x = self.block4c(self.block4b(self.block4a(x)))
        x = self.pool4(self.block4e(self.block4d(x)))
        scores: Tensor = self.linear(self.head(self.block5b(self.block5a(x))))
        return scores


class _Inception(nn.Module):
    """Four branches side by side; a pair of widths is that of the reduction and that of what follows it."""

    def __init__(self, width: int, ones: int, threes: tuple[int, int], fives: tuple[int, int], pooled: int) -> None:
        super().__init__()
        self.branch1 = _convolution(width, ones, 1)
        self.branch3 = nn.Sequential(_convolution(width, threes[0], 1), _convolution(*threes, 3))
        self.branch5 = nn.Sequential(
            _convolution(width, fives[0], 1), _convolution(*fives, 3), _convolution(fives[1], fives[1], 3)
        )
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _convolution(width, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)], 1)


def _convolution(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )
