"""Command-line options that several commands share, and the model and data they stand for."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from pcafast import models
from pcafast.data import Batches, ImageDataset, loader
from pcafast.errors import ArgumentError
from pcafast.result import load

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help=f"{', '.join(models.available())}, torchvision:NAME or your own package.module:function."
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Checkpoint: .pt, .pth, .th or .safetensors.")]
Data = Annotated[
    str,
    typer.Option(
        help="digits; a folder of torchvision's MNIST or CIFAR-10, or of images by class; or an .npz file. "
        "{split} in a path becomes train or test; a path without it serves as both."
    ),
]
NumClasses = Annotated[int | None, typer.Option(help="Outputs of the model, if not the model's own number.")]
ImageSize = Annotated[int | None, typer.Option(help="Resize and crop images of a folder to this side.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per batch.")]
Images = Annotated[int, typer.Option(min=1, help="Training images for statistics, drawn at random; at most all.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is random.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; by default the GPU if there is one.")]


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ArgumentError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"--device: this machine has no GPU that torch can use, got {name!r}")
    return device


def build_model(
    name: str, weights: Path | None, compressed: Path | None, num_classes: int | None, device: str | None
) -> nn.Module:
    """The model, with its weights, on its device; ``compressed`` is a result folder made from it."""
    target = choose_device(device)
    if weights and compressed:
        raise ArgumentError("--compressed holds its own weights, so it does not go together with --weights")
    model = models.build(name, num_classes=num_classes, weights=weights)
    if compressed is not None:
        try:
            model = load(model, compressed)
        except ArgumentError as error:
            raise ArgumentError(
                f"--compressed {compressed} was not made from the model {name} as built here. Give the name and the "
                f"options, such as --num-classes, that it was compressed with. ({error})"
            ) from error
    elif weights is None:
        Console(stderr=True).print(f"note: without --weights, {name} has random weights", highlight=False)
    return model.to(target)


def training_batches(dataset: ImageDataset, images: int, batch_size: int, seed: int) -> Batches:
    """The random subset for statistics."""
    return loader(dataset, batch_size=batch_size, images=min(images, len(dataset)), seed=seed)
