"""Labelled images by name or path, and the loader that batches them."""

from pathlib import Path
from typing import Literal, get_args

import torch

from pcafast.data.batches import Batches
from pcafast.data.images import ImageDataset
from pcafast.data.readers import read_cifar10, read_digits, read_mnist, read_npz
from pcafast.errors import ArgumentError, FileError

__all__ = ["Batches", "ImageDataset", "Split", "loader", "open_dataset"]

Split = Literal["train", "test"]


def open_dataset(spec: str, split: Split, *, image_size: int | None = None) -> ImageDataset:
    """Open one split of a data set.

    Args:
        spec: `digits` (scikit-learn's, 8x8), or a path, in which `{split}` stands for train or test:
            a torchvision folder (holding MNIST/raw or cifar-10-batches-py); a tree of image files,
            {train,test|val}/class/file or class/file, the latter serving as both splits; or an .npz with
            `images`, uint8 or float in 0..1, (N, H, W), (N, H, W, 1) or (N, H, W, 3), and integer
            `labels`, (N,).
        split: `train` or `test`.
        image_size: side to which a tree of image files is resized and centre-cropped; needed where the
            files differ in size.

    Raises:
        ArgumentError: an argument is wrong, or image_size is missing.
        FileError: nothing is there, or what is there is damaged or not such a data set.
    """
    if split not in get_args(Split):
        raise ArgumentError(f"split must be 'train' or 'test', got {split!r}.")
    if image_size is not None and image_size < 1:
        raise ArgumentError(f"image_size must be at least 1, got {image_size}.")
    path = Path(spec.replace("{split}", split))
    train = split == "train"
    if spec == "digits":
        dataset = read_digits(train=train)
    elif (path / "MNIST" / "raw").is_dir():
        dataset = read_mnist(path, train=train)
    elif (path / "cifar-10-batches-py").is_dir():
        dataset = read_cifar10(path, train=train)
    elif path.is_dir():
        from pcafast.data.folder import open_folder  # torchvision takes a second to import

        return open_folder(path, train=train, image_size=image_size)
    elif path.exists():
        dataset = read_npz(path)
    else:
        raise FileError(f"no data set {path} exists: expected 'digits', an .npz file or a folder.")
    if image_size is not None:
        raise ArgumentError(f"image_size is for trees of image files only; leave it out for {spec}.")
    return dataset


def loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    shuffle: bool = False,
    augment: bool = False,
    seed: int = 0,
    images: int | None = None,
    device: torch.device | str | None = None,
) -> Batches:
    """Batches of images (N, C, H, W), float32, and labels (N,), int64, the same ones for the same seed.

    Every pass draws a new order and new changes to the images, which depend on the seed and on the number of the pass
    only: after ``set_epoch(e)``, the next pass is the one that was number e, from 0 on, or would be. Torch's global
    generator is not touched.

    Args:
        dataset: the images.
        batch_size: images per batch; the last batch may be smaller.
        shuffle: draw a new order for every pass.
        augment: change the images at random, as is usual for training. Those in memory are padded by an eighth of their
            size with black, 4 pixels for 32, and cropped to their size at random, and half of them are mirrored if they
            are in colour. From image files, a crop of 8 % to all of the area, of sides 3:4 to 4:3, is resized, and half
            of them are mirrored.
        seed: of the subset, of the order and of the changes.
        images: draw this many images at random and leave out the others; None takes all, in their order.
        device: of the batches; None is the CPU. A data set in memory of less than 512 MiB is copied there as a whole.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1, got {batch_size}.")
    if not 0 <= seed < 2**64:
        raise ArgumentError(f"seed must lie in 0..2**64 - 1, got {seed}.")
    if images is not None and not 1 <= images <= len(dataset):
        raise ArgumentError(f"images must lie in 1..{len(dataset)}, the size of {dataset.name}, got {images}.")
    chosen = torch.arange(len(dataset))
    if images is not None:
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:images]
    if device is not None:
        dataset = dataset.to(torch.device(device))
    return Batches(dataset, chosen, batch_size=batch_size, shuffle=shuffle, augment=augment, seed=seed)
