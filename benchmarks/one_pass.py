"""Covariances of all layers of a ResNet-56 in one pass, against one layer per pass.

The peer is pca-compress's procedure: for every layer a forward of the data that ends at the layer, and the products of
its outputs from one float32 matrix product of a permuted copy. Both sides see the same images in the same batches.

PCAFAST_DATA names a folder with cifar10-train.npz and resnet56-4bfd9763.th.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

import results
import torch
from torch import Tensor, nn

import pcafast
from pcafast.data import loader, open_dataset
from pcafast.models import build
from pcafast.progress import track

IMAGES = 512
DATA = Path(os.environ["PCAFAST_DATA"])


class _ReachedError(Exception):
    """The forward need not go on."""


def one_layer(model: nn.Module, layer: nn.Module, batches: list[Tensor]) -> Tensor:
    """The covariance of one layer's outputs, as pca-compress computes it."""
    count, total, products = 0, torch.zeros(()), torch.zeros(())

    def take(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count, total, products
        rows = (output if output.ndim == 2 else output.permute(0, 2, 3, 1)).reshape(-1, output.shape[1])
        count, total, products = count + len(rows), total + rows.sum(0), products + rows.T @ rows
        raise _ReachedError

    handle = layer.register_forward_hook(take)
    for batch in batches:
        with suppress(_ReachedError):
            model(batch)
    handle.remove()
    mean = total / count
    return products / count - torch.outer(mean, mean)


def one_pass(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The covariances of all layers."""
    with pcafast.collect(model, covariance=pcafast.Covariance()) as stats:
        for batch in batches:
            model(batch)
    return {name: one.compute().covariance for name, one in stats["covariance"].items()}


if __name__ == "__main__":
    model = build("resnet56", weights=DATA / "resnet56-4bfd9763.th").eval()
    train = open_dataset(str(DATA / "cifar10-train.npz"), "train")
    batches = [images for images, _ in loader(train, batch_size=128, images=IMAGES)]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    with torch.inference_mode():
        one_pass(model, batches[:1])
        begin = time.perf_counter()
        together = one_pass(model, batches)
        middle = time.perf_counter()
        apart = {name: one_layer(model, layer, batches) for name, layer in track(layers.items(), "one by one")}
        end = time.perf_counter()
        forward = time.perf_counter()
        for batch in batches:
            model(batch)
        plain = time.perf_counter() - forward
    for name, covariance in apart.items():
        assert (covariance - together[name]).norm() < 1e-3 * covariance.norm(), name
    found = {"seconds": middle - begin, "one_by_one_seconds": end - middle, "forward_seconds": plain}
    results.write("one_pass", {"layers": len(layers), "images": IMAGES, **found})
