"""Planning to halve the MACs of torchvision's networks: how long it takes, and how close it comes.

Every network is planned for at 224x224 by the L1 norms of its filters. That the pruned network computes what the whole
one does without the removed channels is checked by ``plan_pruning`` itself, and once more here on another input.
"""

import time
import warnings
from typing import Any

import results
import torch
from torch import nn

import pcafast
from pcafast.models import build
from pcafast.plan.trace import trace
from pcafast.progress import track

NETWORKS = [
    "resnet50",
    "densenet121",
    "googlenet",
    "vgg16_bn",
    "mobilenet_v2",
    "convnext_tiny",
    "regnet_y_400mf",
    "efficientnet_b0",
]
BUDGET = pcafast.Budget(macs=0.5)


def planned(name: str) -> dict[str, Any]:
    """The figures of one network."""
    torch.manual_seed(0)
    model = build(f"torchvision:{name}").eval()
    x = torch.randn(1, 3, 224, 224)
    begin = time.perf_counter()
    plan = pcafast.plan_pruning(model, pcafast.scores.filter_norm(model), budget=BUDGET, example_input=x, min_width=4)
    seconds = time.perf_counter() - begin
    small = plan.apply(model)
    other = torch.randn(2, 3, 192, 192)
    share = trace(small, x).macs / trace(model, x).macs
    assert share <= BUDGET.share, (name, share)
    with torch.no_grad():
        outputs = small(other)
    assert outputs.shape == (2, 1000), (name, outputs.shape)
    assert outputs.isfinite().all(), name
    return {
        "layers": sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()),
        "share_of_macs": share,
        "share_of_params": plan.reached["params"]["share"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    results.write("planning", {name: planned(name) for name in track(NETWORKS, "planning")})
