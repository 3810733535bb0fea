"""Timing on a GPU, or on the CPU."""

import statistics
import time
from collections.abc import Callable

import torch

OVERWRITTEN = 256 << 20  # bytes, several times a cache


def milliseconds(call: Callable[[], object], device: str, budget: float = 100) -> float:
    """Median time of 3 to 30 calls, as many as fit the budget, by the GPU's own clock if there is one."""
    measure = on_gpu if device == "cuda" else on_cpu
    call()
    repeats = min(max(int(budget / measure(call)), 3), 30)
    return statistics.median(measure(call) for _ in range(repeats))


def on_gpu(call: Callable[[], object]) -> float:
    """Milliseconds between the call's first and last work, which finds nothing of its inputs in the L2 cache."""
    torch.zeros(OVERWRITTEN, dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def on_cpu(call: Callable[[], object]) -> float:
    """Milliseconds."""
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3
