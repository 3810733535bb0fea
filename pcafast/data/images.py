"""What every data set is to the rest of pcafast: normalised images and integer labels, batch by batch."""

from abc import ABC, abstractmethod
from copy import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pcafast.data.augment import shifted
from pcafast.errors import FileError


class Normalisation(NamedTuple):
    """Per-channel mean and standard deviation of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


RGB = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Normalisation((0.5,), (0.5,))

_KEPT_ON_DEVICE = 512 * 2**20


class ImageDataset(Dataset[tuple[Tensor, int]], ABC):
    """Labelled images of one size, to be batched by `pcafast.data.loader`.

    Pixels are scaled to 0..1, then normalised: RGB by ImageNet's mean (0.485, 0.456, 0.406) and standard
    deviation (0.229, 0.224, 0.225), MNIST by 0.1307 and 0.3081, other grey images by 0.5 and 0.5.

    Attributes:
        name: the data set's, for reports.
        shape: of one image, (C, H, W).
        num_classes: labels are below it.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        labels: Tensor,
        num_classes: int,
        normalisation: Normalisation,
    ) -> None:
        self.name = path.absolute().name
        self.shape = shape
        self.num_classes = num_classes
        self._labels = labels
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(torch.tensor([index]))
        return images[0], int(labels[0])

    def batch(self, indices: Tensor, augment: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), float32, and labels (N,), int64, on the data set's device.

        Args:
            indices: (N,), on the CPU.
            augment: draw random changes to the images from this generator; None leaves them as they are.
        """
        pixels = self._pixels(indices, augment).to(self._mean.device)
        scaled = pixels.contiguous().float() / (1 if pixels.is_floating_point() else 255)
        return (scaled - self._mean) / self._std, self._labels[indices.to(self._labels.device)]

    def to(self, device: torch.device) -> "ImageDataset":
        """The same images, with batches on that device."""
        moved = copy(self)
        moved._move(device)
        return moved

    def _move(self, device: torch.device) -> None:
        self._mean, self._std, self._labels = (part.to(device) for part in (self._mean, self._std, self._labels))

    @abstractmethod
    def _pixels(self, indices: Tensor, augment: torch.Generator | None) -> Tensor:
        """Pixels (N, C, H, W), uint8 or float in 0..1, on any device."""


class MemoryImages(ImageDataset):
    """Images kept in memory as they were stored: uint8, or float in 0..1.

    To augment is to pad by an eighth with black and to crop at random, and to mirror half of the colour images.
    """

    def __init__(
        self,
        path: Path,
        images: NDArray[np.generic],
        labels: NDArray[np.generic],
        *,
        num_classes: int | None = None,
        normalisation: Normalisation | None = None,
    ) -> None:
        _check_images(path, images)
        _check_labels(path, labels, len(images), num_classes)
        kept = torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.float32))
        # (N, C, H, W) as a view: batches are copied anyway.
        self._images = kept[:, None] if kept.ndim == 3 else kept.permute(0, 3, 1, 2)
        channels, height, width = self._images.shape[1:]
        super().__init__(
            path,
            (channels, height, width),
            torch.from_numpy(labels.astype(np.int64)),
            num_classes or int(labels.max()) + 1,
            normalisation or (RGB if channels == 3 else GREY),
        )

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        if self._images.nbytes < _KEPT_ON_DEVICE:
            self._images = self._images.to(device)

    def _pixels(self, indices: Tensor, augment: torch.Generator | None) -> Tensor:
        pixels = self._images[indices.to(self._images.device)]
        if augment is None:
            return pixels
        # The mirror image of a digit or letter is another one or none.
        return shifted(pixels, augment, mirror=self.shape[0] == 3)


def _check_images(path: Path, images: NDArray[np.generic]) -> None:
    if images.ndim != 3 and not (images.ndim == 4 and images.shape[3] in (1, 3)):
        raise FileError(
            f"{path}: images must have the shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), got {images.shape}."
        )
    if images.size == 0:
        raise FileError(f"{path} is empty: its images have the shape {images.shape}.")
    if np.issubdtype(images.dtype, np.floating):
        low, high = images.min(), images.max()
        if not (low >= 0 and high <= 1):
            raise FileError(
                f"{path}: images of floats must lie in 0..1, got {low} to {high}. "
                "Store them before normalisation, or as uint8."
            )
    elif images.dtype != np.uint8:
        raise FileError(f"{path}: images must be uint8 or floats in 0..1, got {images.dtype}.")


def _check_labels(path: Path, labels: NDArray[np.generic], count: int, num_classes: int | None) -> None:
    if labels.shape != (count,):
        raise FileError(f"{path}: labels must have the shape ({count},), one per image, got {labels.shape}.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise FileError(f"{path}: labels must be integers from 0 on, got {labels.dtype}.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        expected = "0 and up" if num_classes is None else f"0 to {num_classes - 1}"
        raise FileError(f"{path}: labels out of range: expected {expected}, got {low} to {high}.")
