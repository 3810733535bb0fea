"""What every data set is to the rest of pcafast: normalised images and integer labels, batch by batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pcafast.errors import FileError


class Normalisation(NamedTuple):
    """Per-channel mean and standard deviation of pixels in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


RGB = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Normalisation((0.5,), (0.5,))


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
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One batch: images (N, C, H, W), float32, and labels (N,), int64."""
        pixels = self._pixels(indices)
        scaled = pixels.contiguous().float() / (1 if pixels.is_floating_point() else 255)
        return (scaled - self._mean) / self._std, self._labels[list(indices)]

    @abstractmethod
    def _pixels(self, indices: Sequence[int]) -> Tensor:
        """Pixels (N, C, H, W), uint8 or float in 0..1."""


class MemoryImages(ImageDataset):
    """Images kept in memory as they were stored: uint8, or float in 0..1."""

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

    def _pixels(self, indices: Sequence[int]) -> Tensor:
        return self._images[list(indices)]


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
