"""The experiment of pca-compress's train_mnist.py: a network that is made low-rank before it is trained.

Of a network with random weights, layers are factorised along the directions in which its outputs change most, by the
projection-loss Hessian, and only then is it trained. Beside it are the same network with random factors of the same
shapes, and the network as it was.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import nn

from pcafast import bases
from pcafast.apply import random_factors
from pcafast.data import Batches, ImageDataset, Split, loader, open_dataset
from pcafast.errors import ArgumentError
from pcafast.loop import evaluate, projection_hessians
from pcafast.models import build
from pcafast.plan import Plan, plan_low_rank
from pcafast.plan.trace import trace
from pcafast.progress import track
from pcafast.recipes.recipe import Results, Table

SUMMARY = "MNIST: a network made low-rank before training, against random factors and the whole one (pca-compress)"

RANKS = {"conv1": 8, "conv2": 32, "fc1": 64}
MEAN_IMAGES = 100
SAMPLES = 2000
BATCH_SIZE = 64
LEARNING_RATE = 1.0
"""At the beginning; it falls to zero along a straight line. That of pca-compress falls to 0.7 of it after each of 14
epochs, which in three leaves it so high that the networks cannot be told apart."""

_SHAPE = (1, 28, 28)


def run(data: Path, *, epochs: int = 3, seeds: int = 3, seed: int = 0, device: torch.device | str = "cpu") -> Results:
    """Train all three networks alike.

    Args:
        data: torchvision's folder, holding MNIST/raw.
        epochs: of every training.
        seeds: how often, each time with other weights and another order of the images.
        seed: the first of the seeds.
        device: where to train.

    Returns:
        The layers left whole, with the reason; and of each network its parameters, its MACs, and for every seed the
        test accuracy after each epoch.

    Raises:
        ArgumentError: the images are of another size.
        FileError: the data cannot be read.
    """
    for name, number in (("epochs", epochs), ("seeds", seeds)):
        if number < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {number}.")
    train, test = _opened(data, "train"), loader(_opened(data, "test"), batch_size=500, device=device)
    networks: dict[str, Results] = {}
    for number in range(seed, seed + seeds):
        batches = loader(train, batch_size=BATCH_SIZE, shuffle=True, seed=number, device=device)
        torch.manual_seed(number)
        whole = build("mnist_cnn").to(device).eval()
        plan = _plan(whole, batches, number)
        started = {
            "Hessian": plan.apply(whole),
            "random factors": random_factors(whole, plan, seed=number),
            "whole": whole,
        }
        for name, network in started.items():
            row = networks.setdefault(name, {**_costs(network), "accuracy": {}})
            torch.manual_seed(number)  # for dropout
            row["accuracy"][str(number)] = list(_accuracies(network, batches, test, epochs, f"{name}, seed {number}"))
    return {"ranks": RANKS, "left_whole": plan.skipped, "networks": networks}


def table(results: Results) -> Table:
    """Mean test accuracy over the seeds, after each epoch."""
    networks = results["networks"]
    seeds = len(next(iter(networks.values()))["accuracy"])
    rows = []
    for name, network in networks.items():
        runs = list(network["accuracy"].values())
        means = [f"{mean(epoch):.2%}" for epoch in zip(*runs, strict=True)]
        last = [accuracies[-1] for accuracies in runs]
        rows.append(
            [name, *means, f"{min(last):.2%} .. {max(last):.2%}", f"{network['params']:,}", f"{network['macs']:,}"]
        )
    epochs = [f"epoch {number + 1}" for number in range(len(rows[0]) - 4)]
    notes = [f"{layer} is left whole: {reason}" for layer, reason in results["left_whole"].items()]
    return Table(["", *epochs, f"of {seeds} seeds", "params", "MACs"], rows, notes)


def _opened(data: Path, split: Split) -> ImageDataset:
    dataset = open_dataset(str(data), split)
    if dataset.shape != _SHAPE:
        raise ArgumentError(
            f"data: expected torchvision's folder of MNIST, whose images have the shape {_SHAPE}; those of {data} have "
            f"{dataset.shape}."
        )
    return dataset


def _plan(network: nn.Module, batches: Batches, seed: int) -> Plan:
    hessians = projection_hessians(
        network, batches, layers=list(RANKS), fit="local", samples=SAMPLES, mean_images=MEAN_IMAGES, seed=seed
    )
    found = {name: bases.hessian(matrix) for name, matrix in hessians.items()}
    return plan_low_rank(network, found, ranks=RANKS, example_input=torch.zeros(1, *_SHAPE))


def _costs(network: nn.Module) -> Results:
    params = sum(parameter.numel() for parameter in network.parameters())
    return {"params": params, "macs": trace(network, torch.zeros(1, *_SHAPE)).macs}


def _accuracies(network: nn.Module, batches: Batches, test: Batches, epochs: int, what: str) -> Iterator[float]:
    """Test accuracy after each epoch of training, in which every network sees the same batches."""
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adadelta(network.parameters(), LEARNING_RATE)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        network.train()
        for images, labels in track(batches, f"{what}, epoch {epoch + 1} of {epochs}"):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()
        yield evaluate(network, test).accuracy
