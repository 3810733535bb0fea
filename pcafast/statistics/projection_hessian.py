"""Quadratic forms for the loss that leaving a direction of an activation out causes, fitted to samples of it."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pcafast.errors import ArgumentError
from pcafast.statistics.statistic import Side, State, Statistic

Fit = Literal["sampled", "local"]

# Relative: the gradient at which conjugate gradients stop, and the sums of eigenvalues that count as none.
_TOLERANCE = 1e-12


class ProjectionHessianFit(NamedTuple):
    """Mean (D,) of the activation and the symmetric form (D, D), float64, and how well it fits the samples.

    The residual is the relative root-mean-square misfit: sqrt(sum of squared errors / sum of squared values).
    """

    mean: Tensor
    hessian: Tensor
    residual: float


@dataclasses.dataclass(kw_only=True)
class ProjectionHessian(Statistic):
    """A symmetric H with v'Hv close to the loss of projecting the unit direction v out of a layer's activation.

    The projection a <- a - v (v.(a - m)) keeps the mean m. ``pcafast.projection_hessians`` makes these, as they take
    forward passes of their own; the state, the samples themselves, is on the CPU.

    ``sampled`` is given losses: H is the least-squares solution of v'Hv = loss. ``local`` is given products Hv of the
    loss to second order: H is the least-squares solution of Hv = product. With delta(v) = -v (v.(a - m)) and L'' the
    Hessian of an example's loss by the activation, that loss is Q(v) = delta' L'' delta / 2, if the loss has its
    minimum where nothing is projected out. Q is quartic in v, since the direction is also inside of delta, so L'' delta
    is no linear function of v. But Q(v) / |v|^2 is the same on the unit sphere and homogeneous of degree two; half of
    its gradient at a unit v,

        h(v) = dQ/dv / 2 - Q(v) v    with    dQ/dv = (d delta / dv)' L'' delta,

    is the product Hv exactly wherever Q(v) = v'Hv on the sphere, and v.h(v) = Q(v) always.

    Attributes:
        side: whether directions are of the layer's output channels, or of the patches that it multiplies its weight
            with (D = C * kh * kw in the order of ``unfold``).
        fit: to losses ("sampled") or to second-order products ("local").
        loss: the name of the loss between the original and the changed outputs.
        ranked: fit the ranks of the losses instead, 0 the smallest; equal losses share the mean of their ranks.
    """

    states: ClassVar[dict[str, State]] = {
        "count": State(),
        "total": State(("dimensions",)),
        "directions": State(("samples", "dimensions")),
        "values": State(("samples", "values of a sample")),
        "skipped": State(dtype=torch.int64),
    }
    growing_sizes: ClassVar[frozenset[str]] = frozenset({"samples"})

    side: Side = "output"
    fit: Fit = "sampled"
    loss: str = "mse"
    ranked: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranked and self.fit == "local":
            raise ArgumentError('ranked: expected fit="sampled" with it, since the local fit has no losses to rank')

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The values that settings with few of them can have."""
        return {**super().choices(), "tap": ("layer",), "fit": get_args(Fit)}

    def fits(self, layer: nn.Module) -> bool:
        """No layer's mere output: refused, since ``collect`` runs no forward passes."""
        raise ArgumentError(
            "statistics: a ProjectionHessian takes forward passes with directions left out, which collect does not "
            "run. pcafast.projection_hessians(model, batches) does."
        )

    def update_mean(self, mean: Tensor, count: int) -> None:
        """Take in the mean (D,) of the activation over so many positions."""
        if mean.ndim != 1:
            raise ArgumentError(f"mean: expected shape (D,), got {tuple(mean.shape)}")
        self._take(len(mean), count=torch.tensor(float(count)), total=mean * count)

    def update(self, directions: Tensor, values: Tensor) -> None:
        """Take in samples; those with NaN or infinities are left out and counted.

        Args:
            directions: (N, D), of unit length.
            values: losses (N,), or products (N, D) for the local fit.
        """
        if directions.ndim != 2:
            raise ArgumentError(f"directions: expected shape (N, D), got {tuple(directions.shape)}")
        expected = directions.shape if self.fit == "local" else directions.shape[:1]
        if values.shape != expected:
            what = "products" if self.fit == "local" else "losses"
            raise ArgumentError(f"values: expected {what} of shape {tuple(expected)}, got {tuple(values.shape)}")
        rows = values if self.fit == "local" else values.unsqueeze(1)
        finite = (rows.isfinite().all(1) & directions.isfinite().all(1)).cpu()
        samples = {"directions": directions.cpu()[finite], "values": rows.cpu()[finite]}
        with self._noticing_nonfinite():
            self._take(directions.shape[1], **samples, skipped=(~finite).sum())

    def compute(self) -> ProjectionHessianFit:
        """The mean, the fitted form, and the relative misfit.

        Raises:
            ArgumentError: there are fewer samples than the fit has unknowns.
        """
        self._require_data()
        directions, values = self._state["directions"], self._state["values"]
        samples, dimensions = directions.shape
        local = self.fit == "local"
        needed = dimensions if local else dimensions * (dimensions + 1) // 2
        if samples < needed:
            left_out = f", besides {self.skipped} with NaN or infinities" if self.skipped else ""
            raise ArgumentError(
                f"ProjectionHessian of layer {self.layer!r}: expected at least {needed:,} samples, "
                f"{'D' if local else 'D (D + 1) / 2'} for directions of D = {dimensions}, got {samples:,}{left_out}. "
                "Take more samples."
            )
        if self.ranked:
            values = _ranks(values[:, 0]).unsqueeze(1)
        hessian = (_from_products if local else _from_losses)(directions, values)
        hessian = (hessian + hessian.T) / 2
        found = directions @ hessian if local else _forms(directions, hessian)
        size = values.norm()
        residual = float((found - values).norm() / size) if size > 0 else 0.0
        return ProjectionHessianFit(self._mean(), hessian, residual)

    def merge(self, other: "ProjectionHessian") -> None:
        """Take in all that ``other`` has seen, as if this statistic had seen it."""
        mine, theirs = self._state, other._state
        super().merge(other)  # which adds up what are sums
        if mine and theirs:
            samples = ("directions", "values")
            self._state |= {name: torch.cat([mine[name], theirs[name]]) for name in samples}

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the statistics of all processes into each of them. All must call it, once, at the end."""
        gathered: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(gathered, self._state, group)
        self.reset()
        for state in gathered:
            part = dataclasses.replace(self)
            part.load_state_dict(state)
            self.merge(part)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state, forgetting the present one.

        Raises:
            ArgumentError: names, shapes or dtypes are not those of this statistic.
        """
        if {"values", "directions"} <= set(state):
            expected = state["directions"].shape[-1] if self.fit == "local" else 1
            if state["values"].shape[-1:] != (expected,):
                raise ArgumentError(
                    f"state 'values': expected {expected} of each sample for fit={self.fit!r}, got shape "
                    f"{tuple(state['values'].shape)}"
                )
        super().load_state_dict(state)

    def _take(self, dimensions: int, **new: Tensor) -> None:
        part = dataclasses.replace(self)
        width = dimensions if self.fit == "local" else 1
        sizes = {"dimensions": dimensions, "samples": 0, "values of a sample": width}
        state = part._ready(torch.device("cpu"), sizes)
        state.update({name: tensor.detach().to(state[name]) for name, tensor in new.items()})
        self.merge(part)

    def _mean(self) -> Tensor:
        return self._state["total"] / self._state["count"].clamp(min=1)

    def _has_data(self) -> bool:
        return len(self._state["directions"]) > 0


def _forms(directions: Tensor, hessian: Tensor) -> Tensor:
    """The values v'Hv of all directions, (N, 1)."""
    return ((directions @ hessian) * directions).sum(1, keepdim=True)


def _from_losses(directions: Tensor, losses: Tensor) -> Tensor:
    """The symmetric H with the least sum of (v'Hv - loss)^2.

    By conjugate gradients on the normal equations (CGLS; Bjorck, Numerical Methods for Least Squares Problems, 7.4.1),
    with the operator H -> diag(V H V') and its adjoint e -> V' diag(e) V. For Gaussian directions and enough of them
    all eigenvalues are close to each other, but one, of the identity, so that a few dozen rounds do.
    """
    hessian = directions.new_zeros(directions.shape[1], directions.shape[1])
    errors = losses.clone()
    gradient = step = directions.T @ (errors * directions)
    size = first = gradient.square().sum()
    for _ in range(2 * hessian.numel()):
        if size <= _TOLERANCE**2 * first:
            break
        change = _forms(directions, step)
        length = size / change.square().sum()
        hessian += length * step
        errors -= length * change
        gradient = directions.T @ (errors * directions)
        size, previous = gradient.square().sum(), size
        step = gradient + size / previous * step
    return hessian


def _from_products(directions: Tensor, products: Tensor) -> Tensor:
    """The symmetric H with the least sum of |Hv - product|^2, which solves HS + SH = G + G'.

    S = sum v v' and G = sum product v'. In the eigenvectors of S that is an equation for each entry of H by itself.
    """
    values, vectors = torch.linalg.eigh(directions.T @ directions)
    cross = products.T @ directions
    right = vectors.T @ (cross + cross.T) @ vectors
    sums = values.unsqueeze(1) + values
    seen = sums > _TOLERANCE * sums.max()  # where no sample points to, H is 0
    hessian: Tensor = vectors @ torch.where(seen, right / sums, 0.0) @ vectors.T
    return hessian


def _ranks(losses: Tensor) -> Tensor:
    """0 for the smallest; equal ones have the mean of their ranks."""
    _, place, counts = losses.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts.double() + 1) / 2
    return ranks[place]
