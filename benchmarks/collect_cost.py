"""What collecting costs: time and peak memory of forward and backward of ResNet-56, with and without statistics.

PCAFAST_DATA names a folder with resnet56-4bfd9763.th and cifar10-train.npz.
"""

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import results
import torch
import torch.nn.functional as F

import pcafast
from pcafast import Covariance, FeatureMapRank, Taylor
from pcafast.data import loader, open_dataset
from pcafast.models import build
from pcafast.progress import track

IMAGES, BATCH_SIZE, ROUNDS = 1024, 128, 5
KINDS: dict[str, Callable[[], dict[str, pcafast.Statistic]]] = {
    "covariance": lambda: {"covariance": Covariance()},
    "taylor": lambda: {"taylor": Taylor()},
    "rank": lambda: {"rank": FeatureMapRank()},
    "all three": lambda: {"covariance": Covariance(), "taylor": Taylor(), "rank": FeatureMapRank()},
}
DATA = Path(os.environ["PCAFAST_DATA"])


def prepare(images: int) -> tuple[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The network, and the batches, already loaded."""
    dataset = open_dataset(str(DATA / "cifar10-train.npz"), "train")
    model = build("resnet56", weights=DATA / "resnet56-4bfd9763.th").eval()
    return model, list(loader(dataset, batch_size=BATCH_SIZE, images=images))


def one_pass(model: torch.nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]], kind: str | None) -> float:
    """Seconds for forward and backward over all batches."""
    start = time.perf_counter()
    with pcafast.collect(model, **KINDS[kind]()) if kind else nullcontext():
        for images, labels in batches:
            F.cross_entropy(model(images), labels).backward()
    return time.perf_counter() - start


def check(model: torch.nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """See that the statistics of a layer are right before they are timed."""
    images, labels = batches[0]
    with pcafast.collect(model, layers="conv1", **KINDS["all three"]()) as stats:
        F.cross_entropy(model(images), labels).backward()
    x = model.conv1(images).detach().requires_grad_()
    maps = F.relu(model.bn1(x))
    rest = torch.nn.Sequential(model.layer1, model.layer2, model.layer3, torch.nn.AdaptiveAvgPool2d(1))
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.linear(rest(maps).flatten(1)), labels), x)
    exact = torch.cov(x.double().transpose(0, 1).flatten(1), correction=0)
    torch.testing.assert_close(stats["covariance"]["conv1"].compute().covariance, exact, rtol=1e-5, atol=1e-7)
    taylor = (len(labels) * (x * gradient).double().mean((2, 3))).abs().mean(0)
    torch.testing.assert_close(stats["taylor"]["conv1"].compute(), taylor, rtol=1e-3, atol=1e-9)
    rank = torch.linalg.matrix_rank(maps.detach().double(), rtol=32 * 2.0**-23).double().mean(0)
    torch.testing.assert_close(stats["rank"]["conv1"].compute(), rank, rtol=1e-3, atol=0)


def times() -> dict[str, float]:
    """Median seconds of one pass, plain and with each kind of statistic, measured in turns."""
    model, batches = prepare(IMAGES)
    check(model, batches)
    one_pass(model, batches[:1], "all three")
    measured: dict[str, list[float]] = {"plain": [], **{kind: [] for kind in KINDS}}
    for _ in track(range(ROUNDS), "timing"):
        for kind, seconds in measured.items():
            seconds.append(one_pass(model, batches, None if kind == "plain" else kind))
    return {kind: statistics.median(seconds) for kind, seconds in measured.items()}


def allocated_peak(kind: str | None) -> int:
    """Bytes that torch's allocator held at most in a training step, above what it held before."""
    model, batches = prepare(BATCH_SIZE)
    model.train()
    one_pass(model, batches, kind)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        one_pass(model, batches, kind)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def resident_peak(kind: str) -> int:
    """Bytes of memory that a fresh process held at most over three training steps."""
    command = [sys.executable, __file__, "--steps", kind]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def train_three_steps(kind: str) -> None:
    """In the fresh process."""
    model, batches = prepare(BATCH_SIZE)
    model.train()
    one_pass(model, batches * 3, None if kind == "plain" else kind)
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    print(int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024)


if __name__ == "__main__":
    if "--steps" in sys.argv:
        train_three_steps(sys.argv[-1])
    else:
        seconds = times()
        peaks = {kind: allocated_peak(None if kind == "plain" else kind) for kind in ("plain", "all three")}
        resident = {kind: resident_peak(kind) for kind in ("plain", "all three")}
        results.write(
            "collect_cost",
            {
                "images": IMAGES,
                "seconds": seconds,
                "times_plain": {kind: value / seconds["plain"] for kind, value in seconds.items()},
                "training_step_allocated_bytes": peaks,
                "training_step_resident_bytes": resident,
                "allocated_growth": peaks["all three"] / peaks["plain"] - 1,
                "resident_growth": resident["all three"] / resident["plain"] - 1,
            },
        )
