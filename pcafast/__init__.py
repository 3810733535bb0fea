"""pcafast streams the statistics that compressing a PyTorch model needs, and makes the smaller model."""

from pcafast import data, functional, models, scores
from pcafast.apply import rebind_optimizer, reestimate_batch_norm
from pcafast.collect import Collection, collect
from pcafast.errors import ArgumentError, FileError, PcafastError, PcafastWarning
from pcafast.loop import Compressed, Criterion, compress
from pcafast.plan import Budget, Plan, plan_low_rank, plan_pruning
from pcafast.result import load, save
from pcafast.statistics import (
    ChannelMoments,
    Covariance,
    FeatureMapRank,
    GradientCovariance,
    NonFiniteError,
    PatchCovariance,
    Statistic,
    Taylor,
    load_statistics,
    save_statistics,
)

__all__ = [
    "ArgumentError",
    "Budget",
    "ChannelMoments",
    "Collection",
    "Compressed",
    "Covariance",
    "Criterion",
    "FeatureMapRank",
    "FileError",
    "GradientCovariance",
    "NonFiniteError",
    "PatchCovariance",
    "PcafastError",
    "PcafastWarning",
    "Plan",
    "Statistic",
    "Taylor",
    "collect",
    "compress",
    "data",
    "functional",
    "load",
    "load_statistics",
    "models",
    "plan_low_rank",
    "plan_pruning",
    "rebind_optimizer",
    "reestimate_batch_norm",
    "save",
    "save_statistics",
    "scores",
]
