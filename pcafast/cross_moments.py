"""Sums of products of two sets of maps about their means: patches of the one with pixels of the other.

That is the weight gradient of a convolution, but added up in smaller parts than oneDNN and cuDNN do, in the same order
every time, and not in TF32 where only convolutions are.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pcafast.errors import ArgumentError
from pcafast.patches import Patches

_WORKSPACE = 1 / 4  # of the size of x, for the patches and centred copies of some of the examples at a time
_LEAST_WORKSPACE = 1 << 17  # elements


class CrossMoments(NamedTuple):
    """Of patches with D entries and pixels with C channels, in G groups; float64.

    Attributes:
        positions: how many.
        patch_mean: (D,) in the order of ``torch.nn.functional.unfold``.
        pixel_mean: (C,).
        comoment: (G, D/G, C/G) sums over positions of products of the deviations from the means.
    """

    positions: int
    patch_mean: Tensor
    pixel_mean: Tensor
    comoment: Tensor


def as_maps(name: str, x: Tensor, channel_dim: int) -> Tensor:
    """The same numbers as (N, C, H, W); where the channels come last, positions are examples of one pixel.

    Raises:
        ArgumentError: not of a floating dtype.
    """
    if not x.is_floating_point():
        raise ArgumentError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if channel_dim % x.ndim == x.ndim - 1:
        return x.reshape(-1, x.shape[-1], 1, 1)
    x = x.movedim(channel_dim, 1)
    return x if x.ndim == 4 else x.flatten(2).unsqueeze(2)


def cross_moments(x: Tensor, y: Tensor, patches: Patches, groups: int = 1) -> CrossMoments:
    """Of the patches of x (N, C, H, W) with the pixels of y (N, C', H', W'), as many as there are patches.

    Products are of float32, or float64 if x or y is; those of 16-bit numbers are exact in it.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    # Centred before they are multiplied, on what need not be quite the mean.
    x_shift, y_shift = (maps.mean((0, 2, 3), dtype=dtype)[:, None, None] for maps in (x, y))
    positions = y.numel() // y.shape[1]
    patch_sum, pixel_sum, products = x_shift.new_zeros(3, dtype=torch.float64)
    step = _examples_at_a_time(x, y, patches)
    with torch.autocast(x.device.type, enabled=False):
        for left, right in zip(x.split(step), y.split(step), strict=True):
            left = _padded(left.to(dtype), patches) - x_shift
            right = right.to(dtype) - y_shift
            patch_sum = patch_sum + _windows(left.sum(0).double(), patches).sum((1, 2))
            pixel_sum = pixel_sum + right.sum((0, 2, 3)).double()
            products = products + _products(_windows(left, patches), right, groups)
    patch_rest, pixel_rest = patch_sum.flatten() / positions, pixel_sum / positions
    spread = patch_rest.view(groups, -1, 1) * pixel_rest.view(groups, 1, -1)
    return CrossMoments(
        positions,
        x_shift.double().flatten().repeat_interleave(patches.size) + patch_rest,
        y_shift.double().flatten() + pixel_rest,
        products - positions * spread,
    )


def _examples_at_a_time(x: Tensor, y: Tensor, patches: Patches) -> int:
    examples = max(len(x), 1)
    patch_elements = patches.size * x.shape[1] * y.shape[2:].numel()
    per_example = patch_elements + 2 * (x.numel() + y.numel()) // examples
    return max(1, int(max(_WORKSPACE * x.numel(), _LEAST_WORKSPACE) / max(per_example, 1)))


def _padded(x: Tensor, patches: Patches) -> Tensor:
    (top, bottom), (left, right) = patches.padding
    if not any((top, bottom, left, right)):
        return x
    mode = "constant" if patches.padding_mode == "zeros" else patches.padding_mode
    return F.pad(x, (left, right, top, bottom), mode=mode)


def _windows(x: Tensor, patches: Patches) -> Tensor:
    """The pixels of x (*, C, H, W) that each entry of a patch takes in, (*, C, H', W', kh, kw); a view."""
    rows = x.ndim - 2
    for axis in (0, 1):
        dilation = patches.dilation[axis]
        reach = dilation * (patches.kernel_size[axis] - 1) + 1
        x = x.unfold(rows + axis, reach, patches.stride[axis])[..., ::dilation]
    return x


def _products(windows: Tensor, y: Tensor, groups: int) -> Tensor:
    """(G, D/G, C'/G) sums over positions."""
    entries = windows.permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)
    left, right = (rows.unflatten(0, (groups, -1)) for rows in (entries, y.movedim(1, 0).flatten(1)))
    return torch.bmm(left, right.mT)
