"""What a model costs: parameters, multiply-adds and time."""

import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcafast.loop.batches import device_of
from pcafast.modes import evaluating
from pcafast.plan.trace import trace


class Costs(NamedTuple):
    """Of one model: number of parameters, MACs for one input, and the median seconds for a batch."""

    params: int
    macs: int
    seconds: float


def measure(model: nn.Module, batch: Tensor, *, repeats: int = 20) -> Costs:
    """Count parameters and MACs (per example) and time the forward of one batch, in evaluation mode.

    Args:
        model: its modes are as before afterwards.
        batch: inputs (N, ...).
        repeats: the time is the median of as many forwards, after a few to warm up.
    """
    batch = batch.to(device_of(model))
    macs = trace(model, batch[:1]).macs
    with evaluating(model), torch.inference_mode():
        for _ in range(3):
            model(batch)
        seconds = statistics.median(_seconds(model, batch) for _ in range(repeats))
    params = sum(parameter.numel() for parameter in model.parameters())
    return Costs(params, macs, seconds)


def _seconds(model: nn.Module, batch: Tensor) -> float:
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    start = time.perf_counter()
    model(batch)
    if batch.is_cuda:
        torch.cuda.synchronize(batch.device)
    return time.perf_counter() - start
