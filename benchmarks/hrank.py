"""Rank scores of a ResNet-56, the whole procedure: HRank's against one pass of pcafast over the same 640 images.

HRank passes over the images once for each of the 55 places where a ReLU puts out feature maps, and there finds the rank
of every map of every image by an SVD of its own. Both sides have the same network, batches and threads; where they
disagree about a map, an SVD in float64 says who is right.

PCAFAST_DATA names a folder with cifar10-train.npz and resnet56-4bfd9763.th.
"""

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn.functional as F
from rank_case import exact_ranks, one_by_one
from torch import Tensor, nn

import pcafast
from pcafast.data import loader, open_dataset
from pcafast.functional import feature_map_rank
from pcafast.models import build
from pcafast.progress import track

IMAGES, BATCH_SIZE = 640, 128
Batches = Iterable[tuple[Tensor, Tensor]]
Take = Callable[[Tensor], None]
Place = Callable[[Take], Any]
"""Registers a hook that is given the maps of this place in every forward pass, and returns its handle."""


def places(model: nn.Module) -> dict[str, Place]:
    """HRank's places in a CIFAR ResNet, by the convolution before: the first ReLU, and both of every block."""
    found = {"conv1": partial(_at_input, model.layer1)}
    for stage in ("layer1", "layer2", "layer3"):
        for number, block in enumerate(model.get_submodule(stage)):
            found[f"{stage}.{number}.conv1"] = partial(_at_input, block.conv2)
            found[f"{stage}.{number}.conv2"] = partial(_at_output, block)  # after the addition
    return found


def _at_input(module: nn.Module, take: Take) -> Any:
    return module.register_forward_pre_hook(lambda _, inputs: take(inputs[0]))


def _at_output(module: nn.Module, take: Take) -> Any:
    return module.register_forward_hook(lambda _, __, output: take(output))


@torch.no_grad()
def hrank(model: nn.Module, batches: Batches, place: Place) -> tuple[Tensor, list[Tensor]]:
    """One pass for one place: the scores (C,), a float32 mean updated batch by batch; and each batch's ranks (N, C)."""
    ranks: list[Tensor] = []
    scores, total = torch.zeros(()), 0

    def take(maps: Tensor) -> None:
        nonlocal scores, total
        ranks.append(one_by_one(maps))
        scores = (scores * total + ranks[-1].float().sum(0)) / (total + len(maps))
        total += len(maps)

    handle = place(take)
    for images, labels in batches:
        outputs = model(images)
        F.cross_entropy(outputs, labels).item()
        (outputs.argmax(1) == labels).sum().item()
    handle.remove()
    return scores, ranks


@torch.no_grad()
def one_pass(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """The scores of all layers by pcafast."""
    with pcafast.collect(model, rank=pcafast.FeatureMapRank(), layers=nn.Conv2d) as stats:
        for images, _ in batches:
            model(images)
    return {layer: one.compute().cpu() for layer, one in stats["rank"].items()}


@torch.no_grad()
def differences(model: nn.Module, batches: Batches, theirs: dict[str, list[Tensor]]) -> Counter[str]:
    """Maps about which HRank and pcafast disagree, and how many of those each has wrong."""
    found: Counter[str] = Counter(maps=0, differing=0, hrank_wrong=0, pcafast_wrong=0)

    def compare(rest: Iterator[Tensor], maps: Tensor) -> None:
        ours, other = feature_map_rank(maps).cpu(), next(rest)
        differing = ours != other
        exact, _ = exact_ranks(maps.cpu()[differing])
        found["maps"] += ours.numel()
        found["differing"] += len(exact)
        found["hrank_wrong"] += int((other[differing] != exact).sum())
        found["pcafast_wrong"] += int((ours[differing] != exact).sum())

    with ExitStack() as hooks:
        for layer, ranks in theirs.items():
            hooks.callback(places(model)[layer](partial(compare, iter(ranks))).remove)
        for images, _ in batches:
            model(images)
    return found


def procedures(model: nn.Module, batches: Batches, chosen: Iterable[str]) -> dict[str, Any]:
    """Time both, HRank's for the chosen places and pcafast's for all, and compare what they find."""
    one_pass(model, batches)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        ours = one_pass(model, batches)
        seconds.append(time.perf_counter() - begin)
    where, theirs, hrank_seconds = places(model), {}, {}
    for layer in chosen:
        begin = time.perf_counter()
        theirs[layer] = hrank(model, batches, where[layer])
        hrank_seconds[layer] = time.perf_counter() - begin
    found = differences(model, batches, {layer: ranks for layer, (_, ranks) in theirs.items()})
    gaps = [float((ours[layer] - scores).abs().max()) for layer, (scores, _) in theirs.items()]
    images = sum(len(images) for images, _ in batches)
    # Scores may differ by those maps and by the rounding of a float32 mean, and by nothing else.
    assert max(gaps) <= found["differing"] * 64 / images + 1e-4, gaps
    assert found["pcafast_wrong"] == 0, found
    return {
        "images": images,
        "places": len(theirs),
        "threads": torch.get_num_threads(),
        "hrank_seconds": sum(hrank_seconds.values()),
        "pcafast_seconds": statistics.median(seconds),
        "hrank_seconds_by_place": hrank_seconds,
        "largest_difference_of_scores": max(gaps),
        **found,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES, help="results of fewer are shown and not written")
    count = parser.parse_args().images
    data = Path(os.environ["PCAFAST_DATA"])
    network = build("resnet56", weights=data / "resnet56-4bfd9763.th").eval()
    dataset = open_dataset(str(data / "cifar10-train.npz"), "train")
    batches = loader(dataset, batch_size=BATCH_SIZE, images=count)
    measured = procedures(network, batches, track(places(network), "HRank's procedure"))
    measured["speedup"] = measured["hrank_seconds"] / measured["pcafast_seconds"]
    print(json.dumps({key: value for key, value in measured.items() if not isinstance(value, dict)}, indent=2))
    if count == IMAGES:
        results.write("hrank", measured)
