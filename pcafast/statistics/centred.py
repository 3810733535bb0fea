"""Merging of running means with sums of squares or products about them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pcafast.statistics.statistic import Total


def combine_centred(
    parts: Sequence[Mapping[str, Tensor]], total: Total, second: str, square: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Count, mean and centred second moment of all parts together (Chan, Golub and LeVeque, 1979).

    Each part is brought to the common mean, ``second + count * square(mean - common)``, after which all are sums.

    Args:
        parts: states with count (), mean (C,) and a second moment about that mean.
        total: adds up one tensor of each part.
        second: the name of the second moment.
        square: the second moment that a single deviation (C,) has.
    """
    count = total([part["count"] for part in parts])
    mean = total([part["count"] * part["mean"] for part in parts]) / count.clamp(min=torch.finfo(count.dtype).tiny)
    about_common = [part[second] + part["count"] * square(part["mean"] - mean) for part in parts]
    return {"count": count, "mean": mean, second: total(about_common)}
