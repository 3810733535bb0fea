"""Projecting directions out of a layer's output or input while its model runs, a direction to each example."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pcafast.collect.layers import channel_dim
from pcafast.errors import ArgumentError
from pcafast.statistics.statistic import Side

Replace = Callable[[Tensor, Tensor], Tensor | None]


class Perturbation(NamedTuple):
    """What ``perturbed`` leaves behind of a forward pass.

    Attributes:
        epsilon: zeros that were added to the layer's output; requires a gradient.
        directions: (N, D), requires a gradient.
        change: of the layer's output by projecting the directions out, as a function of them.
    """

    epsilon: Tensor
    directions: Tensor
    change: Tensor


@dataclass(frozen=True)
class Site:
    """Where directions are projected out: a layer's output channels, or the patches that it multiplies its weight with.

    The patches p of a convolution are never formed. To replace each by p - v (v.(p - m)) changes the layer's output by
    -(W v) (v.p - v.m), where v.p at all positions is the layer's own convolution with v as its only filter.
    """

    name: str
    layer: nn.Module
    side: Side

    def problem(self) -> str | None:
        """Why there is no projecting here, if so."""
        if getattr(self.layer, "groups", 1) != 1:
            return f"its {self.layer.groups} groups have directions of their own each, which are not supported"
        if self.side == "input" and not isinstance(self.layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            return f'side="input" takes a Linear, Conv1d or Conv2d, and it is a {type(self.layer).__name__}'
        return None

    def mean(self, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """Mean (D,), float64, over the examples and positions of a forward pass, and the number of them."""
        rows = self._rows(x, y)
        if rows is not None:
            return rows.double().flatten(0, -2).mean(0), rows[..., 0].numel()
        # That of all patches is the gradient of the mean of all products v.p by v.
        filters = torch.zeros(1, *self._weight.shape[1:], dtype=torch.float64, device=x.device, requires_grad=True)
        with torch.enable_grad():
            products = self._convolve(x.detach().double(), filters)
            (mean,) = torch.autograd.grad(products.mean(), filters)
        return mean.flatten(), products.numel()

    def change(self, x: Tensor, y: Tensor, directions: Tensor, mean: Tensor) -> Tensor:
        """What projecting direction i (D,) out of example i adds to the layer's output y, given its input x."""
        if len(y) != len(directions):
            raise ArgumentError(
                f"layers: expected the output of layer {self.name!r} to have the {len(directions)} examples of the "
                f"batch in its first dimension, got shape {tuple(y.shape)}"
            )
        directions, mean = directions.to(y), mean.to(y)
        rows = self._rows(x, y)
        if rows is None:
            filters = directions.view(-1, 1, *self._weight.shape[1:])
            products = torch.func.vmap(self._convolve)(x.unsqueeze(1), filters).squeeze((1, 2))
        else:
            products = torch.einsum("n...d,nd->n...", rows, directions)
        coefficients = products - (directions @ mean).view(-1, *[1] * (products.ndim - 1))
        images = directions if self.side == "output" else directions @ self._weight.detach().flatten(1).T
        images = images.view(len(y), *[1] * (products.ndim - 1), -1)
        return -(coefficients.unsqueeze(-1) * images).movedim(-1, self._channel_dim)

    @contextmanager
    def replacing(self, replace: Replace) -> Iterator[None]:
        """While open, the layer's output is what this makes of its input and output, unless that is None."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            x = next(iter((*args, *kwargs.values())), None)
            needed = {"output": output, "input": x} if self.side == "input" else {"output": output}
            for what, value in needed.items():
                if not isinstance(value, Tensor):
                    raise ArgumentError(
                        f"layers: the {what} of layer {self.name!r} is expected to be a tensor, got "
                        f"{type(value).__name__}"
                    )
            return replace(x, output)  # type: ignore[arg-type]

        handle = self.layer.register_forward_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight

    @property
    def _channel_dim(self) -> int:
        return channel_dim(self.layer, 1)

    def _rows(self, x: Tensor, y: Tensor) -> Tensor | None:
        """The activation as (N, *, D), None if it is patches of a convolution."""
        if self.side == "output":
            return y.movedim(self._channel_dim, -1)
        return x if isinstance(self.layer, nn.Linear) else None

    def _convolve(self, x: Tensor, filters: Tensor) -> Tensor:
        products: Tensor = self.layer._conv_forward(x, filters, None)  # type: ignore[operator]
        return products


@contextmanager
def projected(site: Site, directions: Tensor, mean: Tensor) -> Iterator[None]:
    """While open, direction i (D,) is projected out of example i, the mean (D,) being kept."""
    with site.replacing(lambda x, y: y + site.change(x, y, directions, mean)):
        yield


@contextmanager
def perturbed(site: Site, directions: Tensor, mean: Tensor) -> Iterator[list[Perturbation]]:
    """While open, zeros are added to the layer's output and kept in the list, with what ``projected`` would add."""
    made: list[Perturbation] = []

    def perturb(x: Tensor, y: Tensor) -> Tensor:
        epsilon = torch.zeros_like(y, requires_grad=True)
        variables = directions.detach().requires_grad_()
        x = x.detach() if isinstance(x, Tensor) else x
        made.append(Perturbation(epsilon, variables, site.change(x, y.detach(), variables, mean)))
        return y + epsilon

    with site.replacing(perturb):
        yield made
