"""Data sets that fit into memory: scikit-learn's digits, torchvision's folders, .npz files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pcafast.data.images import MemoryImages, Normalisation
from pcafast.errors import FileError


def read_digits(*, train: bool) -> MemoryImages:
    """1,437 training and 360 test digits of 8x8 pixels, in scikit-learn's order.

    Every fifth image of the set sorted by class is a test image, so both splits have all classes alike.
    """
    from sklearn.datasets import load_digits  # here, as torchvision below, since these take a second to import

    digits = load_digits()
    by_class = np.argsort(digits.target, kind="stable")
    chosen = np.full(len(by_class), train)
    chosen[by_class[::5]] = not train
    return MemoryImages(Path("digits"), digits.images[chosen] / 16, digits.target[chosen])


def read_mnist(root: Path, *, train: bool) -> MemoryImages:
    """The folder that torchvision makes, holding MNIST/raw with the unpacked idx files."""
    from torchvision.datasets import MNIST

    mnist = _open(lambda: MNIST(str(root), train=train), root / "MNIST" / "raw")
    normalisation = Normalisation((0.1307,), (0.3081,))
    return MemoryImages(
        root / "MNIST", mnist.data.numpy(), mnist.targets.numpy(), num_classes=10, normalisation=normalisation
    )


def read_cifar10(root: Path, *, train: bool) -> MemoryImages:
    """The folder that torchvision makes, holding cifar-10-batches-py.

    These files are pickles; torchvision opens them only if their checksums are those of the originals.
    """
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    cifar = _open(lambda: CIFAR10(str(root), train=train), folder)
    return MemoryImages(folder, cifar.data, np.array(cifar.targets), num_classes=10)


def _open(dataset: Callable[[], Any], folder: Path) -> Any:
    try:
        return dataset()
    except Exception as error:  # damaged files raise RuntimeError, AssertionError, ValueError, ...
        raise FileError(
            f"cannot read {folder}: a file is missing or truncated. Unpack the original archives there again."
        ) from error


def read_npz(path: Path) -> MemoryImages:
    """One .npz with `images` and `labels`; the number of classes is the largest label and one."""
    try:
        with open(path, "rb") as file, np.load(file) as archive:
            arrays = {name: archive[name] for name in ("images", "labels") if name in archive.files}
            found = ", ".join(archive.files) or "nothing"
    except Exception as error:  # damaged bytes raise BadZipFile, ValueError, EOFError, zlib.error, ...
        raise FileError(f"cannot read {path}: truncated, or no .npz file of numbers ({error}).") from error
    if len(arrays) < 2:
        raise FileError(f"{path} must hold the arrays images and labels, but holds {found}.")
    return MemoryImages(path, arrays["images"], arrays["labels"])
