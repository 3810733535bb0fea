"""The Taylor kernels on the CPU, and on the GPU where there is one."""

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
    SHAPES,
    SHAPES_OF_MANY_EXAMPLES,
    Kernels,
    Shape,
    defined_behaviour,
    far_apart,
    lay_out,
    unneeded_barriers,
)
from kernel_arguments import ChannelView, TaylorArgs


@dataclass
class State:
    examples: torch.Tensor
    positions: torch.Tensor
    sums: torch.Tensor
    skipped: torch.Tensor

    @classmethod
    def zero(cls, channels: int, device: str) -> "State":
        def number(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        sums = torch.zeros(4, channels, dtype=torch.float64, device=device)
        return cls(number(torch.float64), number(torch.float64), sums, number(torch.int64))

    def counts(self) -> tuple[float, float, int]:
        return self.examples.item(), self.positions.item(), self.skipped.item()


@dataclass
class Taylor:
    """The compiled kernels; __call__ adds a batch to a state."""

    kernels: Kernels

    @property
    def device(self) -> str:
        return self.kernels.device

    def __call__(self, state: State, a: torch.Tensor, g: torch.Tensor, scale: float = 1.0, schedule: int = 0) -> None:
        fields = (state.examples, state.positions, state.sums, state.skipped)
        pointers = [x.data_ptr() for x in fields]
        args = TaylorArgs(ChannelView.of(a), ChannelView.of(g), scale, *pointers)
        self.kernels.update("taylor", args, schedule)


@pytest.fixture(scope="session", params=DEVICES)
def taylor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taylor:
    path = tmp_path_factory.mktemp("taylor") / "taylor.so"
    kernels = Kernels(path, "taylor_entry.cpp", [ROOT / "csrc" / "cuda" / "taylor.cu"], request.param)
    assert kernels.size("taylor_args_bytes") == ctypes.sizeof(TaylorArgs)
    return Taylor(kernels)


Layout = Callable[[torch.Tensor], torch.Tensor]
LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "positions": (lambda x: lay_out(x, "NCP"), lambda x: lay_out(x, "NCP")),
    "positions, misaligned alike": (lambda x: lay_out(x, "NCP", offset=3), lambda x: lay_out(x, "NCP", offset=3)),
    "positions, misaligned": (lambda x: lay_out(x, "NCP", offset=1), lambda x: lay_out(x, "NCP", offset=2)),
    "channels": (lambda x: lay_out(x, "NPC"), lambda x: lay_out(x, "NPC")),
    "channels, misaligned": (lambda x: lay_out(x, "NPC", offset=1), lambda x: lay_out(x, "NPC")),
    "strided": (lambda x: lay_out(x, "NCP", step=2), lambda x: lay_out(x, "PNC", step=3)),
    "positions, other rows": (lambda x: lay_out(x, "NCP"), lambda x: lay_out(x, "NCP", gaps=(3, 0))),
    "positions, other examples": (lambda x: lay_out(x, "NCP"), lambda x: lay_out(x, "NCP", gaps=(0, 3))),
    "channels, other positions": (lambda x: lay_out(x, "NPC"), lambda x: lay_out(x, "NPC", gaps=(3, 0))),
    "channels, other examples": (lambda x: lay_out(x, "NPC"), lambda x: lay_out(x, "NPC", gaps=(0, 3))),
    "different": (lambda x: lay_out(x, "NCP"), lambda x: lay_out(x, "NPC")),
}


def exact_batch(shape: tuple[int, int, int], device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Quarters up to two: in every dtype all sums of their products are exact, so that no element may be missed."""
    generator = torch.Generator().manual_seed(seed)
    a, g = torch.randint(-8, 9, (2, *shape), generator=generator).double() / 4
    return a.to(device), g.to(device)


def expected_sums(a: torch.Tensor, g: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    products = a.double() * g.double()
    s = scale * products.sum(2)
    rows = [s.abs().sum(0) / a.shape[2], s.square().sum(0) / a.shape[2], s.sum(0)]
    return torch.stack([*rows, abs(scale) * products.abs().sum((0, 2))])


@pytest.mark.parametrize(
    ("shape", "layout"),
    [*((shape, layout) for shape in SHAPES for layout in LAYOUTS), *SHAPES_OF_MANY_EXAMPLES],
    ids=str,
)
def test_sums_equal_torch(taylor: Taylor, shape: Shape, layout: str) -> None:
    a, g = exact_batch(shape, taylor.device)
    of_a, of_g = LAYOUTS[layout]
    state = State.zero(shape[1], taylor.device)
    taylor(state, of_a(a.bfloat16()), of_g(g.bfloat16()), scale=-0.5)
    torch.testing.assert_close(state.sums, expected_sums(a, g, -0.5), rtol=1e-13, atol=0)
    assert state.counts() == (shape[0], shape[0] * shape[2], 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_g", ChannelView.DTYPES, ids=str)
@pytest.mark.parametrize("of_a", ChannelView.DTYPES, ids=str)
def test_every_pair_of_dtypes(taylor: Taylor, of_a: torch.dtype, of_g: torch.dtype, layout: str) -> None:
    a, g = exact_batch((3, 8, 37), taylor.device)
    a, g = LAYOUTS[layout][0](a.to(of_a)), LAYOUTS[layout][1](g.to(of_g))
    state = State.zero(8, taylor.device)
    taylor(state, a, g)
    torch.testing.assert_close(state.sums, expected_sums(a, g), rtol=1e-13, atol=0)


@pytest.mark.parametrize("layout", ["positions", "positions, misaligned", "channels", "channels, misaligned"])
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_error_is_a_few_roundings(taylor: Taylor, dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(1)
    a, g = torch.randn(2, 4, 8, 2500, generator=generator, dtype=torch.float64).to(taylor.device, dtype)
    state = State.zero(8, taylor.device)
    taylor(state, LAYOUTS[layout][0](a), LAYOUTS[layout][1](g))
    expected = expected_sums(a, g)
    absolute = (a.double() * g.double()).abs().sum(2)  # bounds the rounding of each example's sum
    bound = torch.stack([absolute.sum(0) / 2500, 2 * absolute.square().sum(0) / 2500, *[absolute.sum(0)] * 2])
    unit = 2.0**-51 if dtype == torch.float64 else 2.0**-24
    assert ((state.sums - expected).abs() <= unit * bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_16_bits_are_exact(taylor: Taylor, dtype: torch.dtype) -> None:
    """One product to a sum: all significant bits of both factors, subnormal numbers and the largest ones."""
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    values = [1 + torch.finfo(dtype).eps, 2 - torch.finfo(dtype).eps, -math.pi, 1e-4]
    values += [tiny / 2, -tiny, largest] if dtype == torch.float16 else []
    a = torch.tensor(values, dtype=dtype, device=taylor.device).reshape(1, -1, 1)
    a, g = a.expand(-1, -1, len(values)).reshape(1, -1, 1), a.expand(len(values), -1, -1).reshape(1, -1, 1)
    state = State.zero(a.shape[1], taylor.device)
    taylor(state, a, g)
    assert torch.equal(state.sums[2], (a.double() * g.double()).flatten())


@pytest.mark.parametrize("layout", ["positions", "positions, misaligned alike", "channels", "strided"])
@pytest.mark.parametrize("shape", [(3, 5, 77), (2, 130, 9), (1, 3, 2000)], ids=str)
def test_the_same_bits_in_every_schedule(taylor: Taylor, shape: Shape, layout: str) -> None:
    generator = torch.Generator().manual_seed(2)
    a, g = torch.randn(2, *shape, generator=generator).to(taylor.device)
    a, g = LAYOUTS[layout][0](a), LAYOUTS[layout][1](g)
    results = []
    for schedule in SCHEDULES:
        state = State.zero(shape[1], taylor.device)
        taylor(state, a, g, schedule=schedule)
        results.append(state.sums)
    assert not results[0].isnan().any()
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("taylor", ["cpu"], indirect=True)  # schedules and absent barriers are the emulation's
def test_every_barrier_is_needed(taylor: Taylor) -> None:
    a, g = exact_batch((1, 40, 9000), "cpu")
    bad = a.clone()
    bad[0, 39, 5] = torch.nan

    def run(schedule: int) -> list[torch.Tensor]:
        results = []
        for activation in (a, bad):
            state = State.zero(40, "cpu")
            taylor(state, *(lay_out(x.float(), "NPC") for x in (activation, g)), schedule=schedule)
            results += [state.sums, state.examples, state.skipped]
        return results

    assert unneeded_barriers(taylor.kernels, run, "channel_sums.h", "channel_batch.h", "taylor.cu") == []


@pytest.mark.parametrize("layout", ["positions", "channels", "strided"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 4, 300), (1, 7, 598)])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(
    taylor: Taylor, place: Shape, value: float, layout: str
) -> None:
    of_a, of_g = LAYOUTS[layout]
    state = State.zero(8, taylor.device)
    first, bad, last = (exact_batch((2, 8, 599), taylor.device, seed) for seed in range(3))
    taylor(state, of_a(first[0].float()), of_g(first[1].float()))
    for operand in (0, 1):
        batch = [x.float() for x in bad]
        batch[operand][place] = value
        taylor(state, of_a(batch[0]), of_g(batch[1]))
    taylor(state, of_a(last[0].float()), of_g(last[1].float()))
    torch.testing.assert_close(state.sums, expected_sums(*first) + expected_sums(*last), rtol=1e-13, atol=0)
    assert state.counts() == (4, 4 * 599, 2)


def test_a_square_beyond_double_leaves_the_batch_out(taylor: Taylor) -> None:
    a = torch.full((1, 2, 3), 1e100, dtype=torch.float64, device=taylor.device)
    state = State.zero(2, taylor.device)
    taylor(state, a, a)
    assert state.counts() == (0, 0, 1)
    taylor(state, a, a, scale=1e-100)
    assert state.counts() == (1, 3, 1)


@pytest.mark.parametrize("strides", FAR_STRIDES, ids=str)
def test_offsets_beyond_32_bits(taylor: Taylor, strides: Shape) -> None:
    a, g = exact_batch((2, 8, 16), taylor.device)
    state = State.zero(8, taylor.device)
    taylor(state, far_apart(a.half(), strides), g.half().movedim(1, 2).contiguous().movedim(2, 1))
    taylor(state, *[far_apart(a.half(), strides)] * 2)
    torch.testing.assert_close(state.sums, expected_sums(a, g) + expected_sums(a, a), rtol=1e-13, atol=0)
