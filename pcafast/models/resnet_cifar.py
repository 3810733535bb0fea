"""The CIFAR ResNets of He et al. 2015 (arXiv 1512.03385, section 4.2) with option-A shortcuts.

Parameter names are those of the public checkpoints of akamaster/pytorch_resnet_cifar10.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from pcafast.models.initial import he_normal


class CifarResNet(nn.Module):
    """Images (N, 3, 32, 32) to class scores; depth = 6 n + 2, with n blocks at each of three widths."""

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(x.mean(dim=(2, 3)))
        return scores


def _stage(blocks: int, in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    first = _Block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(_Block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        padding = (out_channels - in_channels) // 2
        self.shortcut = nn.Identity() if stride == 1 else _shortcut(stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


def _shortcut(stride: int, padding: int) -> nn.Sequential:
    """Option A: every stride-th pixel, between `padding` channels of zeros on either side; no parameters.

    These are modules, and not a slice and F.pad, so that pruning can change how many channels the padding adds.
    """
    # Of an (N, C, H, W) tensor the third dimension from the end, which ZeroPad3d pads too, is the channels.
    return nn.Sequential(nn.MaxPool2d(1, stride), nn.ZeroPad3d((0, 0, 0, 0, padding, padding)))
