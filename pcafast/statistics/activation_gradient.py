"""The matrix of activation x gradient: how the loss changes when a direction is projected out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pcafast.cross_moments import CrossMoments, as_maps, cross_moments
from pcafast.errors import ArgumentError
from pcafast.functional import (
    ActivationGradientMatrix,
    LossReduction,
    channel_count,
    finish_activation_gradient,
    loss_scale,
)
from pcafast.patches import Padding, PaddingMode, Patches
from pcafast.statistics.patch_covariance import PatchCovariance
from pcafast.statistics.statistic import Side, State, Statistic, Total


@dataclasses.dataclass(kw_only=True)
class ActivationGradient(Statistic):
    """Covariance of a layer's activations a with the gradient g of each example's own loss by them, in float64.

    Over N positions of E examples it is matrix = (sum of a g') / N - mean(a) mean(g)'. Projecting a unit direction b
    out at every position, a <- a - b b' (a - mean(a)), changes the sum of the examples' losses to first order by
    -N b' matrix b, and their mean by -(N / E) b' matrix b; half the tuple's ``symmetric`` gives the same. So the
    directions to leave out first are those with the largest b' matrix b, positive ones lessening the loss.

    On the output side a is the layer's output, before any activation function. A ReLU that follows the layer directly,
    without a batch norm, would let it go, so that it is kept until its gradient comes, in addition to what autograd
    keeps, and copied if the ReLU works in place. On the input side a is the patch that the weight W is multiplied with,
    as of ``PatchCovariance``, and g is W' times the gradient of the output at that position. The layer's input is one
    that autograd keeps, unless the weight is frozen; patches are cut from a few examples at a time; and the state has
    the square of the C * kh * kw entries of a patch.

    Attributes:
        side: of the layer. The input side is that of linear layers and convolutions of one or two dimensions.
        groups: of the channels, each with a matrix of its own; ``collect`` takes the layer's.
        loss_reduction: how the batch's loss was made from its examples'; the gradient of a ``mean`` is multiplied
            by the batch size to be that of each example's own loss.
        kernel_size, stride, padding, dilation, padding_mode: how the input side cuts patches, as of
            ``pcafast.functional.patch_covariance``; ``collect`` takes the layer's.
    """

    states: ClassVar[dict[str, State]] = {
        "count": State(),
        "mean": State(("entries",)),
        "gradient": State(("entries",)),
        "comoment": State(("groups", "group entries", "group entries")),
        "skipped": State(dtype=torch.int64),
    }
    needs_gradient: ClassVar[bool] = True

    side: Side = "output"
    groups: int = 1
    loss_reduction: LossReduction = "mean"
    kernel_size: int | Sequence[int] = 1
    stride: int | Sequence[int] = 1
    padding: Padding = 0
    dilation: int | Sequence[int] = 1
    padding_mode: PaddingMode = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        cut = Patches.of(self.kernel_size, self.stride, self.padding, self.dilation, self.padding_mode)
        self.kernel_size, self.stride, self.padding = cut.kernel_size, cut.stride, cut.padding
        self.dilation = cut.dilation
        self._patches = cut if self.side == "input" else Patches.of(1)

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The values that settings with few of them can have."""
        return {**super().choices(), "loss_reduction": ("mean", "sum")}

    def fits(self, layer: nn.Module) -> bool:
        """Whether the layer has such a side."""
        return self.side == "output" or PatchCovariance().fits(layer)

    @classmethod
    def settings_for(cls, layer: nn.Module) -> dict[str, Any]:
        """The layer's groups, and how it cuts patches."""
        return {**super().settings_for(layer), **PatchCovariance.settings_for(layer)}

    def update(
        self,
        activation: Tensor,
        gradient: Tensor,
        *,
        layer_weight: Tensor | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Take in one batch.

        Args:
            activation: the layer's output or, on the input side, its input: (N, C, *), or with the channels in
                ``channel_dim``.
            gradient: of the loss by the layer's output, on either side.
            layer_weight: on the input side, the layer's.
            batch_size: examples that the loss was reduced over, if not the gradient's first dimension.

        Raises:
            ArgumentError: shapes do not fit together, or the input side is not told the weight.
        """
        channels, outputs = (channel_count(tensor, self.channel_dim) for tensor in (activation, gradient))
        x = as_maps("activation", activation.detach(), self.channel_dim)
        g = as_maps("gradient", gradient.detach(), self.channel_dim)
        if self.groups < 1 or channels % self.groups or outputs % self.groups:
            raise ArgumentError(
                f"groups: expected a divisor of the {channels} channels of activation and the {outputs} of gradient, "
                f"got {self.groups}"
            )
        self._check_gradient(x, g)
        weight = self._blocks(layer_weight, channels, outputs) if self.side == "input" else None
        entries = channels * self._patches.size
        sizes = {"entries": entries, "groups": self.groups, "group entries": entries // self.groups}
        self._ready(x.device, sizes)
        if g.numel() == 0:
            return
        with self._noticing_nonfinite(), torch.autocast(x.device.type, enabled=False):
            moments = cross_moments(x, g, self._patches, self.groups)
            self._add(moments, weight, loss_scale(batch_size or len(gradient), self.loss_reduction))

    def compute(self) -> ActivationGradientMatrix:
        """Mean (D,) of a and matrix (D, D), or (G, D/G, D/G) for G > 1 groups, float64.

        D is the number of channels or, on the input side, of entries of a patch in ``unfold``'s order.
        """
        self._require_data()
        return finish_activation_gradient(self._state["count"], self._state["mean"], self._state["comoment"])

    def _check_gradient(self, x: Tensor, g: Tensor) -> None:
        channels = g.shape[1] if self.side == "input" else x.shape[1]
        pixels = [self._patches.output_size(size, axis) for axis, size in enumerate(x.shape[2:])]
        expected = (len(x), channels, *pixels)
        if g.shape != expected:
            raise ArgumentError(
                f"gradient: expected that of the layer's output, as maps of shape {expected} for an activation of "
                f"{tuple(x.shape)}, got {tuple(g.shape)}"
            )

    def _blocks(self, weight: Tensor | None, channels: int, outputs: int) -> Tensor:
        """The layer's weight as (G, outputs / G, D / G)."""
        if weight is None:
            raise ArgumentError('layer_weight: expected the weight of the layer for side="input", got None')
        kernel = tuple(self._patches.kernel_size)
        expected = (outputs, channels // self.groups, *kernel)
        if weight.numel() != outputs * channels // self.groups * self._patches.size or len(weight) != outputs:
            raise ArgumentError(f"layer_weight: expected shape {expected}, got {tuple(weight.shape)}")
        return weight.detach().reshape(self.groups, outputs // self.groups, -1)

    def _add(self, moments: CrossMoments, weight: Tensor | None, scale: float) -> None:
        """Merge one batch by the formula of Chan et al., 1979; nothing but a count changes if it is not finite."""
        gradient, comoment = scale * moments.pixel_mean, scale * moments.comoment
        if weight is not None:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            gradient = (gradient.view(self.groups, 1, -1) @ weight.double()).flatten()
            comoment = comoment.to(dtype) @ weight.to(dtype)
        # Whatever is not finite makes a sum so.
        sums = [part.sum(dtype=torch.float64) for part in (moments.patch_mean, gradient, comoment)]
        finite = torch.stack(sums).isfinite().all()

        def if_finite(change: Tensor) -> Tensor:
            return torch.where(finite, change, 0)

        state = self._state
        share = moments.positions / (state["count"] + moments.positions)
        mean_change = if_finite(moments.patch_mean - state["mean"])
        gradient_change = if_finite(gradient - state["gradient"])
        state["comoment"] += if_finite(comoment)
        state["comoment"] += self._outer(share * state["count"] * mean_change, gradient_change)
        state["mean"] += share * mean_change
        state["gradient"] += share * gradient_change
        state["count"] += moments.positions * finite
        state["skipped"] += ~finite

    def _outer(self, left: Tensor, right: Tensor) -> Tensor:
        return left.view(self.groups, -1, 1) * right.view(self.groups, 1, -1)

    def _has_data(self) -> bool:
        return bool(self._state["count"] > 0)

    def _combined(self, parts: Sequence[Mapping[str, Tensor]], total: Total) -> dict[str, Tensor]:
        count, skipped = (total([part[name] for part in parts]) for name in ("count", "skipped"))
        safe = count.clamp(min=1)
        mean, gradient = (total([part["count"] * part[name] for part in parts]) / safe for name in ("mean", "gradient"))
        about_common = [
            part["comoment"] + part["count"] * self._outer(part["mean"] - mean, part["gradient"] - gradient)
            for part in parts
        ]
        return {"count": count, "mean": mean, "gradient": gradient, "comoment": total(about_common), "skipped": skipped}
