"""How well directions are ranked by what their projection out of a layer's output costs, on ResNet-20 and CIFAR-10.

The truth is the mean squared change of the network's outputs on held-out test images. The predictors, all from training
images, are v'Hv of both fits and v'Cov v, PCA's. Three quarters of the directions are random: these belong to none of
them, and are the fair ones. The others are eigenvectors of the covariance, evenly from the first to the last: those
between which PCA chooses, and its easiest task, since their variances span orders of magnitude. None is an eigenvector
of H.

The sampled fit is to the ranks of the losses, as in pca-compress's MNIST experiment, so that a few images with large
losses do not decide. The loss is the squared error, and not the divergence of the class probabilities, because the
network is certain of most images: a few carry nearly all of the mean divergence.

PCAFAST_DATA names a folder with cifar10-{train,test}.npz and resnet20-12fca82f.th.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pcafast
from pcafast.bases import principal_components
from pcafast.collect.projection import Site, projected
from pcafast.data import loader, open_dataset
from pcafast.loop import calibrate, projection_hessians
from pcafast.loop.projection_losses import mean_squared_error
from pcafast.models import build
from pcafast.progress import track

DATA = Path(os.environ["PCAFAST_DATA"])
TRAINING, HELD_OUT = 8192, 256
RANDOM, EIGENVECTORS = 48, 16
SAMPLES = {"sampled": lambda dimensions: 8 * dimensions**2, "local": lambda dimensions: 4096}
OPTIONS = {"sampled": {"ranked": True}, "local": {}}
PARTS = {"random": slice(RANDOM), "eigenvectors": slice(RANDOM, None), "all": slice(None)}


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, where there are no ties."""
    return float(torch.corrcoef(torch.stack([one.argsort().argsort() for one in (a, b)]).double())[0, 1])


@torch.inference_mode()
def blocks(model: nn.Module, images: Tensor) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """The name of each part that holds convolutions, what it takes in, and the network from there on."""
    stem = nn.Sequential(model.conv1, model.bn1, nn.ReLU())
    stages = {
        f"{stage}.{i}": block
        for stage in ("layer1", "layer2", "layer3")
        for i, block in enumerate(getattr(model, stage))
    }
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.linear)
    parts = [stem, *stages.values()]
    for i, name in enumerate(["", *stages]):
        yield name, images, nn.Sequential(*parts[i:], head)
        images = parts[i](images)


@torch.inference_mode()
def true_losses(rest: nn.Module, x: Tensor, site: Site, mean: Tensor, directions: Tensor) -> Tensor:
    """The losses of projecting out each direction, (K, N)."""
    original = rest(x)
    losses = []
    for direction in directions:
        with projected(site, direction.expand(len(x), -1), mean):
            losses.append(mean_squared_error(original, rest(x)))
    return torch.stack(losses).double()


def directions_to_rank(covariance: Tensor) -> Tensor:
    """Random ones, and then eigenvectors, (K, D)."""
    generator = torch.Generator().manual_seed(1)  # the fits have seed 0
    random = F.normalize(torch.randn(RANDOM, len(covariance), generator=generator, dtype=torch.float64))
    chosen = torch.linspace(0, len(covariance) - 1, EIGENVECTORS).round().long()
    return torch.cat([random, principal_components(covariance).basis[chosen]])


def fitted(model: nn.Module, layers: list[str], batches: Any) -> dict[str, dict[str, Any]]:
    """The form, misfit, samples and share of the seconds of each fit and layer, and the same of the covariance."""
    rows: dict[str, dict[str, Any]] = {layer: {} for layer in layers}
    begin = time.perf_counter()
    stats = calibrate(model, batches, layers=layers, covariance=pcafast.Covariance())["covariance"]
    seconds = (time.perf_counter() - begin) / len(layers)
    for layer in layers:
        rows[layer]["PCA"] = {"matrix": stats[layer].compute().covariance, "seconds": seconds}
    widths = {layer: model.get_submodule(layer).out_channels for layer in layers}
    for fit, count in SAMPLES.items():
        for width in track(sorted(set(widths.values())), fit):
            chosen = [layer for layer in layers if widths[layer] == width]
            begin = time.perf_counter()
            made = projection_hessians(model, batches, layers=chosen, fit=fit, samples=count(width), **OPTIONS[fit])
            found = {layer: statistic.compute() for layer, statistic in made.items()}
            seconds = (time.perf_counter() - begin) / len(chosen)
            for layer, (mean, hessian, residual) in found.items():
                rows[layer][fit] = {
                    "matrix": hessian,
                    "residual": residual,
                    "samples": count(width),
                    "seconds": seconds,
                }
                rows[layer]["mean"] = mean
    return rows


def main() -> dict[str, Any]:
    """The figures of every convolution, in the order of the network."""
    model = build("resnet20", weights=DATA / "resnet20-12fca82f.th").eval()
    train, test = (open_dataset(str(DATA / f"cifar10-{split}.npz"), split) for split in ("train", "test"))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    fits = fitted(model, layers, loader(train, batch_size=128, images=TRAINING))
    images = next(iter(loader(test, batch_size=HELD_OUT, images=HELD_OUT, seed=2)))[0]
    begin = time.perf_counter()
    rows = {}
    for block, x, rest in track(list(blocks(model, images)), "true losses"):
        for layer in (layer for layer in layers if layer.rpartition(".")[0] == block):
            mean, predictors = fits[layer].pop("mean"), fits[layer]
            directions = directions_to_rank(predictors["PCA"]["matrix"])
            losses = true_losses(rest, x, Site(layer, model.get_submodule(layer), "output"), mean, directions)
            truth, halves = losses.mean(1), [half.mean(1) for half in losses.chunk(2, dim=1)]
            agreement = {name: rank_correlation(*(half[part] for half in halves)) for name, part in PARTS.items()}
            for predictor in predictors.values():
                predicted = ((directions @ predictor.pop("matrix")) * directions).sum(1)
                predictor["spearman"] = {
                    name: rank_correlation(predicted[part], truth[part]) for name, part in PARTS.items()
                }
            rows[layer] = {"dimensions": len(mean), "agreement_of_halves": agreement, **predictors}
    return {
        "images": HELD_OUT,
        "directions": {"random": RANDOM, "eigenvectors": EIGENVECTORS},
        "seconds_of_truth": time.perf_counter() - begin,
        "layers": rows,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    results.write("hessian", main())
