"""Streaming statistics: update batch by batch, merge, reduce over processes, save. One file per statistic."""

from pcafast.statistics.activation_gradient import ActivationGradient
from pcafast.statistics.channel_moments import ChannelMoments, Moments
from pcafast.statistics.covariance import Covariance, GradientCovariance
from pcafast.statistics.feature_map_rank import FeatureMapRank
from pcafast.statistics.patch_covariance import PatchCovariance
from pcafast.statistics.projection_hessian import ProjectionHessian, ProjectionHessianFit
from pcafast.statistics.statistic import NonFiniteError, Statistic
from pcafast.statistics.storage import load_statistics, save_statistics
from pcafast.statistics.taylor import Taylor

__all__ = [
    "ActivationGradient",
    "ChannelMoments",
    "Covariance",
    "FeatureMapRank",
    "GradientCovariance",
    "Moments",
    "NonFiniteError",
    "PatchCovariance",
    "ProjectionHessian",
    "ProjectionHessianFit",
    "Statistic",
    "Taylor",
    "load_statistics",
    "save_statistics",
]
