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
    Kernels,
    Shape,
    defined_behaviour,
    far_apart,
    lay_out,
    unneeded_barriers,
)
from kernel_arguments import ChannelView, CovarianceArgs

from pcafast.reference import covariance_update_

STATES = CovarianceArgs.STATE


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


def exact_batch(shape: Shape, device: str, seed: int = 0) -> torch.Tensor:
    """Quarters up to two: in every dtype all sums of their products are exact, so that no element may be missed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator).double() / 4).to(device)


def normal_batch(shape: Shape, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


# At and around the edges of tiles of channels (32 to a warp, 64 or 128 to a block) and of chunks of samples (16 or 32).
SHAPES: list[Shape] = [
    (2, 3, 1),
    (3, 16, 7),
    (3, 12, 20),
    (2, 64, 32),
    (1, 65, 33),
    (2, 63, 16),
    (5, 128, 8),
    (1, 136, 24),
    (1, 2, 1500),
    (33, 8, 49),
    (700, 5, 1),
]
TOLERANCE = {torch.float32: 2e-7, torch.float64: 1e-14}  # the shift, a mean, is rounded to the dtype
EXACT = 1e-14


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_equals_the_reference(covariance: Covariance, dtype: torch.dtype, shape: Shape, layout: str) -> None:
    x = exact_batch(shape, covariance.device)
    state = State.zero(shape[1], 1, covariance.device)
    covariance(state, LAYOUTS[layout](x.to(dtype)))
    assert_close(state, State.zero(shape[1], 1, covariance.device).add(x), TOLERANCE.get(dtype, EXACT))


@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_sums_that_are_drained_several_times(covariance: Covariance, dtype: torch.dtype) -> None:
    x = exact_batch((1, 3, 14_000), covariance.device)
    state = State.zero(3, 1, covariance.device)
    covariance(state, lay_out(x.to(dtype), "NPC"))
    assert_close(state, State.zero(3, 1, covariance.device).add(x), TOLERANCE.get(dtype, EXACT))


@pytest.mark.parametrize("layout", ["positions", "channels", "strided"])
@pytest.mark.parametrize("groups", [(12, 3), (72, 72), (130, 10), (140, 2), (96, 3)], ids=str)
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_groups(covariance: Covariance, dtype: torch.dtype, groups: tuple[int, int], layout: str) -> None:
    """Some tiles have several groups, the last one of them fewer."""
    x = exact_batch((2, groups[0], 20), covariance.device)
    state = State.zero(*groups, covariance.device)
    covariance(state, LAYOUTS[layout](x.to(dtype)), scale=-2.0)
    assert_close(state, State.zero(*groups, covariance.device).add(x, -2.0), TOLERANCE.get(dtype, EXACT))


@pytest.mark.parametrize("layout", ["positions", "channels, misaligned", "strided"])
@pytest.mark.parametrize("shape", [(3, 5, 50), (2, 129, 9)], ids=str)
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_weights(covariance: Covariance, dtype: torch.dtype, shape: Shape, layout: str) -> None:
    """A position of no weight is not looked at, even if it is not finite."""
    x = normal_batch(shape, covariance.device).to(dtype) + 3
    weight = torch.rand(shape[0], shape[2], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[0, 2], weight[1] = 0, weight[1] > 0.5
    weight = weight.to(covariance.device)
    x[0, :, 2], x[1, 1][weight[1] == 0] = math.inf, math.nan
    state = State.zero(shape[1], 1, covariance.device)
    expected = State.zero(shape[1], 1, covariance.device)
    for scale in (1.0, 0.5):
        covariance(state, LAYOUTS[layout](x), scale, weight)
        expected.add(x, scale, weight)
    assert abs(state.count - expected.count) <= 1e-12 * expected.count
    state.count.copy_(expected.count)
    assert_close(state, expected, 1e-13 if dtype == torch.float64 else 4e-7)
    before = [tensor.clone() for tensor in state.tensors()]
    covariance(state, LAYOUTS[layout](x), weight=torch.zeros_like(weight))
    assert all(map(torch.equal, state.tensors(), before))


@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_batches_in_any_cut_and_order_are_one(covariance: Covariance, dtype: torch.dtype) -> None:
    x = normal_batch((30, 12, 40), covariance.device).relu().to(dtype)
    batches = x.split([1, 2, 3, 5, 8, 4, 7])
    expected = State.zero(12, 1, covariance.device).add(x)
    for order in (batches, batches[::-1]):
        state = State.zero(12, 1, covariance.device)
        for number, batch in enumerate(order):
            covariance(state, list(LAYOUTS.values())[number % len(LAYOUTS)](batch))
        assert_close(state, expected, 1e-13 if dtype == torch.float64 else 3e-7)


@pytest.mark.parametrize("layout", ["positions", "channels", "strided"])
def test_error_of_float32_is_that_of_torch(covariance: Covariance, layout: str) -> None:
    """Sums of squares are where numbers cut off instead of rounded would add up."""
    x = normal_batch((1, 40, 5000), covariance.device).float()
    state = State.zero(40, 1, covariance.device)
    covariance(state, LAYOUTS[layout](x))
    exact = State.zero(40, 1, covariance.device).add(x)
    centred = x[0] - x[0].mean(1, keepdim=True)
    of_torch = (centred @ centred.T - exact.comoment[0]).norm() / exact.comoment.norm()
    assert_close(state, exact, 2 * of_torch.item())


@pytest.mark.parametrize("layout", ["positions", "channels", "strided"])
def test_many_batches_far_from_zero(covariance: Covariance, layout: str) -> None:
    """The second law: |mean| / std = 1000, error at most 1e-6."""
    x = normal_batch((80, 8, 33), covariance.device).add(1000).float()
    state = State.zero(8, 1, covariance.device)
    for batch in x.split(2):
        covariance(state, LAYOUTS[layout](batch))
    assert_close(state, State.zero(8, 1, covariance.device).add(x), 1e-6)


@pytest.mark.parametrize("layout", ["positions", "channels", "strided"])
@pytest.mark.parametrize("width", [8, 72])
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_an_outlier_where_the_shift_is_chosen(
    covariance: Covariance, dtype: torch.dtype, width: int, layout: str
) -> None:
    x = normal_batch((1, width, 520 if width < 64 else 72), covariance.device)
    x[0, :, 0] = 6e4
    batches = [batch.to(dtype) for batch in (x, x[:, :, :1], x[:, :, 1:])]
    for some in (batches[:1], batches[1:]):  # at once, and where the outlier is all of the mean
        state, expected = State.zero(width, 1, covariance.device), State.zero(width, 1, covariance.device)
        for batch in some:
            covariance(state, LAYOUTS[layout](batch))
            expected.add(batch)
        assert_close(state, expected, 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("layout", ["positions", "channels", "strided"])
@pytest.mark.parametrize("width", [8, 72])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_far_from_zero(covariance: Covariance, dtype: torch.dtype, width: int, layout: str) -> None:
    x = normal_batch((2, width, 72), covariance.device)
    x[:, 1] += 300
    x = x.to(dtype)
    state = State.zero(width, 1, covariance.device)
    covariance(state, LAYOUTS[layout](x))
    assert_close(state, State.zero(width, 1, covariance.device).add(x), 3e-7)


@pytest.mark.parametrize("layout", ["positions", "channels", "strided"])
@pytest.mark.parametrize("width", [6, 80])
@pytest.mark.parametrize(
    ("dtype", "unit"),
    [
        *((torch.float32, unit) for unit in (2.0**125, 2.0**60, 2.0**-70, 2.0**-125)),
        *((torch.bfloat16, unit) for unit in (2.0**125, 2.0**-100)),
        *((torch.float64, unit) for unit in (2.0**400, 2.0**-400)),
    ],
    ids=str,
)
def test_squares_beyond_the_range_of_float(
    covariance: Covariance, dtype: torch.dtype, unit: float, width: int, layout: str
) -> None:
    x = normal_batch((2, width, 40), covariance.device).clamp(-3, 3).add(0.5).mul(unit).to(dtype)
    state = State.zero(width, 1, covariance.device)
    covariance(state, LAYOUTS[layout](x))
    expected = State.zero(width, 1, covariance.device).add(x)
    for tensors in (state, expected):
        tensors.mean /= unit
        tensors.comoment /= unit
        tensors.comoment /= unit
    assert_close(state, expected, 1e-12 if dtype == torch.float64 else 1e-6)


def test_zeros(covariance: Covariance) -> None:
    for dtype in ChannelView.DTYPES:
        state = State.zero(3, 1, covariance.device)
        covariance(state, torch.zeros(2, 3, 9, dtype=dtype, device=covariance.device))
        assert (state.count, state.skipped, state.mean.norm(), state.comoment.norm()) == (18, 0, 0, 0)


@pytest.mark.parametrize("layout", ["positions", "channels"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 39, 20)])
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_a_batch_that_is_not_finite_is_left_out_and_counted(
    covariance: Covariance, dtype: torch.dtype, place: Shape, value: float, layout: str
) -> None:
    x = exact_batch((4, 40, 21), covariance.device)
    bad = x[:2].to(dtype, copy=True)
    bad[place] = value
    state = State.zero(40, 1, covariance.device)
    for batch in (bad, x[:2].to(dtype), bad, x[2:].to(dtype)):
        covariance(state, LAYOUTS[layout](batch))
    expected = State.zero(40, 1, covariance.device).add(x)
    expected.skipped += 2
    assert_close(state, expected, TOLERANCE.get(dtype, 1e-13))


def test_a_square_beyond_double_leaves_the_batch_out(covariance: Covariance) -> None:
    x = torch.tensor([1e200, -1e200], dtype=torch.float64, device=covariance.device).reshape(1, 1, 2)
    state = State.zero(1, 1, covariance.device)
    covariance(state, x)
    assert [tensor.item() for tensor in state.tensors()] == [0, 0, 0, 1]
    covariance(state, x * 1e-100)
    assert (state.count, state.skipped) == (2, 1)


@pytest.mark.parametrize("layout", ["positions", "channels"])
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_the_same_bits_in_every_schedule(covariance: Covariance, dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](normal_batch((1, 70, 600), covariance.device).to(dtype))
    results = []
    for schedule in SCHEDULES:
        state = State.zero(70, 1, covariance.device)
        covariance(state, x, schedule=schedule)
        results.append(state.tensors())
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("covariance", ["cpu"], indirect=True)  # schedules and absent barriers are the emulation's
def test_every_barrier_is_needed(covariance: Covariance) -> None:
    x = normal_batch((1, 40, 1100), "cpu").half()

    covariance.kernels.library.set_multiprocessors(8)  # so many pieces that several threads share those of an element

    def run(schedule: int) -> list[torch.Tensor]:
        results = []
        for batch, weight in ((x, None), (x.float(), None), (x.double(), x[:, 0].double().abs())):
            state = State.zero(40)
            for _ in range(2):
                covariance(state, lay_out(batch, "NPC"), weight=weight, schedule=schedule)
            results += state.tensors()
        return results

    files = ("pair_staging.h", "pair_products.h", "pair_sums.h", "pair_commit.h")
    try:
        assert unneeded_barriers(covariance.kernels, run, *files) == []
    finally:
        covariance.kernels.library.set_multiprocessors(2)


@pytest.mark.parametrize("strides", FAR_STRIDES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_offsets_beyond_32_bits(covariance: Covariance, dtype: torch.dtype, strides: Shape) -> None:
    x = exact_batch((2, 8, 16), covariance.device)
    state = State.zero(8, 1, covariance.device)
    covariance(state, far_apart(x.to(dtype), strides))
    assert_close(state, State.zero(8, 1, covariance.device).add(x), TOLERANCE.get(dtype, EXACT))
