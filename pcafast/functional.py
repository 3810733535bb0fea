"""Stateless statistics: one call, one answer.

Tensors are float16, bfloat16, float32 or float64 on any device; sums are float64. Dimension 0 is the example,
``channel_dim`` the channel, and all others are positions (pixels or tokens).
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pcafast import reference
from pcafast.cross_moments import as_maps, cross_moments
from pcafast.errors import ArgumentError
from pcafast.memory import require_memory
from pcafast.native import operators
from pcafast.patches import Layout, Padding, PaddingMode, Patches, assemble

TaylorReduction = Literal["molchanov2017", "molchanov2019", "signed", "absolute"]
LossReduction = Literal["mean", "sum"]

LARGEST_MAP_ON_CUDA = 512  # on each side; kMostRankRows in csrc/cuda/kernels_cuda.h


class MeanCovariance(NamedTuple):
    """Mean (C,) and covariance (C, C), float64; with G > 1 groups the covariance is (G, C/G, C/G)."""

    mean: Tensor
    covariance: Tensor


class ActivationGradientMatrix(NamedTuple):
    """Mean (C,) of activations and their matrix (C, C) with the loss gradient; (G, C/G, C/G) with G > 1 groups."""

    mean: Tensor
    matrix: Tensor

    @property
    def symmetric(self) -> Tensor:
        """The matrix and its transpose added up: twice the same quadratic form."""
        return self.matrix + self.matrix.mT


def covariance(x: Tensor, *, channel_dim: int = 1, correction: int = 0) -> MeanCovariance:
    """Mean and covariance of the channels over all examples and positions.

    Args:
        x: activations, (N, C, *) or with the channels elsewhere.
        channel_dim: which dimension holds the channels.
        correction: what is taken from the number of samples in the divisor; 1 gives the unbiased estimate.

    Returns:
        mean (C,) and covariance (C, C), float64.

    Raises:
        ValueError: x has no samples, holds NaN or infinities, or is not of a floating dtype.
    """
    channels = channel_count(x, channel_dim)
    count, mean, comoment, skipped = _zeros(x, (), (channels,), (1, channels, channels), None)
    operators.covariance_update_(x.detach(), channel_dim, 1, 1.0, None, count, mean, comoment, skipped)
    _require_data("x", x, skipped)
    return finish_covariance(count, mean, comoment, correction)


def finish_covariance(count: Tensor, mean: Tensor, comoment: Tensor, correction: int) -> MeanCovariance:
    """The covariance that belongs to a running count (), mean (C,) and co-moment (G, C/G, C/G)."""
    if not count > correction:
        raise ArgumentError(f"correction: expected less than the {count.item():g} samples seen, got {correction}")
    blocks = comoment / (count - correction)
    return MeanCovariance(mean.clone(), blocks[0] if len(blocks) == 1 else blocks)


def patch_covariance(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    correction: int = 0,
) -> MeanCovariance:
    """Mean and covariance of the patches that a convolution multiplies its weight with, without forming a patch.

    Exactly those of the columns of ``torch.nn.functional.unfold``, the zeros of the padding included. Pairs of taps
    share all but the border of their sums, so a 3 x 3 kernel of stride 1 takes a third of the products.

    Args:
        x: input of the convolution, (N, C, H, W).
        kernel_size: rows and columns of the kernel, or one number for both; so are stride and dilation.
        stride: of the convolution.
        padding: one number, one for rows and one for columns, ((top, bottom), (left, right)), "same" or "valid".
        dilation: of the convolution.
        groups: of the convolution; each has a covariance of its own.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        correction: what is taken from the number of patches in the divisor; 1 gives the unbiased estimate.

    Returns:
        mean (D,) and covariance (D, D), float64, D = C * kh * kw in the order of unfold. With G > 1 groups the
        covariance is (G, D/G, D/G).

    Raises:
        ValueError: x has no patch, holds NaN or infinities, or is not of a floating dtype; a setting that no
            convolution of x has.
    """
    if x.ndim != 4:
        raise ArgumentError(f"x: expected maps of shape (N, C, H, W), got shape {tuple(x.shape)}")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ArgumentError(f"groups: expected a divisor of the {channels} channels of x, got {groups}")
    cut = Patches.of(kernel_size, stride, padding, dilation, padding_mode)
    layout = cut.layout(x, groups)
    slots, entries = len(layout.slot_ends), channels * len(layout.taps)
    side = entries // groups
    patches, count, left, right, comoment, skipped = _zeros(
        x, (), (slots,), (slots, entries), (slots, entries), (slots, groups, side, side), None
    )
    state = {"patches": patches, "count": count, "left": left, "right": right, "comoment": comoment}
    add_patches(x.detach(), layout, groups, {**state, "skipped": skipped})
    _require_data("x", x, skipped)
    return finish_patch_covariance({**state, "members": layout.members.to(x.device)}, correction)


def add_patches(x: Tensor, layout: Layout, groups: int, state: Mapping[str, Tensor]) -> None:
    """Merge the maps (N, C, H, W) into the running co-moments of their pairs of pixels."""
    names = ("patches", "count", "left", "right", "comoment", "skipped")
    operators.patch_covariance_update_(x, *layout[:8], groups, *(state[name] for name in names))


def finish_patch_covariance(state: Mapping[str, Tensor], correction: int) -> MeanCovariance:
    """The covariance that belongs to running co-moments of pairs of pixels."""
    mean, comoment = assemble(state)
    return finish_covariance(state["patches"], mean, comoment, correction)


def taylor_scores(
    activation: Tensor,
    gradient: Tensor,
    *,
    channel_dim: int = 1,
    reduction: TaylorReduction = "molchanov2017",
    loss_reduction: LossReduction = "mean",
) -> Tensor:
    """Importance of every channel from activation x gradient.

    With a the activation, g the gradient of an example's own loss, P the number of positions and
    s = sum over positions of a * g for one example and channel:

    - ``molchanov2017``: mean over examples of abs(s) / P (arXiv 1611.06440)
    - ``molchanov2019``: mean over examples of s**2 / P (arXiv 1906.10771, with the feature map as the gate)
    - ``signed``: absolute value of the mean of a * g over examples and positions (pytorch-pruning)
    - ``absolute``: mean of abs(a * g) over examples and positions

    Args:
        activation: (N, C, *), or with the channels elsewhere.
        gradient: of the loss by the activation, of the same shape.
        channel_dim: which dimension holds the channels.
        reduction: one of the four above.
        loss_reduction: how the batch's loss was made from its examples'. The gradient of a ``mean`` is
            multiplied by N to give each example's own.

    Returns:
        (C,) float64.

    Raises:
        ValueError: shapes differ, no data, NaN or infinities, or a dtype that is not floating.
    """
    examples, positions, sums, skipped = _zeros(activation, (), (), (4, channel_count(activation, channel_dim)), None)
    scale = loss_scale(activation.shape[0], loss_reduction)
    operators.taylor_update_(
        activation.detach(), gradient.detach(), channel_dim, scale, examples, positions, sums, skipped
    )
    _require_data("activation and gradient", activation, skipped)
    return finish_taylor(examples, positions, sums, reduction)


def loss_scale(batch_size: int, loss_reduction: LossReduction) -> float:
    """What a gradient is multiplied by to be that of each example's own loss."""
    if loss_reduction not in get_args(LossReduction):
        raise ArgumentError(f"loss_reduction: expected 'mean' or 'sum', got {loss_reduction!r}")
    return float(batch_size) if loss_reduction == "mean" else 1.0


def finish_taylor(examples: Tensor, positions: Tensor, sums: Tensor, reduction: TaylorReduction) -> Tensor:
    """The scores (C,) that belong to running sums (4, C)."""
    if reduction not in get_args(TaylorReduction):
        raise ArgumentError(f"reduction: expected one of {get_args(TaylorReduction)}, got {reduction!r}")
    row = get_args(TaylorReduction).index(reduction)
    divisor = examples if reduction.startswith("molchanov") else positions
    return sums[row].abs() / divisor


def activation_gradient(
    activation: Tensor, gradient: Tensor, *, channel_dim: int = 1, loss_reduction: LossReduction = "mean"
) -> ActivationGradientMatrix:
    """What projecting a direction of the channels out of an activation does to the loss (pca-compress).

    See ``pcafast.ActivationGradient``, whose output side this is.

    Args:
        activation: (N, C, *), or with the channels elsewhere.
        gradient: of the loss by the activation, of the same shape.
        channel_dim: which dimension holds the channels.
        loss_reduction: how the batch's loss was made from its examples'. The gradient of a ``mean`` is
            multiplied by N to give each example's own.

    Returns:
        mean (C,) of the activation and matrix (C, C), float64.

    Raises:
        ValueError: shapes differ, no data, NaN or infinities, or a dtype that is not floating.
    """
    if activation.shape != gradient.shape:
        raise ArgumentError(f"gradient: expected shape {tuple(activation.shape)}, got {tuple(gradient.shape)}")
    channel_count(activation, channel_dim)
    a = as_maps("activation", activation.detach(), channel_dim)
    g = as_maps("gradient", gradient.detach(), channel_dim)
    positions, mean, _, comoment = cross_moments(a, g, Patches.of(1))
    _require_data("activation and gradient", activation, ~(mean.sum() + comoment.sum()).isfinite())
    comoment = loss_scale(len(gradient), loss_reduction) * comoment
    return finish_activation_gradient(comoment.new_tensor(positions), mean, comoment)


def finish_activation_gradient(count: Tensor, mean: Tensor, comoment: Tensor) -> ActivationGradientMatrix:
    """The matrix that belongs to running sums (G, C/G, C/G)."""
    blocks = comoment / count
    return ActivationGradientMatrix(mean.clone(), blocks[0] if len(blocks) == 1 else blocks)


def feature_map_rank(x: Tensor, *, rtol: float | None = None, atol: float = 0.0) -> Tensor:
    """Rank of every feature map: how many singular values exceed max(atol, rtol * largest).

    Args:
        x: feature maps (N, C, H, W).
        rtol: relative to the map's largest singular value; by default max(H, W) * eps of float32, the choice
            of ``torch.linalg.matrix_rank`` for float32 maps and so of HRank (arXiv 2002.10179).
        atol: absolute.

    Returns:
        (N, C) int64; -1 for a map that holds NaN or an infinity.

    Raises:
        ValueError: x is not four-dimensional or not of a floating dtype; rtol or atol negative or not finite.
    """
    beyond_kernel = x.is_cuda and max(x.shape[-2:], default=0) > LARGEST_MAP_ON_CUDA
    operator = reference.feature_map_rank if beyond_kernel else operators.feature_map_rank
    ranks: Tensor = operator(x.detach(), default_rtol(x) if rtol is None else rtol, atol)
    return ranks


def default_rtol(x: Tensor) -> float:
    """max(H, W) * eps of float32."""
    return max(x.shape[-2:], default=0) * torch.finfo(torch.float32).eps


def channel_count(x: Tensor, channel_dim: int) -> int:
    """How many channels ``x`` has."""
    if not -x.ndim <= channel_dim < x.ndim:
        raise ArgumentError(
            f"channel_dim: expected one of the {x.ndim} dimensions of shape {tuple(x.shape)}, got {channel_dim}"
        )
    return x.shape[channel_dim]


def _zeros(x: Tensor, *shapes: tuple[int, ...] | None) -> list[Tensor]:
    """Empty float64 sums on the device of x; None stands for the integer count of skipped batches."""
    require_memory(f"x of shape {tuple(x.shape)}", [shape for shape in shapes if shape], x.device)
    return [
        torch.zeros(shape or (), dtype=torch.int64 if shape is None else torch.float64, device=x.device)
        for shape in shapes
    ]


def _require_data(name: str, x: Tensor, skipped: Tensor) -> None:
    if x.numel() == 0:
        raise ArgumentError(f"{name}: expected at least one sample, got shape {tuple(x.shape)}")
    if skipped:
        raise ArgumentError(f"{name}: expected finite values, got NaN or infinities")
