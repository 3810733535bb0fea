"""Pruning in the middle of a training: going on with the optimizer's momenta, cut like the parameters, or without.

A ResNet-20 on CIFAR-10, from the given weights, at a learning rate as in the middle of a training. After some batches
it is pruned to 80 % of its MACs, and goes on; losses are means over the batches after that, the same ones both times.
PCAFAST_DATA names a folder with cifar10-{train,test}.npz and resnet20-12fca82f.th.
"""

import copy
import itertools
import os
from pathlib import Path

import results
import torch
import torch.nn.functional as F
from torch import nn

import pcafast
from pcafast.data import loader, open_dataset
from pcafast.models import build
from pcafast.progress import track

DATA = Path(os.environ["PCAFAST_DATA"])
BEFORE, AFTER, SEEDS = 40, 20, 3


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list, what: str) -> list[float]:
    """The loss of each batch."""
    losses = []
    model.train()
    for images, labels in track(batches, what):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def losses(seed: int) -> dict[str, float]:
    """The mean loss after pruning, in both ways."""
    torch.manual_seed(seed)
    model = build("resnet20", weights=DATA / "resnet20-12fca82f.th")
    data = open_dataset(str(DATA / "cifar10-train.npz"), "train")
    batches = list(
        itertools.islice(loader(data, batch_size=128, shuffle=True, augment=True, seed=seed), BEFORE + AFTER)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    train(model, optimizer, batches[:BEFORE], f"seed {seed}")
    plan = pcafast.plan_pruning(
        model,
        pcafast.scores.normalised(pcafast.scores.filter_norm(model)),
        budget=pcafast.Budget(macs=0.8),
        example_input=batches[0][0][:1],
    )
    found = {}
    for what, keep_state in (("with momenta", True), ("without", False)):
        whole, small = model, plan.apply(model)
        going_on = torch.optim.SGD(whole.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        going_on.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        pcafast.rebind_optimizer(going_on, plan, whole, small, keep_state=keep_state)
        after = train(small, going_on, batches[BEFORE:], f"seed {seed}, {what}")
        found[what] = sum(after) / len(after)
    return found


if __name__ == "__main__":
    results.write("handover", {str(seed): losses(seed) for seed in range(SEEDS)})
