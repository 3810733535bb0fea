"""Accuracy of ResNet-20 and ResNet-56 after PCA without any retraining, on all CIFAR-10 test images.

Every row has at most the MACs of the first, which is pca-compress's rule: half the rank of every stride-1 convolution.
PCAFAST_DATA names a folder with cifar10-{train,test}.npz, resnet20-12fca82f.th and resnet56-4bfd9763.th.
"""

import copy
import os
from pathlib import Path
from typing import Any

import results
import torch
from torch import nn

import pcafast
from pcafast.data import loader, open_dataset
from pcafast.loop import calibrate, evaluate, measure
from pcafast.models import build
from pcafast.progress import track

IMAGES = 1024
DATA = Path(os.environ["PCAFAST_DATA"])
WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def compressed(name: str) -> dict[str, Any]:
    """All rows of one network."""
    model = build(name, weights=DATA / WEIGHTS[name])
    train, test = (open_dataset(str(DATA / f"cifar10-{split}.npz"), split) for split in ("train", "test"))
    test_batches = loader(test, batch_size=250)
    calibration = loader(train, batch_size=128, images=IMAGES)
    example = next(iter(test_batches))[0][:1]

    candidates: dict[str, nn.Module] = {"original": model}

    def reestimated(candidate: nn.Module) -> nn.Module:
        candidate = copy.deepcopy(candidate)
        pcafast.reestimate_batch_norm(candidate, calibration)
        return candidate

    stats = calibrate(model, track(calibration, "collecting"), covariance=pcafast.Covariance())["covariance"]
    stride_one = {
        layer: one
        for layer, one in stats.items()
        if isinstance(module := model.get_submodule(layer), nn.Conv2d) and module.stride == (1, 1)
    }
    uniform_plan = pcafast.plan_low_rank(model, stride_one, ratio=0.5, example_input=example)
    share = uniform_plan.reached["macs"]["share"]
    budget = pcafast.Budget(macs=share)
    uniform = uniform_plan.apply(model)
    chosen = pcafast.plan_low_rank(model, stats, budget=budget, example_input=example).apply(model)
    candidates |= {
        "half rank everywhere": uniform,
        "half rank everywhere, batch norm re-estimated": reestimated(uniform),
        "ranks by budget": chosen,
        "ranks by budget, batch norm re-estimated": reestimated(chosen),
    }
    evaluations = [evaluate(one, track(test_batches, f"{name}, {what}")) for what, one in candidates.items()]
    costs = measure(*candidates.values(), batch=next(iter(loader(test, batch_size=64)))[0])
    return {
        "share_of_macs": share,
        "rows": {
            what: {
                "correct": evaluation.correct,
                "accuracy": evaluation.accuracy,
                "macs": cost.macs,
                "milliseconds_for_64": cost.seconds * 1000,
            }
            for what, evaluation, cost in zip(candidates, evaluations, costs, strict=True)
        },
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    results.write("low_rank", {name: compressed(name) for name in WEIGHTS})
