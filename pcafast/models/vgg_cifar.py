"""VGG-16 (Simonyan & Zisserman 2014, arXiv 1409.1556, configuration D) for small images.

After five halvings a 32x32 image is a single pixel, so that one hidden layer of 512 takes the place of the two of 4096.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from pcafast.models.initial import he_normal

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_HIDDEN = 512


class CifarVGG16(nn.Module):
    """Images (N, 3, 32, 32) to class scores; with batch norm after every layer but the last, or without."""

    def __init__(self, num_classes: int = 10, *, batch_norm: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(*_features(batch_norm))
        self.classifier = nn.Sequential(
            nn.Linear(_WIDTHS[-1][-1], _HIDDEN, bias=not batch_norm),
            *([nn.BatchNorm1d(_HIDDEN)] if batch_norm else []),
            nn.ReLU(),
            nn.Linear(_HIDDEN, num_classes),
        )
        he_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.features(x).flatten(1))
        return scores


def _features(batch_norm: bool) -> Iterator[nn.Module]:
    channels = 3
    for widths in _WIDTHS:
        for width in widths:
            yield nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm)
            if batch_norm:
                yield nn.BatchNorm2d(width)
            yield nn.ReLU()
            channels = width
        yield nn.MaxPool2d(2)
