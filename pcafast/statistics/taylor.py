"""Taylor scores of channels, streamed."""

import dataclasses
from typing import ClassVar, get_args

import torch
from torch import Tensor

from pcafast.functional import LossReduction, TaylorReduction, channel_count, finish_taylor, loss_scale
from pcafast.native import operators
from pcafast.statistics.statistic import State, Statistic


@dataclasses.dataclass(kw_only=True)
class Taylor(Statistic):
    """Importance of every channel from activation x gradient.

    Attributes:
        reduction: which of the four of ``pcafast.functional.taylor_scores`` to compute.
        loss_reduction: how the batch's loss was made from its examples'; the gradient of a ``mean`` is multiplied
            by the batch size to be that of each example's own loss.
    """

    states: ClassVar[dict[str, State]] = {
        "examples": State(),
        "positions": State(),
        "sums": State(("reductions", "channels")),
        "skipped": State(dtype=torch.int64),
    }
    needs_gradient: ClassVar[bool] = True

    reduction: TaylorReduction = "molchanov2017"
    loss_reduction: LossReduction = "mean"

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The values that settings with few of them can have."""
        return {**super().choices(), "reduction": get_args(TaylorReduction), "loss_reduction": get_args(LossReduction)}

    def update(self, activation: Tensor, gradient: Tensor, *, batch_size: int | None = None) -> None:
        """Take in one batch.

        Args:
            activation: (N, C, *), or with the channels in ``channel_dim``.
            gradient: of the same shape.
            batch_size: examples that the loss was reduced over, if not the activation's first dimension.
        """
        sizes = {"reductions": len(get_args(TaylorReduction)), "channels": channel_count(activation, self.channel_dim)}
        state = self._ready(activation.device, sizes)
        scale = loss_scale(batch_size or len(activation), self.loss_reduction)
        with self._noticing_nonfinite():
            operators.taylor_update_(
                activation,
                gradient,
                self.channel_dim,
                scale,
                state["examples"],
                state["positions"],
                state["sums"],
                state["skipped"],
            )

    def compute(self, reduction: TaylorReduction | None = None) -> Tensor:
        """Scores (C,), float64, by the statistic's own reduction or, as the sums allow, by any other."""
        self._require_data()
        state = self._state
        return finish_taylor(state["examples"], state["positions"], state["sums"], reduction or self.reduction)

    def _has_data(self) -> bool:
        return bool(self._state["examples"] > 0)
