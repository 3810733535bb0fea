"""Empty states of the native operators, and samples to feed them."""

import torch


def zeros(device, *shapes):
    """Float64 sums of these shapes, and the integer count of skipped batches."""
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
    return [*sums, torch.zeros((), dtype=torch.int64, device=device)]


def covariance_state(channels, groups=1, device="cpu"):
    width = channels // groups
    return zeros(device, (), (channels,), (groups, width, width))


def patch_state(layout, channels, groups=1, device="cpu"):
    slots, entries = len(layout.slot_ends), channels * len(layout.taps)
    square = (entries // groups, entries // groups)
    return zeros(device, (), (slots,), (slots, entries), (slots, entries), (slots, groups, *square))


def taylor_state(channels, device="cpu"):
    return zeros(device, (), (), (4, channels))


def moments_state(channels, device="cpu"):
    return zeros(device, (), *[(channels,)] * 4)


def as_laid_out(x, layout):
    """The same values at other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x
