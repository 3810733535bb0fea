"""pcafast streams the statistics that compressing a PyTorch model needs, and makes the smaller model."""

from pcafast import bases, data, functional, models, scores
from pcafast.apply import random_factors, rebind_optimizer, reestimate_batch_norm
from pcafast.collect import Collection, collect
from pcafast.errors import ArgumentError, FileError, PcafastError, PcafastWarning
from pcafast.loop import Compressed, Criterion, Directions, compress, projection_hessians, rank_losses, refit
from pcafast.plan import Budget, Plan, plan_low_rank, plan_pruning
from pcafast.result import load, save
from pcafast.statistics import (
    ActivationGradient,
    ChannelMoments,
    Covariance,
    FeatureMapRank,
    GradientCovariance,
    NonFiniteError,
    PatchCovariance,
    ProjectionHessian,
    Statistic,
    Taylor,
    load_statistics,
    save_statistics,
)

__all__ = [
    "ActivationGradient",
    "ArgumentError",
    "Budget",
    "ChannelMoments",
    "Collection",
    "Compressed",
    "Covariance",
    "Criterion",
    "Directions",
    "FeatureMapRank",
    "FileError",
    "GradientCovariance",
    "NonFiniteError",
    "PatchCovariance",
    "PcafastError",
    "PcafastWarning",
    "Plan",
    "ProjectionHessian",
    "Statistic",
    "Taylor",
    "bases",
    "collect",
    "compress",
    "data",
    "functional",
    "load",
    "load_statistics",
    "models",
    "plan_low_rank",
    "plan_pruning",
    "projection_hessians",
    "random_factors",
    "rank_losses",
    "rebind_optimizer",
    "reestimate_batch_norm",
    "refit",
    "save",
    "save_statistics",
    "scores",
]
