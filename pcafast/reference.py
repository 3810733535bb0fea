"""Every native operator in plain torch float64: the truth the kernels are tested against.

The signatures are those of ``torch.ops.pcafast`` (the schemas stand in ``csrc/ops.cpp``), so that each function
can also take the operator's place on a device or machine that has no kernel for it. An activation has its
channels in ``channel_dim``; dimension 0 is the example (unless it is the channels), all others are positions.
"""

import math

import torch
from torch import Tensor


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _examples_channels_positions(name: str, x: Tensor, channel_dim: int) -> Tensor:
    """``x`` as float64 of shape (examples, channels, positions)."""
    _expect(x.is_floating_point(), f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    _expect(
        -x.ndim <= channel_dim < x.ndim,
        f"channel_dim: expected one of the {x.ndim} dimensions of {name}, got {channel_dim}",
    )
    channels_first = x.double().movedim(channel_dim, 0)
    if channel_dim % x.ndim == 0:
        return channels_first.reshape(x.shape[0], -1).unsqueeze(0)
    return channels_first.flatten(2).movedim(0, 1) if x.ndim > 2 else channels_first.T.unsqueeze(2)


def _commit(finite: Tensor, skipped: Tensor, changes: list[tuple[Tensor, Tensor]]) -> None:
    """Give every state its new value if the batch was finite, else count the batch as skipped; no device sync."""
    for state, new in changes:
        state.copy_(torch.where(finite, new, state))
    skipped += (~finite).to(skipped.dtype)


def covariance_update_(
    x: Tensor,
    channel_dim: int,
    groups: int,
    scale: float,
    weight: Tensor | None,
    count: Tensor,
    mean: Tensor,
    comoment: Tensor,
    skipped: Tensor,
) -> None:
    """Merge one batch into count (), mean (C,) and co-moment (G, C/G, C/G) by the formula of Chan et al., 1979.

    ``x`` is taken times ``scale``. ``weight``: one number per position (the shape of ``x`` without channels); zero
    leaves the position out.
    """
    samples = scale * _examples_channels_positions("x", x, channel_dim).movedim(1, 2).flatten(0, 1)
    channels = samples.shape[1]
    _expect(
        groups >= 1 and channels % groups == 0,
        f"groups: expected a divisor of the {channels} channels of x, got {groups}",
    )
    if weight is not None:
        shape = list(x.movedim(channel_dim, 0).shape[1:])
        _expect(
            list(weight.shape) == shape,
            f"weight: expected the shape of x without channels, {shape}, got {list(weight.shape)}",
        )
        _expect(bool((weight >= 0).all()), "weight: expected no negative number and no NaN")
    w = torch.ones_like(samples[:, 0]) if weight is None else weight.double().flatten()
    samples, w = samples[w != 0], w[w != 0]
    if samples.numel() == 0:
        return
    batch_count = w.sum()
    batch_mean = (w @ samples) / batch_count
    # (G, samples, C/G)
    centred = (samples - batch_mean).unflatten(1, (groups, -1)).movedim(1, 0)
    batch_comoment = (w[:, None] * centred).mT @ centred
    total = count + batch_count
    delta = batch_mean - mean
    spread = delta.view(groups, -1, 1) * delta.view(groups, 1, -1) * (count * batch_count / total)
    _commit(
        batch_comoment.isfinite().all(),
        skipped,
        [
            (comoment, comoment + batch_comoment + spread),
            (mean, mean + delta * (batch_count / total)),
            (count, total),
        ],
    )


def taylor_update_(
    activation: Tensor,
    gradient: Tensor,
    channel_dim: int,
    scale: float,
    examples: Tensor,
    positions: Tensor,
    sums: Tensor,
    skipped: Tensor,
) -> None:
    """Add one batch of activation x gradient to the four sums (4, C) behind the four Taylor reductions."""
    _expect(
        gradient.shape == activation.shape,
        f"gradient: expected the shape of the activation, {list(activation.shape)}, got {list(gradient.shape)}",
    )
    product = _examples_channels_positions("activation", activation, channel_dim)
    product = scale * product * _examples_channels_positions("gradient", gradient, channel_dim)
    if product.numel() == 0:
        return
    n, _, p = product.shape
    per_example = product.sum(2)
    batch = torch.stack(
        [
            per_example.abs().sum(0) / p,
            per_example.square().sum(0) / p,
            per_example.sum(0),
            product.abs().sum((0, 2)),
        ]
    )
    changes = [(sums, sums + batch), (examples, examples + n), (positions, positions + n * p)]
    _commit(batch.isfinite().all(), skipped, changes)


def channel_moments_update_(
    x: Tensor,
    channel_dim: int,
    count: Tensor,
    mean: Tensor,
    centred_squares: Tensor,
    absolute: Tensor,
    zeros: Tensor,
    skipped: Tensor,
) -> None:
    """Merge one batch into count () and, per channel (C,), mean, centred squares, sum of |x| and number of zeros."""
    samples = _examples_channels_positions("x", x, channel_dim).movedim(1, 2).flatten(0, 1)
    if samples.numel() == 0:
        return
    batch_mean = samples.mean(0)
    batch_squares = (samples - batch_mean).square().sum(0)
    total = count + len(samples)
    delta = batch_mean - mean
    _commit(
        batch_squares.isfinite().all(),
        skipped,
        [
            (centred_squares, centred_squares + batch_squares + delta.square() * (count * len(samples) / total)),
            (mean, mean + delta * (len(samples) / total)),
            (absolute, absolute + samples.abs().sum(0)),
            (zeros, zeros + (samples == 0).sum(0)),
            (count, total),
        ],
    )


def feature_map_rank(x: Tensor, rtol: float, atol: float) -> Tensor:
    """Singular values of every map (N, C, H, W) above max(atol, rtol * largest): (N, C) int64, -1 where not finite."""
    _expect(x.ndim == 4, f"x: expected feature maps of shape (N, C, H, W), got shape {list(x.shape)}")
    _expect(x.is_floating_point(), f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        valid = math.isfinite(tolerance) and tolerance >= 0
        _expect(valid, f"{name}: expected a finite number that is not negative, got {tolerance}")
    if 0 in x.shape:
        return x.new_zeros(x.shape[:2], dtype=torch.int64)
    finite = x.isfinite().all(3).all(2)
    singular_values = torch.linalg.svdvals(torch.where(finite[..., None, None], x, 0).double())
    largest = singular_values[..., :1]
    # Below this a float64 singular value is rounding noise of the largest.
    noise = max(x.shape[2:]) * torch.finfo(torch.float64).eps
    threshold = (largest * max(rtol, noise)).clamp(min=atol)
    ranks: Tensor = (singular_values > threshold).sum(2)
    return ranks.where(finite, -1)
