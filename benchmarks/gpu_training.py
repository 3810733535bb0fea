"""What collecting costs a training step of ResNet-50, and what one hook call costs."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import covariance_case
import taylor_case
import torch
import torch.nn.functional as F
from clock import on_cpu, on_gpu
from torch import Tensor, nn

from pcafast.collect import collect
from pcafast.models import build
from pcafast.native import operators
from pcafast.statistics import Covariance, Statistic, Taylor

ROUNDS, STEPS = 3, 4
KINDS: dict[str, Callable[[], dict[str, Statistic]]] = {
    "plain": dict,
    "taylor": lambda: {"taylor": Taylor()},
    "covariance": lambda: {"covariance": Covariance()},
    "both": lambda: {"taylor": Taylor(), "covariance": Covariance()},
}
HOOKED = 50
"""Layers of the network for hook calls."""


class Training:
    """A network, its optimizer and one batch of random images, channels last; bfloat16 by autocast."""

    def __init__(self, model: nn.Module, batch: tuple[int, ...], device: str) -> None:
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.images = torch.randn(batch, device=device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.arange(len(self.images), device=device) % 10
        self.device = device

    def backward(self, examples: int) -> None:
        """The loss of the first examples, and its gradients."""
        with torch.autocast(self.device, torch.bfloat16):
            loss = F.cross_entropy(self.model(self.images[:examples]), self.labels[:examples])
        loss.backward()

    def step(self) -> None:
        """With the whole batch."""
        self.optimizer.zero_grad()
        self.backward(len(self.images))
        self.optimizer.step()


def training(device: str, tiny: bool) -> dict[str, Any]:
    """Milliseconds and peak bytes of a step, plain and inside ``collect`` for all convolutions and linear layers."""
    torch.manual_seed(0)
    if tiny:
        case = Training(build("resnet20"), (2, 3, 32, 32), device)
    else:
        from torchvision.models import resnet50

        case = Training(resnet50(), (256, 3, 224, 224), device)
    check(case)
    case.step()
    found: dict[str, Any] = {"batch": list(case.images.shape)}
    if device == "cuda":
        peaks = {kind: peak(case, kind) for kind in KINDS}
        found["peak_bytes"] = peaks
        found["growth_of_peak"] = {kind: bytes_ / peaks["plain"] - 1 for kind, bytes_ in peaks.items()}
    times = milliseconds(case, 1 if tiny else ROUNDS)
    found["milliseconds"] = times
    found["times_plain"] = {kind: time / times["plain"] for kind, time in times.items()}
    found["hook_microseconds"] = hook_calls(device, 3 if tiny else 100)
    return found


def collecting(model: nn.Module, kind: str) -> AbstractContextManager[Any]:
    chosen = KINDS[kind]()
    return collect(model, **chosen) if chosen else nullcontext()


def milliseconds(case: Training, rounds: int) -> dict[str, float]:
    """Median of a step, measured in turns."""
    measure = on_gpu if case.device == "cuda" else on_cpu
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, times in found.items():
            with collecting(case.model, kind):
                case.step()  # in which the statistics make their state
                times += [measure(case.step) for _ in range(STEPS)]
    return {kind: statistics.median(times) for kind, times in found.items()}


def peak(case: Training, kind: str) -> int:
    """Bytes allocated at most in two steps, with the state of the statistics."""
    torch.cuda.reset_peak_memory_stats()
    with collecting(case.model, kind):
        case.step()
        case.step()
        return torch.cuda.max_memory_allocated()


def check(case: Training) -> None:
    """See that what is collected of the first convolution in such a step is right."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = case.model.conv1.register_forward_hook(keep)
    with collect(case.model, layers="conv1", **KINDS["both"]()) as stats:
        case.backward(8)
    handle.remove()
    (x,) = kept
    assert x.dtype == torch.bfloat16
    assert x.grad is not None
    examples = len(x)
    x, gradient = x.detach().double(), x.grad.double()
    covariance = stats["covariance"]["conv1"].compute().covariance
    exact = torch.cov(x.movedim(1, 0).flatten(1), correction=0)
    assert float((covariance - exact).norm() / exact.norm()) < 1e-6
    scores = (examples * (x * gradient).mean((2, 3))).abs().mean(0)
    # Sums over positions cancel.
    torch.testing.assert_close(stats["taylor"]["conv1"].compute(), scores, rtol=1e-3, atol=1e-6 * float(scores.max()))


def hook_calls(device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Host time of a hook call without its operator, and of the operator, where the kernels have next to nothing to do.

    Taylor has two hooks to a layer, of its output and of the gradient.
    """
    model = nn.Sequential(*[nn.Conv2d(2, 2, 1) for _ in range(HOOKED)]).to(device)
    x = torch.randn(1, 2, 1, 1, device=device)
    of_covariance, of_taylor = covariance_case.empty_state(2, device), taylor_case.empty_state(2, device)

    def covariance() -> None:
        operators.covariance_update_(x, 1, 1, 1.0, None, *of_covariance)

    def taylor() -> None:
        operators.taylor_update_(x, x, 1, 1.0, *of_taylor)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def backward() -> None:
        model(x).sum().backward()

    found = {}
    for kind, hooks, one_pass, operator in (("covariance", 1, forward, covariance), ("taylor", 2, backward, taylor)):
        plain, of_operators = (host_time(call, repeats) for call in (one_pass, lambda one=operator: times(HOOKED, one)))
        with collecting(model, kind):
            watched = host_time(one_pass, repeats)
        python = (watched - plain - of_operators) / (HOOKED * hooks)
        found[kind] = {"python": 1e6 * python, "operator": 1e6 * of_operators / HOOKED}
    return found


def times(count: int, call: Callable[[], None]) -> None:
    for _ in range(count):
        call()


def host_time(call: Callable[[], None], repeats: int) -> float:
    """Seconds until the call returns, at best, with the GPU idle at its begin and not waited for."""
    found = []
    call()
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return min(found)
