"""Directions to keep: orthonormal bases from second-order statistics. Pure maths, always float64 on the CPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from pcafast.errors import ArgumentError

# Relative; covariances that were accumulated in float32 are symmetric to about this.
_SYMMETRY_TOLERANCE = 1e-6


class PrincipalComponents(NamedTuple):
    """Eigenvalues (..., C), largest first and never negative, and the eigenvectors as rows of (..., C, C)."""

    variances: Tensor
    basis: Tensor


def principal_components(covariance: Tensor) -> PrincipalComponents:
    """Eigendecomposition of a covariance matrix (C, C), or of one per group (g, C, C).

    The same matrix always gives the same signs: the largest component of each direction is positive.

    Raises:
        ArgumentError: not square, not symmetric, or not finite.
    """
    if covariance.ndim not in (2, 3) or covariance.shape[-1] != covariance.shape[-2]:
        raise ArgumentError(
            f"covariance: expected square matrices, (C, C) or (groups, C, C), got shape {tuple(covariance.shape)}."
        )
    matrix = covariance.detach().to("cpu", torch.float64)
    if not matrix.isfinite().all():
        raise ArgumentError("covariance: expected finite numbers, got NaN or infinities.")
    asymmetry = (matrix - matrix.mT).abs().max() if matrix.numel() else torch.zeros(())
    if asymmetry > _SYMMETRY_TOLERANCE * matrix.abs().max():
        raise ArgumentError(
            f"covariance: expected a symmetric matrix, got one that differs from its transpose by {asymmetry:.3g}."
        )
    ascending, columns = torch.linalg.eigh((matrix + matrix.mT) / 2)
    basis = columns.flip(-1).mT
    signs = basis.gather(-1, basis.abs().argmax(-1, keepdim=True)).sign()
    return PrincipalComponents(ascending.flip(-1).clamp(min=0), (basis * signs).contiguous())


def left_out_shares(variances: Tensor) -> Tensor:
    """Share of the total variance that is left out when the first r directions are kept.

    Args:
        variances: (C,), or (g, C) where r directions are kept in each of g groups; largest first.

    Returns:
        (C + 1,) for r = 0..C, from 1 down to exactly 0; all 0 if there is no variance.
    """
    per_rank = variances.reshape(-1, variances.shape[-1]).sum(0)
    tails = torch.cat([per_rank.flip(0).cumsum(0).flip(0), per_rank.new_zeros(1)])
    return tails / tails[0] if tails[0] > 0 else tails
