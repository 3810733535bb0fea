"""The covariance kernels on the CPU, and on the GPU where there is one."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cuda_kernels import (  # noqa: F401
    DEVICES,
    FAR_STRIDES,
    ROOT,
    SCHEDULES,
    ChannelView,
    Kernels,
    Shape,
    defined_behaviour,
    far_apart,
    lay_out,
    unneeded_barriers,
)

from pcafast.reference import covariance_update_

STATES = ("count", "mean", "comoment", "skipped")


class CovarianceArgs(ctypes.Structure):
    _fields_ = (
        ("x", ChannelView),
        ("weight", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*STATES, "workspace")),
    )


@dataclass
class State:
    count: torch.Tensor
    mean: torch.Tensor
    comoment: torch.Tensor
    skipped: torch.Tensor

    @classmethod
    def zero(cls, channels: int, groups: int = 1, device: str = "cpu") -> "State":
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        width = channels // groups
        return cls(zeros(), zeros(channels), zeros(groups, width, width), zeros().long())

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in STATES]

    def add(self, x: torch.Tensor, scale: float = 1.0, weight: torch.Tensor | None = None) -> "State":
        """As the reference does."""
        groups = self.comoment.shape[0]
        covariance_update_(x, 1, groups, scale, weight, self.count, self.mean, self.comoment, self.skipped)
        return self


def assert_close(found: State, expected: State, tolerance: float) -> None:
    """The co-moment by its relative Frobenius error, the means in standard deviations."""
    assert (found.count, found.skipped) == (expected.count, expected.skipped)
    error = (found.comoment - expected.comoment).norm() / expected.comoment.norm()
    assert error <= tolerance, error.item()
    deviation = (expected.comoment.diagonal(dim1=1, dim2=2).flatten() / expected.count).sqrt()
    assert ((found.mean - expected.mean).abs() <= tolerance * (deviation + 1e-9 * expected.mean.abs())).all()
    assert torch.equal(found.comoment, found.comoment.mT)


@dataclass
class Covariance:
    """The compiled kernels; __call__ merges a batch into a state."""

    kernels: Kernels

    @property
    def device(self) -> str:
        return self.kernels.device

    def __call__(
        self,
        state: State,
        x: torch.Tensor,
        scale: float = 1.0,
        weight: torch.Tensor | None = None,
        schedule: int = 0,
    ) -> None:
        pointers = [tensor.data_ptr() for tensor in state.tensors()]
        weights = None if weight is None else weight.data_ptr()
        args = CovarianceArgs(ChannelView.of(x), weights, state.comoment.shape[0], scale, *pointers)
        self.kernels.update("covariance", args, schedule)


@pytest.fixture(scope="session", params=DEVICES)
def covariance(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Covariance:
    path = tmp_path_factory.mktemp("covariance") / "covariance.so"
    sources = [ROOT / "csrc" / "cuda" / name for name in ("covariance.cu", "pair_products.cu")]
    kernels = Kernels(path, "covariance_entry.cpp", sources, request.param)
    assert kernels.size("covariance_args_bytes") == ctypes.sizeof(CovarianceArgs)
    return Covariance(kernels)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "positions": lambda x: lay_out(x, "NCP"),
    "positions, misaligned": lambda x: lay_out(x, "NCP", offset=3),
    "channels": lambda x: lay_out(x, "NPC"),
    "channels, misaligned": lambda x: lay_out(x, "NPC", offset=1),
    "channels, gaps": lambda x: lay_out(x, "NPC", gaps=(8, 16)),
    "positions, examples inside": lambda x: lay_out(x, "CNP"),
    "strided": lambda x: lay_out(x, "PNC", step=3),
}
EXACT = 1e-14


def exact_batch(shape: Shape, device: str, seed: int = 0) -> torch.Tensor:
    """Quarters up to two: in every dtype all sums of their products are exact, so that no element may be missed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator).double() / 4).to(device)


SHAPES: list[Shape] = [
    (2, 3, 1),
    (3, 16, 7),
    (2, 64, 32),
    (1, 65, 33),
    (2, 63, 16),
    (5, 128, 8),
    (1, 136, 24),
    (1, 2, 1500),
    (33, 8, 49),
    (700, 5, 1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_equals_the_reference(covariance: Covariance, dtype: torch.dtype, shape: Shape, layout: str) -> None:
    x = exact_batch(shape, covariance.device)
    state = State.zero(shape[1], 1, covariance.device)
    covariance(state, LAYOUTS[layout](x.to(dtype)))
    # The shift, a mean, is rounded to float32.
    tolerance = {torch.float64: EXACT, torch.float32: 2e-7}.get(dtype, EXACT)
    assert_close(state, State.zero(shape[1], 1, covariance.device).add(x), tolerance)
