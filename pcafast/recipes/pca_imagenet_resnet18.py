"""The experiment of pca-compress's train_imagenet.py: a ResNet-18 on a tree of images, made low-rank step by step.

Its options have the same meaning here. The convolutions of stride 1 keep a share of their ranks, which falls by a
factor from step to step with retraining in between. pca-compress takes the last layer first, so that each sees an
uncompressed network before it; here all statistics of a step come from one pass, over that very network.
"""

import math
from pathlib import Path

import torch
from torch import nn

from pcafast.data import loader, open_dataset
from pcafast.errors import ArgumentError
from pcafast.loop import compress
from pcafast.models import build
from pcafast.recipes.recipe import Results, Table

SUMMARY = "ImageNet, or any tree of images by class: ResNet-18 made low-rank step by step (pca-compress)"


def run(
    data: Path,
    *,
    weights: Path | None = None,
    prune_dim: float = 0.5,
    prune_step: float = 0.5,
    prune_samples: int = 30_000,
    tune_lr: float = 1e-4,
    tune_epochs: int = 0,
    batch_size: int = 32,
    image_size: int = 224,
    refit: bool = False,
    work: Path = Path("pcafast-imagenet"),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Results:
    """Compress, and evaluate after every step.

    Args:
        data: images by class, under train/ and val/.
        weights: a checkpoint of torchvision's resnet18; without one its weights are random.
        prune_dim: the share of its ranks that every convolution of stride 1 keeps in the end.
        prune_step: what the share is multiplied by in each step at the least, in as many equal steps as it then takes.
        prune_samples: training images for the statistics of each step.
        tune_lr: learning rate of retraining.
        tune_epochs: of retraining after each step.
        batch_size: of everything.
        image_size: side of the images.
        refit: whether factors are fitted front to back, which pca-compress does not do.
        work: the folder of the run, which can be killed and gone on with: it has the result and its report.
        seed: of all that is random.
        device: where to compute.

    Raises:
        ArgumentError: a number is out of range.
        FileError: the data cannot be read, or the folder is of another run.
    """
    for name, value in (("prune_dim", prune_dim), ("prune_step", prune_step)):
        if not 0 < value < 1:
            raise ArgumentError(f"{name}: expected a share in (0, 1), got {value}.")
    train, test = (open_dataset(str(data), split, image_size=image_size) for split in ("train", "test"))
    torch.manual_seed(seed)  # for weights that are not given
    folders = data / "train" if (data / "train").is_dir() else data
    classes = sum(entry.is_dir() for entry in folders.iterdir())
    model = build("torchvision:resnet18", num_classes=None if weights else classes, weights=weights).to(device)
    report = compress(
        model,
        "pca",
        ratio=prune_dim,
        steps=math.ceil(math.log(prune_dim) / math.log(prune_step) - 1e-9),
        refit=refit,
        reestimate_batch_norm=False,  # pca-compress does not
        layers=[name for name, one in model.named_modules() if isinstance(one, nn.Conv2d) and one.stride == (1, 1)],
        train=loader(train, batch_size=batch_size, shuffle=True, augment=True, seed=seed, device=device),
        test=loader(test, batch_size=batch_size, device=device),
        calibration=loader(train, batch_size=batch_size, images=min(prune_samples, len(train)), seed=seed),
        retrain_epochs=tune_epochs,
        learning_rate=tune_lr,
        seed=seed,
        name="resnet18",
        data={"train": train.name, "test": test.name, "batch_size": batch_size},
        out=work,
    ).report
    layers = {one["layer"]: [one["before"], one["after"]] for one in report["layers"] if one["before"] != one["after"]}
    return {"history": report["history"], "ranks": layers, "before": report["before"], "after": report["after"]}


def table(results: Results) -> Table:
    """What is left after each stage."""
    first = results["history"][0]
    rows = [
        [
            f"step {entry['step']}, {entry['stage']}" + (f", epoch {entry['epoch']}" if "epoch" in entry else ""),
            f"{entry['accuracy']:.2%}",
            f"{entry['macs'] / first['macs']:.1%}",
            f"{entry['params'] / first['params']:.1%}",
        ]
        for entry in results["history"]
    ]
    after, before = results["after"], results["before"]
    speed = before["latency_seconds"] / after["latency_seconds"]
    ranks = ", ".join(f"{layer} {new} of {old}" for layer, (old, new) in results["ranks"].items())
    notes = [f"ranks: {ranks}", f"a batch of {after['latency_batch_size']} runs {speed:.2f} times as fast"]
    return Table(["", "accuracy", "MACs", "params"], rows, notes)
