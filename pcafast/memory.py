"""Whether a state fits into memory, before it is allocated."""

import math
import os
from collections.abc import Iterable

import torch

from pcafast.errors import ArgumentError


def require_memory(what: str, shapes: Iterable[tuple[int, ...]], device: torch.device) -> None:
    """Refuse float64 tensors of these shapes that are larger than all memory of the device.

    Raises:
        ArgumentError: saying how much they would need.
    """
    needed = 8 * sum(math.prod(shape) for shape in shapes)
    if needed < 1 << 30:  # asking costs more than such a mistake
        return
    existing = _memory(device)
    if existing is not None and needed > existing:
        raise ArgumentError(
            f"{what}: expected a state that fits into the {_gib(existing)} of memory of {device}, got one that would "
            f"need {_gib(needed)}. It grows with the square of the channels: leave this layer out."
        )


def _memory(device: torch.device) -> int | None:
    """All bytes of the device, None if it cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
