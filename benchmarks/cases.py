"""What the benchmarks of operators have in common: one input, and the peers that are timed on it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
SHAPES = [(1, 2048, 7, 7), (64, 512, 14, 14), (64, 256, 28, 28), (128, 64, 112, 112)]
"""Of activations: within a core's L2 cache at first, 200 MB and more in 16 bits at last."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SGEMM_SIDE = 2048


@dataclass(frozen=True)
class Case:
    """One input of an operator, made and checked.

    Attributes:
        operator: its name.
        inputs: what the input is: its shape, its dtype.
        calls: what is timed, by the names of the peers.
        absent: peers that cannot run here, and why.
        multiply_adds: how many a call must do, for those of which it says how near they come to the processor's peak.
    """

    operator: str
    inputs: dict[str, Any]
    calls: dict[str, Callable[[], object]]
    absent: dict[str, str] = field(default_factory=dict)
    multiply_adds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """One way to add a batch to running sums, which start as zeros.

    Attributes:
        update: adds the batch.
        state: all that is kept between batches.
        covariance: what the sums come to.
        centred: whether that is about the mean.
    """

    update: Callable[[], object]
    state: list[Tensor]
    covariance: Callable[[], Tensor]
    centred: bool = True


def activations(shape: tuple[int, ...], dtype: str, layout: str, *, seed: int, device: str = "cpu") -> Tensor:
    """Standard normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
    return x.contiguous(memory_format=LAYOUTS[layout])


def check_covariance(name: str, side: Side, exact: Tensor, dtype: torch.dtype) -> None:
    """See that after one batch pcafast is within 1e-6 of the truth, and a peer nearly right for its dtype."""
    error = float((side.covariance().double() - exact).norm() / exact.norm())
    tolerance = 1e-6 if name == "pcafast" else max(1e-4, 6 * torch.finfo(dtype).eps)
    assert error < tolerance, f"{name} is off by {error:.1e}"


def with_sgemm(operator: str, inputs: dict[str, Any], sides: dict[str, Side], work: float, **more: Any) -> Case:
    """The case with a product of square float32 matrices beside it, the peak that pcafast's ``work`` is held to."""
    calls = {name: side.update for name, side in sides.items()}
    multiply_adds = {"pcafast": work, "sgemm": SGEMM_SIDE**3}
    return Case(operator, inputs, {**calls, "sgemm": sgemm()}, multiply_adds=multiply_adds, **more)


@functools.cache
def sgemm() -> Callable[[], Tensor]:
    a, b = (torch.randn(SGEMM_SIDE, SGEMM_SIDE) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)
