"""Scores of channels from statistics or weights: the higher, the more a channel matters. Pure maths, float64."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pcafast.errors import ArgumentError
from pcafast.functional import TaylorReduction
from pcafast.statistics import FeatureMapRank, Statistic, Taylor

Scores = dict[str, Tensor]


def taylor(statistics: Mapping[str, Statistic], *, reduction: TaylorReduction | None = None) -> Scores:
    """Taylor scores of each layer's channels (Molchanov et al. 2017, arXiv 1611.06440), L2-normalised per layer.

    Args:
        statistics: of each layer its ``Taylor``; layers without any data are left out.
        reduction: one of the four of ``pcafast.functional.taylor_scores``; None takes the statistic's own.
    """
    return normalised(
        {name: one.compute(reduction) for name, one in _of_kind(Taylor, statistics).items() if not one.is_empty}
    )


def rank(statistics: Mapping[str, Statistic]) -> Scores:
    """Mean rank of each channel's feature maps: the score of HRank (Lin et al. 2020, arXiv 2002.10179).

    Args:
        statistics: of each layer its ``FeatureMapRank``; layers without any data are left out.
    """
    return {name: one.compute() for name, one in _of_kind(FeatureMapRank, statistics).items() if not one.is_empty}


def filter_norm(model: nn.Module, *, p: float = 1) -> Scores:
    """Lp norm of the weights behind each output channel, of convolutions and linear layers (arXiv 1608.08710).

    With p=1 as in the paper, these are sums of absolute weights.
    """
    return {
        name: torch.linalg.vector_norm(module.weight.detach().double().flatten(1), ord=p, dim=1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }


def normalised(scores: Mapping[str, Tensor]) -> Scores:
    """Each layer's scores divided by their root of summed squares, as Molchanov et al. compare layers; zeros stay."""
    return {
        name: score.double() / torch.linalg.vector_norm(score.double()).clamp(min=torch.finfo(torch.float64).tiny)
        for name, score in scores.items()
    }


def _of_kind(kind: type[Any], statistics: Mapping[str, Statistic]) -> dict[str, Any]:
    for name, statistic in statistics.items():
        if not isinstance(statistic, kind):
            raise ArgumentError(
                f"statistics: expected the {kind.__name__} of layer {name!r}, got a {type(statistic).__name__}. "
                "Of a collection take one entry, such as stats['taylor']."
            )
    return dict(statistics)
