"""Rank of feature maps, streamed."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from pcafast.errors import ArgumentError
from pcafast.functional import feature_map_rank
from pcafast.statistics.statistic import State, Statistic, Tap


@dataclasses.dataclass(kw_only=True)
class FeatureMapRank(Statistic):
    """Rank of every channel's feature maps: the score of HRank (arXiv 2002.10179).

    The default tap is after the activation, since before it nearly every map has full rank.

    Attributes:
        rtol: relative to the map's largest singular value; None for max(H, W) * eps of float32.
        atol: absolute; a singular value counts if it is above both.
    """

    states: ClassVar[dict[str, State]] = {
        "histogram": State(("channels", "ranks"), torch.int64),
        "skipped": State(dtype=torch.int64),
    }
    growing_sizes: ClassVar[frozenset[str]] = frozenset({"ranks"})

    tap: Tap = "activation"
    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rtol", "atol"):
            tolerance = getattr(self, name)
            if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
                raise ArgumentError(f"{name}: expected a finite number that is not negative, got {tolerance}")

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer puts out maps of two dimensions."""
        return not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d))

    def update(self, x: Tensor) -> None:
        """Take in one batch of feature maps (N, C, H, W). Maps with NaN or infinities are left out and counted."""
        ranks = feature_map_rank(x, rtol=self.rtol, atol=self.atol).T
        state = self._ready(x.device, {"channels": x.shape[1], "ranks": min(x.shape[2:]) + 1})
        with self._noticing_nonfinite():
            state["histogram"].scatter_add_(1, ranks.clamp(min=0), (ranks >= 0).long())
            state["skipped"] += (ranks < 0).sum()

    def compute(self) -> Tensor:
        """Mean rank (C,) over all maps seen, float64."""
        self._require_data()
        histogram = self._state["histogram"].double()
        ranks = torch.arange(histogram.shape[1], dtype=torch.float64, device=histogram.device)
        return histogram @ ranks / histogram.sum(1)

    def distribution(self) -> Tensor:
        """How many maps of each channel (C) had each rank (0 to the largest possible): (C, R + 1) int64."""
        self._require_data()
        return self._state["histogram"].clone()

    def _has_data(self) -> bool:
        return bool(self._state["histogram"].any())
