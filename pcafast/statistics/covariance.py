"""Covariance of activations and of gradients."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pcafast.errors import ArgumentError
from pcafast.functional import LossReduction, MeanCovariance, channel_count, finish_covariance, loss_scale
from pcafast.native import operators
from pcafast.statistics.centred import combine_centred
from pcafast.statistics.statistic import Side, State, Statistic, Total


@dataclasses.dataclass(kw_only=True)
class _ChannelCovariance(Statistic):
    """Mean and covariance over all examples and positions, in float64.

    A layer with G > 1 groups has one (C/G, C/G) block per group.
    """

    states: ClassVar[dict[str, State]] = {
        "count": State(),
        "mean": State(("channels",)),
        "comoment": State(("groups", "group channels", "group channels")),
        "skipped": State(dtype=torch.int64),
    }

    groups: int = 1
    correction: int = 0

    def compute(self) -> MeanCovariance:
        """Mean (C,) and covariance (C, C), or (G, C/G, C/G) for G > 1 groups, float64."""
        self._require_data()
        state = self._state
        return finish_covariance(state["count"], state["mean"], state["comoment"], self.correction)

    def _accumulate(self, x: Tensor, weight: Tensor | None, scale: float = 1.0) -> None:
        channels = channel_count(x, self.channel_dim)
        if self.groups < 1 or channels % self.groups:
            raise ArgumentError(f"groups: expected a divisor of the {channels} channels, got {self.groups}")
        # To look costs a wait on other devices; there such a batch changes nothing.
        if weight is not None and weight.device.type == "cpu" and weight.numel() and not weight.any():
            raise ArgumentError(
                f"weight: expected some position that counts, got {tuple(weight.shape)} zeros. Leave such a batch out."
            )
        sizes = {"channels": channels, "groups": self.groups, "group channels": channels // self.groups}
        state = self._ready(x.device, sizes)
        with self._noticing_nonfinite():
            operators.covariance_update_(
                x,
                self.channel_dim,
                self.groups,
                scale,
                weight,
                state["count"],
                state["mean"],
                state["comoment"],
                state["skipped"],
            )

    def _has_data(self) -> bool:
        return bool(self._state["count"] > 0)

    def _combined(self, parts: Sequence[Mapping[str, Tensor]], total: Total) -> dict[str, Tensor]:
        def outer(deviation: Tensor) -> Tensor:
            blocks = deviation.view(parts[0]["comoment"].shape[:2])
            return blocks.unsqueeze(2) * blocks.unsqueeze(1)

        skipped = total([part["skipped"] for part in parts])
        return {**combine_centred(parts, total, "comoment", outer), "skipped": skipped}


@dataclasses.dataclass(kw_only=True)
class Covariance(_ChannelCovariance):
    """Mean and covariance of a layer's output or input channels over all examples and positions.

    Attributes:
        side: whether ``collect`` gives it the layer's output or its input (of a convolution: its pixels, not patches),
            for which there is only one tap.
        groups: of the channels; ``collect`` takes the layer's.
        correction: what is taken from the number of samples in the divisor; 1 gives the unbiased estimate.
    """

    side: Side = "output"

    def update(self, x: Tensor, *, weight: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            x: activations (N, C, *), or with the channels in ``channel_dim``.
            weight: mask or weights over positions, of the shape of x without channels; 0 or False leaves one out.
        """
        self._accumulate(x, weight)


@dataclasses.dataclass(kw_only=True)
class GradientCovariance(_ChannelCovariance):
    """Mean and covariance of the loss gradient by a layer's output, over all examples and positions.

    Attributes:
        loss_reduction: how the batch's loss was made from its examples'; the gradient of a ``mean`` is multiplied
            by the batch size to be that of each example's own loss.
    """

    needs_gradient: ClassVar[bool] = True

    loss_reduction: LossReduction = "mean"

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The values that settings with few of them can have."""
        return {**super().choices(), "loss_reduction": ("mean", "sum")}

    def update(self, gradient: Tensor, *, weight: Tensor | None = None, batch_size: int | None = None) -> None:
        """Take in one batch of gradients.

        Args:
            gradient: shaped as the activation.
            weight: as for ``Covariance``.
            batch_size: examples that the loss was reduced over, if not the gradient's first dimension.
        """
        self._accumulate(gradient, weight, loss_scale(batch_size or len(gradient), self.loss_reduction))
