"""What a model costs: parameters, multiply-adds and time."""

import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcafast.loop.batches import device_of
from pcafast.modes import evaluating
from pcafast.plan.trace import trace

WARM_UP = 3


class Costs(NamedTuple):
    """Of one model: number of parameters, MACs for one input, and the median seconds for a batch."""

    params: int
    macs: int
    seconds: float


def measure(*models: nn.Module, batch: Tensor, repeats: int = 30) -> list[Costs]:
    """Count parameters and MACs (per example) of models and time their forward, in evaluation mode.

    Args:
        models: timed in turns, so that what else the machine does is the same for all; their modes stay.
        batch: inputs (N, ...) to time.
        repeats: a time is the median of as many forwards, after a few to warm up.
    """
    macs = [trace(model, batch[:1].to(device_of(model))).macs for model in models]
    params = [sum(parameter.numel() for parameter in model.parameters()) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for _ in range(WARM_UP + repeats):
        for model, seconds in zip(models, times, strict=True):
            with evaluating(model), torch.inference_mode():
                seconds.append(_seconds(model, batch.to(device_of(model))))
    return [
        Costs(count, products, statistics.median(seconds[WARM_UP:]))
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
