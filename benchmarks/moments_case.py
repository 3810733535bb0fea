"""Moments of channels: the peer, and the truth."""

import torch
from cases import Case, activations
from torch import Tensor

from pcafast.native import operators

PEERS = ("pcafast", "expression")


def moments_case(shape: tuple[int, ...], dtype: str, layout: str, device: str = "cpu") -> Case:
    """One batch, taken in by the operator behind ChannelMoments, against what torch offers for its four results."""
    x = activations(shape, dtype, layout, seed=0, device=device).relu_()
    state = empty_state(shape[1], device)

    def operator() -> None:
        operators.channel_moments_update_(x, 1, *state)

    operator()
    check(x, state)
    calls = {"pcafast": operator, "expression": lambda: expression(x)}
    return Case("moments", {"shape": shape, "dtype": dtype, "layout": layout}, calls)


def expression(x: Tensor) -> tuple[Tensor, ...]:
    """Mean, variance, mean absolute value, and share of zeros."""
    dims = (0, 2, 3)
    variance, mean = torch.var_mean(x, dim=dims, correction=0)
    return mean, variance, x.abs().mean(dims), (x == 0).float().mean(dims)


def empty_state(channels: int, device: str) -> list[Tensor]:
    """Positions; mean, centred squares, sum of |x| and zeros (C,); skipped batches; as the operator takes them."""
    shapes = [(), *[(channels,)] * 4]
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
    return [*sums, torch.zeros((), dtype=torch.int64, device=device)]


def check(x: Tensor, state: list[Tensor]) -> None:
    """See that the moments are those of the expression in float64, and nearly those of the expression as timed."""
    count, mean, *sums, skipped = state
    assert (int(count), int(skipped)) == (x.numel() // x.shape[1], 0)
    parts = [expression(some.double()) for some in x.split(16, dim=1)]
    found, eps = (mean, *(one / count for one in sums)), torch.finfo(x.dtype).eps
    for ours, exact, timed in zip(found, map(torch.cat, zip(*parts, strict=True)), expression(x), strict=True):
        torch.testing.assert_close(ours, exact.double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(timed.double(), exact.double(), rtol=max(eps, 1e-5), atol=0)
