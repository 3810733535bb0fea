"""Random changes to training images, drawn from a generator of the caller's."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def shifted(pixels: Tensor, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """Pad images (N, C, H, W) by an eighth with zeros, 4 pixels for 32, and crop each one at random to its size.

    With mirror, half of them are flipped left to right. The generator is one of the CPU, for images on any device.
    """
    count, _, height, width = pixels.shape
    margins = max(1, height // 8), max(1, width // 8)
    rows, columns = (
        torch.arange(side) + torch.randint(2 * margin + 1, (count, 1), generator=generator)
        for side, margin in zip((height, width), margins, strict=True)
    )
    if mirror:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    image, rows, columns = (
        index.to(pixels.device) for index in (torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None])
    )
    padded = F.pad(pixels, (margins[1], margins[1], margins[0], margins[0]))
    return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)


def random_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop as for training on ImageNet (Szegedy et al. 2014, arXiv 1409.4842).

    Its area is 8 % to all of the image's and its sides are 3:4 to 4:3. If none in ten fits, it is the largest such
    crop in the middle.
    """
    for _ in range(10):
        share, tilt = torch.rand(2, generator=generator).tolist()
        area = (0.08 + 0.92 * share) * height * width
        shape = (4 / 3) ** (2 * tilt - 1)
        rows, columns = round(math.sqrt(area / shape)), round(math.sqrt(area * shape))
        if 1 <= rows <= height and 1 <= columns <= width:
            top, left = (
                int(torch.randint(spare + 1, (), generator=generator)) for spare in (height - rows, width - columns)
            )
            return top, left, rows, columns
    rows, columns = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - rows) // 2, (width - columns) // 2, rows, columns
