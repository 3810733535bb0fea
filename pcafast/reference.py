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


def patch_covariance_update_(
    x: Tensor,
    source_rows: Tensor,
    source_columns: Tensor,
    taps: Tensor,
    steps: Tensor,
    rectangles: Tensor,
    slot_ends: Tensor,
    slot_rectangles: Tensor,
    patches_per_example: int,
    groups: int,
    patches: Tensor,
    count: Tensor,
    left: Tensor,
    right: Tensor,
    comoment: Tensor,
    skipped: Tensor,
) -> None:
    """Merge one batch of maps (N, C, H, W) into the co-moments of pairs of pixels, slot by slot.

    The layout's arguments are those of ``pcafast.patches.Layout``. With D = C * T for T taps, S slots and G groups,
    the state is patches (), count (S,), left and right (S, D), comoment (S, G, D/G, D/G).
    """
    _expect(x.ndim == 4, f"x: expected maps of shape (N, C, H, W), got shape {list(x.shape)}")
    _expect(x.is_floating_point(), f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    _expect(
        groups >= 1 and x.shape[1] % groups == 0,
        f"groups: expected a divisor of the {x.shape[1]} channels of x, got {groups}",
    )
    if x.numel() == 0:
        return
    rows, columns = source_rows.to(x.device), source_columns.to(x.device)
    # Index -1 takes the zeros that are appended.
    maps: Tensor = torch.nn.functional.pad(x.double(), (0, 1, 0, 1))[:, :, rows][:, :, :, columns]

    def pixels(top: int, left: int, height: int, width: int) -> Tensor:
        """Samples (N * height * width, C * T)."""
        down, across = steps[0] * torch.arange(height), steps[1] * torch.arange(width)
        shifted = [maps[:, :, top + i + down][:, :, :, left + j + across] for i, j in taps.tolist()]
        return torch.stack(shifted, 2).permute(0, 3, 4, 1, 2).flatten(0, 2).flatten(1)

    ends = slot_ends.tolist()
    batches = []
    for slot, end in enumerate(ends):
        chosen = rectangles[slot_rectangles[ends[slot - 1] if slot else 0 : end]].tolist()
        first = [pixels(y, x0, h, w) for y, x0, h, w, _, _ in chosen]
        second = [pixels(y + down, x0 + across, h, w) for y, x0, h, w, down, across in chosen]
        nothing = maps.new_zeros(0, left.shape[1])
        batches.append((torch.cat([nothing, *first]), torch.cat([nothing, *second])))
    new_count = torch.stack([count.new_tensor(len(a)) for a, _ in batches])
    total = (count + new_count).clamp(min=1)
    means = [torch.stack([of[side].sum(0) / max(len(of[side]), 1) for of in batches]) for side in (0, 1)]
    delta = [mean - old for mean, old in zip(means, (left, right), strict=True)]

    def by_group(values: Tensor) -> Tensor:
        blocks: Tensor = values.unflatten(-1, (groups, -1))
        return blocks.movedim(-2, 0)

    products = torch.stack(
        [by_group(a - mean_a).mT @ by_group(b - mean_b) for (a, b), mean_a, mean_b in zip(batches, *means, strict=True)]
    )
    weight = (count * new_count / total).view(-1, 1, 1, 1)
    spread = delta[0].unflatten(1, (groups, -1)).unsqueeze(-1) * delta[1].unflatten(1, (groups, -1)).unsqueeze(-2)
    share = (new_count / total)[:, None]
    _commit(
        products.isfinite().all(),
        skipped,
        [
            (comoment, comoment + products + weight * spread),
            (left, left + delta[0] * share),
            (right, right + delta[1] * share),
            (count, count + new_count),
            (patches, patches + len(x) * patches_per_example),
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
