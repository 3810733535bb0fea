"""pcafast streams the statistics that compressing a PyTorch model needs, and makes the smaller model."""

from pcafast import functional
from pcafast.collect import Collection, collect
from pcafast.errors import ArgumentError, FileError, PcafastError, PcafastWarning
from pcafast.statistics import (
    ChannelMoments,
    Covariance,
    FeatureMapRank,
    GradientCovariance,
    NonFiniteError,
    Statistic,
    Taylor,
    load_statistics,
    save_statistics,
)

__all__ = [
    "ArgumentError",
    "ChannelMoments",
    "Collection",
    "Covariance",
    "FeatureMapRank",
    "FileError",
    "GradientCovariance",
    "NonFiniteError",
    "PcafastError",
    "PcafastWarning",
    "Statistic",
    "Taylor",
    "collect",
    "functional",
    "load_statistics",
    "save_statistics",
]
