"""The kernels of channel moments on the CPU, and on the GPU where there is one."""

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
from kernel_arguments import ChannelView, MomentsArgs

STATES = MomentsArgs.STATE


@dataclass
class State:
    count: torch.Tensor
    mean: torch.Tensor
    centred_squares: torch.Tensor
    absolute: torch.Tensor
    zeros: torch.Tensor
    skipped: torch.Tensor

    @classmethod
    def zero(cls, channels: int, device: str) -> "State":
        per_channel = torch.zeros(4, channels, dtype=torch.float64, device=device)
        count = torch.zeros((), dtype=torch.float64, device=device)
        return cls(count, *per_channel, torch.zeros((), dtype=torch.int64, device=device))

    @classmethod
    def of(cls, x: torch.Tensor) -> "State":
        """Of (N, C, P) values, in float64."""
        samples = x.double().movedim(1, 0).flatten(1)
        count = torch.tensor(samples.shape[1], dtype=torch.float64, device=x.device)
        mean = samples.mean(1)
        squares = (samples - mean[:, None]).square().sum(1)
        zeros = (samples == 0).sum(1).double()
        skipped = torch.zeros((), dtype=torch.int64, device=x.device)
        return cls(count, mean, squares, samples.abs().sum(1), zeros, skipped)

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in STATES]


def assert_close(found: State, expected: State, rtol: float = 1e-12) -> None:
    for name in STATES:
        one, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=rtol, msg=lambda message, name=name: f"{name}: {message}"
        )


@dataclass
class Moments:
    """The compiled kernels; __call__ merges a batch into a state."""

    kernels: Kernels

    @property
    def device(self) -> str:
        return self.kernels.device

    def __call__(self, state: State, x: torch.Tensor, schedule: int = 0) -> None:
        args = MomentsArgs(ChannelView.of(x), *(tensor.data_ptr() for tensor in state.tensors()))
        self.kernels.update("channel_moments", args, schedule)


@pytest.fixture(scope="session", params=DEVICES)
def moments(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Moments:
    path = tmp_path_factory.mktemp("moments") / "moments.so"
    kernels = Kernels(path, "moments_entry.cpp", [ROOT / "csrc" / "cuda" / "moments.cu"], request.param)
    assert kernels.size("channel_moments_args_bytes") == ctypes.sizeof(MomentsArgs)
    return Moments(kernels)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "positions": lambda x: lay_out(x, "NCP"),
    "positions, misaligned": lambda x: lay_out(x, "NCP", offset=3),
    "positions, examples inside": lambda x: lay_out(x, "CNP"),
    "channels": lambda x: lay_out(x, "NPC"),
    "channels, misaligned": lambda x: lay_out(x, "NPC", offset=1),
    "positions, gaps": lambda x: lay_out(x, "NCP", gaps=(3, 5)),
    "channels, gaps": lambda x: lay_out(x, "NPC", gaps=(3, 0)),
    "channels, wide gaps": lambda x: lay_out(x, "NPC", gaps=(4, 8)),
    "channels, examples inside": lambda x: lay_out(x, "PNC"),
    "strided": lambda x: lay_out(x, "PNC", step=3),
}


def exact_batch(shape: Shape, device: str, seed: int = 0) -> torch.Tensor:
    """Quarters up to two: in every dtype all sums are exact, so that no element may be missed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator).double() / 4).to(device)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [*((shape, layout) for shape in SHAPES for layout in LAYOUTS), *SHAPES_OF_MANY_EXAMPLES],
    ids=str,
)
def test_moments_equal_torch(moments: Moments, shape: Shape, layout: str) -> None:
    x = exact_batch(shape, moments.device)
    state = State.zero(shape[1], moments.device)
    moments(state, LAYOUTS[layout](x.bfloat16()))
    assert_close(state, State.of(x), rtol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 8, 37), (2, 12, 150)], ids=str)
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_every_dtype(moments: Moments, dtype: torch.dtype, shape: Shape, layout: str) -> None:
    x = exact_batch(shape, moments.device).to(dtype)
    state = State.zero(shape[1], moments.device)
    moments(state, LAYOUTS[layout](x))
    assert_close(state, State.of(x), rtol=1e-14)


def test_batches_in_any_cut_and_order_are_one(moments: Moments) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 12, 50, generator=generator).relu().to(moments.device)
    batches = x.split([1, 2, 3, 5, 8, 13, 21, 7])
    for order in (batches, batches[::-1]):
        state = State.zero(12, moments.device)
        for number, batch in enumerate(order):
            moments(state, list(LAYOUTS.values())[number % len(LAYOUTS)](batch))
        assert_close(state, State.of(x))


@pytest.mark.parametrize("layout", ["positions", "channels", "strided"])
def test_many_batches_far_from_zero(moments: Moments, layout: str) -> None:
    """The second law: |mean| / std = 1000."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(80, 2, 8, 33, generator=generator).add(1000).to(moments.device)
    state = State.zero(8, moments.device)
    for batch in x:
        moments(state, LAYOUTS[layout](batch))
    assert_close(state, State.of(x.flatten(0, 1)), rtol=1e-11)


@pytest.mark.parametrize("layout", ["positions", "channels"])
def test_an_outlier_in_the_first_place(moments: Moments, layout: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 8, 2500, generator=generator).to(moments.device)
    x[0, :, 0] = 1e6
    state = State.zero(8, moments.device)
    moments(state, LAYOUTS[layout](x))
    assert_close(state, State.of(x), rtol=1e-10)
    x[0, :, 0] = torch.arange(8) * 1e4  # and after it in a batch of its own, where it is all of the mean
    state = State.zero(8, moments.device)
    moments(state, LAYOUTS[layout](x[:1, :, :1]))
    moments(state, LAYOUTS[layout](x[:1, :, 1:]))
    assert_close(state, State.of(x[:1]), rtol=1e-10)


@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_zeros_of_either_sign_count_and_subnormal_numbers_do_not(moments: Moments, dtype: torch.dtype) -> None:
    tiny = 2.0 ** {torch.float16: -24, torch.bfloat16: -133, torch.float32: -149, torch.float64: -1074}[dtype]
    x = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0] * 7, dtype=torch.float64).reshape(1, 1, -1).to(dtype)
    x = x.expand(2, 4, -1).to(moments.device)
    for layout in LAYOUTS.values():
        state = State.zero(4, moments.device)
        moments(state, layout(x))
        assert state.zeros.tolist() == [28] * 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 77), (2, 132, 9), (1, 3, 2000)], ids=str)
def test_the_same_bits_in_every_schedule(moments: Moments, shape: Shape, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(moments.device))
    results = []
    for schedule in SCHEDULES:
        state = State.zero(shape[1], moments.device)
        moments(state, x, schedule)
        moments(state, x, schedule)
        results.append(state.tensors())
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("moments", ["cpu"], indirect=True)  # schedules and absent barriers are the emulation's
def test_every_barrier_is_needed(moments: Moments) -> None:
    good = exact_batch((1, 40, 9000), "cpu").float()
    bad = good.clone()
    bad[0, 39, 5] = torch.nan

    def run(schedule: int) -> list[torch.Tensor]:
        results = []
        for second in (good, bad):
            state = State.zero(40, "cpu")
            for batch in (good, second):
                moments(state, lay_out(batch, "NPC"), schedule)
            results += state.tensors()
        return results

    assert unneeded_barriers(moments.kernels, run, "channel_sums.h", "channel_batch.h", "moments.cu") == []


@pytest.mark.parametrize("layout", ["positions", "channels", "strided"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 4, 300), (1, 7, 598)])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(
    moments: Moments, place: Shape, value: float, layout: str
) -> None:
    x = exact_batch((6, 8, 599), moments.device).float()
    bad = x[2:4].clone()
    bad[place] = value
    state = State.zero(8, moments.device)
    for batch in (bad, x[:2], bad, x[4:]):
        moments(state, LAYOUTS[layout](batch))
    expected = State.of(torch.cat([x[:2], x[4:]]))
    expected.skipped += 2
    assert_close(state, expected)


def test_a_square_beyond_double_leaves_the_batch_out(moments: Moments) -> None:
    x = torch.tensor([1e200, -1e200], dtype=torch.float64, device=moments.device).reshape(1, 1, 2)
    state = State.zero(1, moments.device)
    moments(state, x)
    assert [tensor.item() for tensor in state.tensors()] == [0, 0, 0, 0, 0, 1]
    moments(state, x * 1e-100)
    assert (state.count, state.skipped) == (2, 1)


@pytest.mark.parametrize("strides", FAR_STRIDES, ids=str)
def test_offsets_beyond_32_bits(moments: Moments, strides: Shape) -> None:
    x = exact_batch((2, 8, 16), moments.device)
    state = State.zero(8, moments.device)
    moments(state, far_apart(x.half(), strides))
    assert_close(state, State.of(x))
