"""A tree of image files, one folder per class, decoded batch by batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize
from torchvision.transforms.functional import hflip, pil_to_tensor, resized_crop

from pcafast.data.augment import random_box
from pcafast.data.images import RGB, ImageDataset
from pcafast.errors import ArgumentError, FileError


def open_folder(root: Path, *, train: bool, image_size: int | None) -> ImageDataset:
    """The split of a tree root/{train,test|val}/class/file, or all of root/class/file, as RGB images."""
    folder = _split_folder(root, train=train)
    try:
        tree = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise FileError(f"{folder} must hold one folder per class with images in each, but: {error}") from error
    return FolderImages(root, tree.samples, len(tree.classes), image_size)


def _split_folder(root: Path, *, train: bool) -> Path:
    """Checks that both splits have the same classes, since these are numbered by their order."""
    trains = root / "train"
    tests = root / "test" if (root / "test").is_dir() else root / "val"
    if not trains.is_dir() and not tests.is_dir():
        return root
    wanted, other = (trains, tests) if train else (tests, trains)
    if not wanted.is_dir():
        raise FileError(f"{root} has the folder {other.name} but not {wanted.name}.")
    if other.is_dir() and (odd := _classes(wanted) ^ _classes(other)):
        raise FileError(
            f"{wanted} and {other} must have the same class folders, but only one of them has "
            f"{', '.join(sorted(odd)[:3])}{', ...' if len(odd) > 3 else ''}."
        )
    return wanted


def _classes(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.is_dir()}


class FolderImages(ImageDataset):
    """Image files, decoded when asked for; grey ones and those with a palette become RGB.

    To augment is to crop at random, resize to the usual size, and mirror half of the images.
    """

    def __init__(
        self, root: Path, samples: Sequence[tuple[str, int]], num_classes: int, image_size: int | None
    ) -> None:
        self._paths = [path for path, _ in samples]
        if image_size is None:
            self._crop = Compose([])
            height, width = _common_size(root, self._paths)
        else:
            # ImageNet's usual margin: 256 for a crop of 224.
            self._crop = Compose([Resize(round(image_size * 256 / 224)), CenterCrop(image_size)])
            height = width = image_size
        labels = torch.tensor([label for _, label in samples])
        super().__init__(root, (3, height, width), labels, num_classes, RGB)

    def _pixels(self, indices: Tensor, augment: torch.Generator | None) -> Tensor:
        return torch.stack([self._decode(self._paths[index], augment) for index in indices.tolist()])

    def _decode(self, path: str, augment: torch.Generator | None) -> Tensor:
        with _opened(path) as image:
            image = image.convert("RGB")
            image = self._crop(image) if augment is None else self._random_crop(image, augment)
            pixels: Tensor = pil_to_tensor(image)
        return pixels

    def _random_crop(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        box = random_box(image.height, image.width, generator)
        cropped: Image.Image = resized_crop(image, *box, list(self.shape[1:]))
        return hflip(cropped) if torch.rand((), generator=generator) < 0.5 else cropped


def _common_size(root: Path, paths: Sequence[str]) -> tuple[int, int]:
    """(H, W) of all images, from their headers alone; ends at the first that differs."""
    sizes = {}
    for path in paths:
        with _opened(path) as image:
            sizes[image.size] = path
        if len(sizes) == 2:
            one, two = (f"{file} is {width}x{height}" for (width, height), file in sizes.items())
            raise ArgumentError(
                f"image_size is required for {root}, whose images differ in size: {one}, {two}. "
                "Give the side of the square images that the model expects, for instance 224."
            )
    ((width, height),) = sizes
    return height, width


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # damaged bytes raise OSError, SyntaxError, ValueError, ...
        raise FileError(f"cannot read the image {path}: truncated or not an image ({error}). Remove it.") from error
