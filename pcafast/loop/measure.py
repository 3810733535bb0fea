"""What a model costs: parameters, multiply-adds and time."""

import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcafast.modes import device_of, evaluating
from pcafast.plan.trace import trace
from pcafast.progress import track

WARM_UP = 3
LONG_ENOUGH = 10.0
"""Seconds after which a few repeats have to do."""


class Costs(NamedTuple):
    """Of one model: number of parameters, MACs for one input, and the median seconds for a batch of a size."""

    params: int
    macs: int
    seconds: float
    batch_size: int


def measure(*models: nn.Module, batch: Tensor, repeats: int = 30) -> list[Costs]:
    """Count parameters and MACs (per example) of models and time their forward, in evaluation mode.

    Args:
        models: timed in turns, so that what else the machine does is the same for all; their modes stay.
        batch: inputs (N, ...) to time.
        repeats: a time is the median of as many forwards, or fewer of a slow model, after a few to warm up.
    """
    macs = [trace(model, batch[:1].to(device_of(model))).macs for model in models]
    params = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    times: list[list[float]] = [[] for _ in models]
    begin = time.perf_counter()
    for count in track(range(WARM_UP + repeats), "timing"):
        if count > 2 * WARM_UP and time.perf_counter() - begin > LONG_ENOUGH:
            break
        for model, seconds in zip(models, times, strict=True):
            with evaluating(model), torch.inference_mode():
                seconds.append(_seconds(model, batch.to(device_of(model))))
    return [
        Costs(count, products, statistics.median(seconds[WARM_UP:]), len(batch))
        for count, products, seconds in zip(params, macs, times, strict=True)
    ]


def _seconds(model: nn.Module, batch: Tensor) -> float:
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    start = time.perf_counter()
    model(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - start
