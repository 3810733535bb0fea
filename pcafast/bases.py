"""Directions to keep, from second-order statistics. Pure maths, always float64 on the CPU."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pcafast.errors import ArgumentError
from pcafast.statistics import (
    ActivationGradient,
    Covariance,
    GradientCovariance,
    PatchCovariance,
    ProjectionHessian,
    Statistic,
)
from pcafast.statistics.statistic import Side

Select = Literal["magnitude", "signed"]
"""Whether directions go by the magnitude of their eigenvalues, or by the eigenvalues with their signs."""

# Relative; covariances that were accumulated in float32 are symmetric to about this.
_SYMMETRY_TOLERANCE = 1e-6
# Of the largest eigenvalue of a metric: what its directions are taken to matter at least, so that it can be inverted.
_LEAST_METRIC = 1e-6


class PrincipalComponents(NamedTuple):
    """Eigenvalues (..., C), largest first and never negative, and the eigenvectors as rows of (..., C, C)."""

    variances: Tensor
    basis: Tensor


@dataclass(frozen=True)
class Basis:
    """Directions of a layer's output or input, those to keep first in front.

    With the first r of C directions kept, in each of g groups, an activation x becomes
    ``decoder[:, :, :r] @ encoder[:, :r] @ (x - mean) + mean``, and ``x`` itself with all of them.

    Attributes:
        side: whether they are of the layer's output, or of its input: the patches that it multiplies its weight with.
        mean: (g * C,); zero if directions are kept and left out about zero.
        encoder: (g, C, C), the directions as rows.
        decoder: (g, C, C), its inverse.
        left_out: (C + 1,), which share of all that the directions are worth is left out at rank r = 0..C; from 1 to 0.
    """

    side: Side
    mean: Tensor
    encoder: Tensor
    decoder: Tensor
    left_out: Tensor


def pca(covariance: Covariance | PatchCovariance) -> Basis:
    """Directions of the most variance: at each rank, the least squared error of the activation (Pearson, 1901)."""
    _expect(covariance, (Covariance, PatchCovariance), "covariance")
    moments = covariance.compute()
    return _orthonormal(covariance.side, moments.mean, *principal_components(moments.covariance))


def uncentred(covariance: Covariance | PatchCovariance) -> Basis:
    """As ``pca``, about zero instead of the mean: of the second moment E[x x']."""
    _expect(covariance, (Covariance, PatchCovariance), "covariance")
    mean, second = _second_moment(covariance)
    return _orthonormal(covariance.side, torch.zeros_like(mean), *principal_components(second))


def fisher(covariance: Covariance, gradient: GradientCovariance) -> Basis:
    """Directions of an output whose loss costs the most by the gradients there.

    At each rank the least E[(y - y~)' F (y - y~)], where F = E[g g'] is the second moment of the loss gradient by the
    output: the block of the empirical Fisher information, if the loss is the negative log-likelihood of the labels.
    Oblique, as F is no multiple of the identity: PCA of F^(1/2) y, brought back. Directions that hardly any gradient
    has are taken to matter a millionth of the one that matters most.
    """
    _expect(covariance, (Covariance,), "covariance")
    _expect(gradient, (GradientCovariance,), "gradient")
    if covariance.side != "output":
        raise ArgumentError("covariance: expected that of the layer's output, where gradients are of, got its input's.")
    if gradient.layer != covariance.layer:
        raise ArgumentError(f"gradient: expected that of layer {covariance.layer!r}, got that of {gradient.layer!r}.")
    moments = covariance.compute()
    weights, directions = principal_components(_second_moment(gradient)[1])
    blocks = _blocks(moments.covariance)
    if directions.reshape(-1, *directions.shape[-2:]).shape != blocks.shape:
        raise ArgumentError(
            f"gradient: expected that of the same layer, of shape {tuple(moments.covariance.shape)}, got "
            f"{tuple(directions.shape)}."
        )
    root = weights.clamp(min=_LEAST_METRIC * weights.amax()).sqrt() if weights.any() else torch.ones_like(weights)
    metric = _blocks(directions.mT @ (root.unsqueeze(-1) * directions))
    inverse = _blocks(directions.mT @ (directions / root.unsqueeze(-1)))
    variances, basis = principal_components(metric @ blocks @ metric)
    return Basis("output", _plain(moments.mean), basis @ metric, inverse @ basis.mT, left_out_shares(variances))


def gradient(matrix: ActivationGradient, *, select: Select) -> Basis:
    """Directions that change the loss the most to first order when they are left out.

    Leaving out b changes it by -b' A b, A = E[(a - mean) g'], so these are eigenvectors of -(A + A') / 2.

    Args:
        matrix: of the layer's output or input.
        select: "magnitude" keeps the directions of the largest changes; "signed" those whose loss would raise the loss
            the most, and leaves out first those without which it falls (pca-compress's ``greedy``).
    """
    _expect(matrix, (ActivationGradient,), "matrix")
    found = matrix.compute()
    return eigen(-found.symmetric / 2, found.mean, side=matrix.side, select=select)


def hessian(fit: ProjectionHessian, *, select: Select = "signed") -> Basis:
    """Directions whose projection out of the activation costs the most by a fitted quadratic form.

    Args:
        fit: of the layer's output or input.
        select: "signed" keeps those of the highest predicted losses; "magnitude" takes predictions below zero, which
            no loss of projection is, for as important as those above (as pca-compress does).
    """
    _expect(fit, (ProjectionHessian,), "fit")
    found = fit.compute()
    return eigen(found.hessian, found.mean, side=fit.side, select=select)


def eigen(matrix: Tensor, mean: Tensor, *, side: Side = "output", select: Select) -> Basis:
    """The eigenvectors of any symmetric matrix, (C, C) or one per group (g, C, C).

    Args:
        matrix: x' matrix x is what the direction x is worth.
        mean: (g * C,) of the activations, which stays when directions are left out.
        side: whose activations they are, the layer's output or input.
        select: whether directions go by the magnitude of their eigenvalues or by the eigenvalues as they are; those
            below zero are then worth nothing, and where none is above, all directions are worth the same.

    Raises:
        ArgumentError: the matrix is not square, symmetric and finite, or does not go with the mean.
    """
    if select not in get_args(Select):
        raise ArgumentError(f"select: expected 'magnitude' or 'signed', got {select!r}.")
    if side not in get_args(Side):
        raise ArgumentError(f"side: expected 'output' or 'input', got {side!r}.")
    values, vectors = _eigenvectors("matrix", matrix)
    if mean.shape != (values.numel(),):
        raise ArgumentError(f"mean: expected shape ({values.numel()},), as the matrix has, got {tuple(mean.shape)}.")
    if not mean.isfinite().all():
        raise ArgumentError("mean: expected finite numbers, got NaN or infinities.")
    worth = values.abs() if select == "magnitude" else values
    order = worth.argsort(dim=-1, descending=True, stable=True)
    basis = vectors.gather(-2, order.unsqueeze(-1).expand_as(vectors))
    sorted_worth = worth.gather(-1, order).clamp(min=0)
    return _orthonormal(side, mean, sorted_worth if sorted_worth.any() else torch.ones_like(worth), basis)


def principal_components(covariance: Tensor) -> PrincipalComponents:
    """Eigendecomposition of a covariance matrix (C, C), or of one per group (g, C, C).

    The same matrix always gives the same signs: the largest component of each direction is positive.

    Raises:
        ArgumentError: not square, not symmetric, or not finite.
    """
    values, vectors = _eigenvectors("covariance", covariance)
    return PrincipalComponents(values.clamp(min=0), vectors)


def left_out_shares(worth: Tensor) -> Tensor:
    """Share of what all directions are worth, such as variance, that is left out when the first r are kept.

    Args:
        worth: (C,), or (g, C) where r directions are kept in each of g groups; largest first.

    Returns:
        (C + 1,) for r = 0..C, from 1 down to exactly 0; all 0 if nothing is worth anything.
    """
    per_rank = worth.reshape(-1, worth.shape[-1]).sum(0)
    tails = torch.cat([per_rank.flip(0).cumsum(0).flip(0), per_rank.new_zeros(1)])
    return tails / tails[0] if tails[0] > 0 else tails


def _orthonormal(side: Side, mean: Tensor, worth: Tensor, basis: Tensor) -> Basis:
    blocks = _blocks(basis)
    return Basis(side, _plain(mean), blocks, blocks.mT, left_out_shares(worth))


def _eigenvectors(name: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors as rows with signs that follow from the matrix."""
    if matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
        raise ArgumentError(
            f"{name}: expected square matrices, (C, C) or (groups, C, C), got shape {tuple(matrix.shape)}."
        )
    plain = _plain(matrix)
    if not plain.isfinite().all():
        raise ArgumentError(f"{name}: expected finite numbers, got NaN or infinities.")
    asymmetry = (plain - plain.mT).abs().max() if plain.numel() else torch.zeros(())
    if asymmetry > _SYMMETRY_TOLERANCE * plain.abs().max():
        raise ArgumentError(
            f"{name}: expected a symmetric matrix, got one that differs from its transpose by {asymmetry:.3g}."
        )
    ascending, columns = torch.linalg.eigh((plain + plain.mT) / 2)
    rows = columns.flip(-1).mT
    signs = rows.gather(-1, rows.abs().argmax(-1, keepdim=True)).sign()
    return ascending.flip(-1), (rows * signs).contiguous()


def _second_moment(covariance: Covariance | PatchCovariance | GradientCovariance) -> tuple[Tensor, Tensor]:
    """The mean (g * C,) and E[x x'], (g, C, C)."""
    moments = covariance.compute()
    mean, blocks = _plain(moments.mean), _blocks(_plain(moments.covariance))
    by_group = mean.view(len(blocks), -1)
    return mean, blocks + by_group.unsqueeze(2) * by_group.unsqueeze(1)


def _blocks(matrix: Tensor) -> Tensor:
    return matrix.reshape(-1, *matrix.shape[-2:])


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _expect(statistic: object, kinds: tuple[type[Statistic], ...], name: str) -> None:
    if not isinstance(statistic, kinds):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ArgumentError(f"{name}: expected the {wanted} of a layer, got a {type(statistic).__name__}.")
    if statistic.tap != "layer":
        raise ArgumentError(
            f"{name}: expected that right at layer {statistic.layer!r}, which is what is factorised, got that after "
            f"its {statistic.tap}. Collect it with tap='layer'."
        )
