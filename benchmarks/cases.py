"""What the benchmarks of operators have in common: one input, and the peers that are timed on it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
SHAPES = [(1, 2048, 7, 7), (64, 512, 14, 14), (64, 256, 28, 28), (128, 64, 112, 112)]
"""Of activations: within a core's L2 cache at first, 200 MB and more in 16 bits at last."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One input of an operator, made and checked.

    Attributes:
        operator: its name.
        inputs: what the input is: its shape, its dtype.
        calls: what is timed, by the names of the peers.
        absent: peers that cannot run here, and why.
    """

    operator: str
    inputs: dict[str, Any]
    calls: dict[str, Callable[[], object]]
    absent: dict[str, str] = field(default_factory=dict)


def activations(shape: tuple[int, ...], dtype: str, layout: str, *, seed: int, device: str = "cpu") -> torch.Tensor:
    """Standard normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
    return x.contiguous(memory_format=LAYOUTS[layout])
