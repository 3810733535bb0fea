"""Patches as torch cuts them: the truth that their covariance is tested against."""

import torch.nn.functional as F

MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def columns(x, kernel_size, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), padding_mode="zeros"):
    """All patches of x (N, C, H, W), float64: (D, patches)."""
    (top, bottom), (left, right) = padding
    x = x.double()
    if any((top, bottom, left, right)):
        x = F.pad(x, (left, right, top, bottom), mode=MODES[padding_mode])
    return F.unfold(x, kernel_size, dilation=dilation, stride=stride).movedim(1, 0).flatten(1)


def mean_and_covariance(patches, groups=1):
    """Of the columns (D, patches): mean (D,), and covariance (D, D) or one for each group."""
    mean = patches.mean(1)
    centred = (patches - mean[:, None]).unflatten(0, (groups, -1))
    blocks = centred @ centred.mT / patches.shape[1]
    return mean, blocks[0] if groups == 1 else blocks
