"""Reduced-rank regression. Pure maths, in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

# Of the variance of each predictor: what counts as noise in it, so that directions without any variance do no harm.
_NOISE = 1e-6
# Of the largest eigenvalue: those below are rounding errors.
_LEAST = 1e-13


class Regression(NamedTuple):
    """``decoder @ encoder @ (x - mean of x) + mean of y`` comes as close to y as a matrix of the rank can.

    Shapes, for g groups: encoder (g, r, D), decoder (g, C, r); ``explained`` is the summed variance that it explains.
    """

    encoder: Tensor
    decoder: Tensor
    explained: float


def reduced_rank_regression(covariance: Tensor, cross: Tensor, rank: int, metric: Tensor | None = None) -> Regression:
    """The least E|B (y - U V x)|^2 over U V of the rank, for x and y without their means (Izenman, 1975).

    With M = C_yx C_xx^-1, the first eigenvectors U' of B M C_xx M' B' give V = U'^T B M, and U is what B makes U' of.

    Args:
        covariance: of x, (g, D, D).
        cross: of x with y, (g, D, C).
        rank: per group; directions are sorted, so that those of a lower rank come first.
        metric: B, (g, E, C), in which errors count; by default the identity.
    """
    scale = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    correlation = covariance / (scale.unsqueeze(2) * scale.unsqueeze(1))
    noisy = correlation + _NOISE * torch.eye(covariance.shape[1]).to(covariance)
    predictor = torch.linalg.solve(noisy, cross / scale.unsqueeze(2)).mT  # of x by its own scale
    fitted = predictor @ (cross / scale.unsqueeze(2))
    if metric is None:
        values, directions = torch.linalg.eigh((fitted + fitted.mT) / 2)
        decoder = directions = directions.flip(-1)[..., :rank]
        values = values.flip(-1)[..., :rank]
        encoder = directions.mT @ predictor
    else:
        seen = metric @ fitted @ metric.mT
        values, directions = torch.linalg.eigh((seen + seen.mT) / 2)
        values, directions = values.flip(-1)[..., :rank], directions.flip(-1)[..., :rank]
        counts = (values > _LEAST * values[..., :1].clamp(min=0)).unsqueeze(1)
        encoder = directions.mT @ metric @ predictor
        decoder = torch.where(counts, fitted @ metric.mT @ directions / values.unsqueeze(1), 0)
    # Noise that is not there takes nothing away.
    explained = values.sum() + _NOISE * encoder.square().sum()
    return Regression(encoder / scale.unsqueeze(1), decoder, float(explained))
