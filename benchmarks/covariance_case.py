"""Covariance of channels: the peers, and the truth.

Every side adds a batch to running sums that are there already. The peers do so in the dtype of the batch: they find its
mean, subtract that from a copy, and add the products of what is left; what streaming takes besides, to move the sums to
the mean of all batches, is left out of theirs.
"""

from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Side, activations, check_covariance, with_sgemm
from torch import Tensor

from pcafast.native import operators


def permute_matmul(x: Tensor, total: Tensor) -> None:
    """pca-compress's way: a copy with a row for every position."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    rows = rows - rows.mean(0)
    total.addmm_(rows.T, rows)


def bmm_sum(x: Tensor, total: Tensor) -> None:
    maps = centred(x)
    total += torch.bmm(maps, maps.mT).sum(0)


def addmm_per_image(x: Tensor, total: Tensor) -> None:
    for maps in centred(x):
        total.addmm_(maps, maps.T)


def einsum(x: Tensor, total: Tensor) -> None:
    maps = centred(x)
    total += torch.einsum("ncp,ndp->cd", maps, maps)


def torch_cov(x: Tensor, total: Tensor) -> None:
    rows = x.movedim(1, 0).flatten(1)
    total.add_(torch.cov(rows, correction=0), alpha=rows.shape[1])


RECIPES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "permute, matmul": permute_matmul,
    "bmm, sum": bmm_sum,
    "addmm per image": addmm_per_image,
    "einsum": einsum,
}
ON_GPU = {**RECIPES, "torch.cov": torch_cov}
PEERS = ("pcafast", *RECIPES, "sgemm")


def covariance_case(network: str, shape: tuple[int, ...], layout: str) -> Case:
    """One batch of a layer's outputs, float32."""
    x = outputs(shape, "float32", layout)
    sides = checked_sides(x, RECIPES)
    inputs = {"shape": shape, "network": network, "layout": layout}
    return with_sgemm("covariance", inputs, sides, multiply_adds(shape))


def outputs(shape: tuple[int, ...], dtype: str, layout: str, device: str = "cpu") -> Tensor:
    """Normal numbers of mean 1."""
    return activations(shape, dtype, layout, seed=0, device=device).add_(1)


def multiply_adds(shape: tuple[int, ...]) -> float:
    """Of a symmetric product."""
    examples, channels, height, width = shape
    return channels**2 / 2 * examples * height * width


def sides(x: Tensor, recipes: dict[str, Callable[[Tensor, Tensor], None]]) -> dict[str, Callable[[], Side]]:
    """What makes each side."""
    return {"pcafast": lambda: native(x), **{name: lambda one=one: peer(x, one) for name, one in recipes.items()}}


def checked_sides(x: Tensor, recipes: dict[str, Callable[[Tensor, Tensor], None]]) -> dict[str, Side]:
    """Each side, after one batch."""
    made = {name: make() for name, make in sides(x, recipes).items()}
    exact = torch.cov(x.double().movedim(1, 0).flatten(1), correction=0)
    for name, side in made.items():
        side.update()
        check_covariance(name, side, exact, x.dtype)
    return made


def native(x: Tensor) -> Side:
    """The operator behind ``Covariance``."""
    state = empty_state(x.shape[1], x.device)
    return Side(lambda: operators.covariance_update_(x, 1, 1, 1.0, None, *state), state, lambda: state[2][0] / state[0])


def peer(x: Tensor, recipe: Callable[[Tensor, Tensor], None]) -> Side:
    total = x.new_zeros(x.shape[1], x.shape[1])
    count = x.numel() // x.shape[1]
    return Side(lambda: recipe(x, total), [total], lambda: total / count)


def empty_state(channels: int, device: Any) -> list[Tensor]:
    """Count, mean (C,), co-moment (1, C, C) and skipped batches, as the operator takes them."""
    shapes = [(), (channels,), (1, channels, channels)]
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
    return [*sums, torch.zeros((), dtype=torch.int64, device=device)]


def centred(x: Tensor) -> Tensor:
    """A copy (N, C, positions) without its mean."""
    maps = x.flatten(2)
    return maps - maps.mean((0, 2), keepdim=True)
