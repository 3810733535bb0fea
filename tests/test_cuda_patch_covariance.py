"""The kernels of patch covariance on the CPU, and on the GPU where there is one."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cuda_kernels import (  # noqa: F401
    DEVICES,
    ROOT,
    SCHEDULES,
    Kernels,
    defined_behaviour,
    unneeded_barriers,
)
from kernel_arguments import ChannelView, MapView, PatchCovarianceArgs

STATES = PatchCovarianceArgs.STATE
Lattice = tuple[int, int, int, int, int, int]  # top, left, rows, columns, down, right


@dataclass
class Pairs:
    """Which pixels are multiplied: `slots` are lists of lattices."""

    lattices: list[Lattice]
    slots: list[list[int]]
    steps: tuple[int, int] = (1, 1)

    @classmethod
    def one_each(cls, lattices: list[Lattice], steps: tuple[int, int] = (1, 1)) -> "Pairs":
        return cls(lattices, [[number] for number in range(len(lattices))], steps)


def pairs_of_same_3x3(height: int, width: int) -> Pairs:
    """Of a 3 x 3 kernel with padding 1: one lattice to each rectangle of PATCHES, section 1."""

    def pieces(offset: int, size: int) -> list[tuple[int, int]]:
        if offset == 0:
            return [(0, 1), (1, size - 2), (size - 1, 1)] if size > 1 else [(0, 1)]
        return [(max(0, -offset), max(0, size - abs(offset)))]

    half = [(down, right) for down in range(3) for right in range(-2, 3) if down > 0 or right >= 0]
    return Pairs.one_each(
        [
            (top, left, rows, columns, down, right)
            for down, right in half
            for top, rows in pieces(down, height)
            for left, columns in pieces(right, width)
        ]
    )


@dataclass
class State:
    patches: torch.Tensor
    count: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    comoment: torch.Tensor
    skipped: torch.Tensor

    @classmethod
    def zero(cls, pairs: Pairs, channels: int, groups: int = 1, device: str = "cpu") -> "State":
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        slots, width = len(pairs.slots), channels // groups
        means = zeros(slots, channels), zeros(slots, channels)
        return cls(zeros(), zeros(slots), *means, zeros(slots, groups, width, width), zeros().long())

    @classmethod
    def of(cls, x: torch.Tensor, pairs: Pairs, groups: int = 1, patches: int = 0) -> "State":
        """Of (N, C, H, W) values, pixel by pixel in float64."""
        state = cls.zero(pairs, x.shape[1], groups, str(x.device))
        state.patches += len(x) * patches
        for slot, lattices in enumerate(pairs.slots):
            both: list[list[torch.Tensor]] = [[], []]
            for top, left, rows, columns, down, right in (pairs.lattices[number] for number in lattices):
                for row in range(rows):
                    for column in range(columns):
                        y, z = top + row * pairs.steps[0], left + column * pairs.steps[1]
                        both[0].append(x[:, :, y, z].double())
                        both[1].append(x[:, :, y + down, z + right].double())
            if not both[0]:
                continue
            first, partner = (torch.cat(pixels) for pixels in both)
            state.count[slot] = len(first)
            state.left[slot], state.right[slot] = first.mean(0), partner.mean(0)
            first, partner = ((pixels - pixels.mean(0)).unflatten(1, (groups, -1)) for pixels in (first, partner))
            state.comoment[slot] = torch.einsum("ngi,ngj->gij", first, partner)
        return state

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in STATES]


def assert_close(found: State, expected: State, tolerance: float) -> None:
    """Every co-moment by its Frobenius error relative to that of the largest one."""
    for name in ("patches", "count", "skipped"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    largest = expected.comoment.flatten(1).norm(dim=1).max()
    errors = (found.comoment - expected.comoment).flatten(1).norm(dim=1)
    assert (errors <= tolerance * largest).all(), (errors / largest).max().item()
    for name in ("left", "right"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


@dataclass
class PatchCovariance:
    """The compiled kernels; __call__ merges a batch into a state."""

    kernels: Kernels

    @property
    def device(self) -> str:
        return self.kernels.device

    def __call__(
        self, state: State, x: torch.Tensor, pairs: Pairs, patches: int = 0, schedule: int = 0, padded: bool = False
    ) -> None:
        flat = [number for lattice in pairs.lattices for number in lattice]
        entries = [number for slot in pairs.slots for number in slot]
        ends = [sum(map(len, pairs.slots[: slot + 1])) for slot in range(len(pairs.slots))]
        tables = [(ctypes.c_int64 * len(table))(*table) for table in (flat, ends, entries)]
        lattices, slot_ends, slot_lattices = (ctypes.addressof(table) for table in tables)
        args = PatchCovarianceArgs(
            MapView.of(x),
            *x.shape[2:],
            None,
            None,
            1,
            None,
            *pairs.steps,
            len(pairs.lattices),
            lattices,
            len(pairs.slots),
            slot_ends,
            slot_lattices,
            state.comoment.shape[1],
            patches,
            *(tensor.data_ptr() for tensor in state.tensors()),
        )
        args.padded = padded
        self.kernels.update("patch_covariance", args, schedule)


@pytest.fixture(scope="session", params=DEVICES)
def patch_covariance(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PatchCovariance:
    path = tmp_path_factory.mktemp("patch_covariance") / "patch_covariance.so"
    sources = [ROOT / "csrc" / "cuda" / name for name in ("patch_covariance.cu", "pair_products.cu")]
    kernels = Kernels(path, "patch_covariance_entry.cpp", sources, request.param)
    assert kernels.size("patch_covariance_args_bytes") == ctypes.sizeof(PatchCovarianceArgs)
    return PatchCovariance(kernels)


def with_gaps(x: torch.Tensor, order: str, step: int = 1, offset: int = 0) -> torch.Tensor:
    """A copy with dimensions in this order in memory, every `step` elements, NaN around them."""
    sizes = dict(zip("NCHW", x.shape, strict=True))
    memory = torch.full((offset + step * x.numel() + 64,), torch.nan, dtype=x.dtype, device=x.device)
    strides = {}
    for name in reversed(order):
        strides[name] = step
        step *= sizes[name]
    return memory.as_strided(x.shape, [strides[name] for name in "NCHW"], offset).copy_(x)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels": lambda x: with_gaps(x, "NHWC"),
    "channels, misaligned": lambda x: with_gaps(x, "NHWC", offset=1),
    "columns": lambda x: with_gaps(x, "NCHW"),
    "strided": lambda x: with_gaps(x, "HNWC", step=3),
}


def exact_batch(shape: tuple[int, ...], device: str, seed: int = 0) -> torch.Tensor:
    """Quarters up to two: in every dtype all sums of their products are exact, so that no element may be missed."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, shape, generator=generator).double() / 4).to(device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 16, 7, 9), (9, 1, 2, 1)], ids=str)
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_equals_the_sums_over_pixels(
    patch_covariance: PatchCovariance, dtype: torch.dtype, shape: tuple[int, int, int, int], layout: str
) -> None:
    x = exact_batch(shape, patch_covariance.device)
    pairs = pairs_of_same_3x3(*shape[2:])
    state = State.zero(pairs, shape[1], 1, patch_covariance.device)
    patch_covariance(state, LAYOUTS[layout](x.to(dtype)), pairs, patches=7)
    tolerance = 2e-7 if dtype == torch.float32 else 1e-14  # of float32 the shift, a mean, is rounded
    assert_close(state, State.of(x, pairs, patches=7), tolerance)


# Tiles of pixels and channels at their edges, one lattice that is its own partner and one that is not.
@pytest.mark.parametrize("layout", ["channels", "columns", "strided"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 64, 6, 9), 1), ((2, 130, 4, 4), 1), ((1, 12, 5, 8), 4), ((2, 70, 3, 4), 70), ((1, 8, 24, 40), 1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_tiles_and_groups(
    patch_covariance: PatchCovariance,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    groups: int,
    layout: str,
) -> None:
    x = exact_batch(shape, patch_covariance.device)
    height, width = shape[2:]
    pairs = Pairs.one_each([(0, 0, height, width, 0, 0), (0, 1, height - 2, width - 1, 2, -1)])
    state = State.zero(pairs, shape[1], groups, patch_covariance.device)
    patch_covariance(state, LAYOUTS[layout](x.to(dtype)), pairs)
    assert_close(state, State.of(x, pairs, groups), 2e-7 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (1, 1), (13, 1), (70, 1), (130, 1), (6, 3)])
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_what_lies_after_padded_channels_does_not_count(
    patch_covariance: PatchCovariance, dtype: torch.dtype, channels: int, groups: int
) -> None:
    x = exact_batch((2, channels, 5, 6), patch_covariance.device)
    pairs = pairs_of_same_3x3(5, 6)
    padded = torch.full((2, 5, 6, (channels + 7) // 8 * 8), torch.nan, dtype=dtype, device=x.device)
    maps = padded[..., :channels].copy_(x.movedim(1, 3)).movedim(3, 1)
    state = State.zero(pairs, channels, groups, patch_covariance.device)
    patch_covariance(state, maps, pairs, patches=7, padded=True)
    tolerance = 2e-7 if dtype == torch.float32 else 1e-14
    assert_close(state, State.of(x, pairs, groups, patches=7), tolerance)


@pytest.mark.parametrize("layout", ["channels", "columns"])
def test_vectors_of_columns_and_steps(patch_covariance: PatchCovariance, layout: str) -> None:
    """Lattices that begin and end at whole vectors, or not; pixels apart."""
    x = exact_batch((2, 8, 6, 24), patch_covariance.device)
    for dtype in ChannelView.DTYPES:
        for left, columns, steps in ((8, 16, (1, 1)), (8, 16, (2, 1)), (4, 12, (1, 1)), (1, 8, (2, 2)), (0, 7, (3, 2))):
            lattices = [(0, left, 2, columns, 0, 0), (0, left, 2, columns, 1, 0), (0, left, 2, columns, 0, -left)]
            pairs = Pairs.one_each(lattices, steps)
            state = State.zero(pairs, 8, 1, patch_covariance.device)
            patch_covariance(state, LAYOUTS[layout](x.to(dtype)), pairs)
            assert_close(state, State.of(x, pairs), 2e-7 if dtype == torch.float32 else 1e-14)


def test_slots_share_lattices_and_some_are_empty(patch_covariance: PatchCovariance) -> None:
    """More numbers than come with one launch, lattices without pixels first and last, a slot without lattices."""
    x = exact_batch((2, 3, 8, 8), patch_covariance.device)
    squares = [(y, z, 2, 2, 0, 0) for y in range(0, 8, 2) for z in range(0, 8, 2)]
    moved = [(y, z, 2, 1, 2, 3) for y in range(0, 6, 2) for z in range(5)]
    empty = [(0, 0, 0, 5, 0, 0), (1, 1, 3, 0, 0, 0)]
    lattices = [*empty, *squares, empty[0], *moved, *empty]
    own, other = range(2, 2 + len(squares)), range(3 + len(squares), 3 + len(squares) + len(moved))
    slots = [[0, *own], list(own)[:5], list(own)[3:], list(other), [*list(other)[2:4], len(lattices) - 1], [0, 1], []]
    pairs = Pairs(lattices, slots)
    state = State.zero(pairs, 3, 1, patch_covariance.device)
    for _ in range(2):
        patch_covariance(state, x.float(), pairs, patches=3)
    assert_close(state, State.of(torch.cat([x, x]), pairs, patches=3), 3e-7)
    nothing = Pairs(empty, [[0], [1]])
    state = State.zero(nothing, 3, 1, patch_covariance.device)
    patch_covariance(state, x.float(), nothing, patches=3)
    assert_close(state, State.of(x, nothing, patches=3), 0)


@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
@pytest.mark.parametrize(("mean", "unit"), [(0, 1), (1000, 1), (1, 2.0**70), (1, 2.0**-70)], ids=str)
def test_batches_are_merged(patch_covariance: PatchCovariance, dtype: torch.dtype, mean: float, unit: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = ((torch.randn(12, 6, 5, 6, generator=generator, dtype=torch.float64) + mean) * unit).to(dtype)
    if not x.isfinite().all():
        return
    x = x.to(patch_covariance.device)
    pairs = pairs_of_same_3x3(5, 6)
    state = State.zero(pairs, 6, 1, patch_covariance.device)
    for number, batch in enumerate(x.split([1, 4, 2, 5])):
        patch_covariance(state, list(LAYOUTS.values())[number](batch), pairs)
    expected = State.of(x, pairs)
    for one in (state, expected):
        for tensor in (one.left, one.right, one.comoment, one.comoment):
            tensor /= unit
    assert_close(state, expected, 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_a_batch_that_is_not_finite_is_left_out_and_counted(
    patch_covariance: PatchCovariance, dtype: torch.dtype, place: tuple[int, int, int, int], value: float
) -> None:
    x = exact_batch((4, 3, 4, 5), patch_covariance.device)
    pairs = pairs_of_same_3x3(4, 5)
    bad = x[:2].to(dtype, copy=True)
    bad[place] = value
    state = State.zero(pairs, 3, 1, patch_covariance.device)
    for batch in (bad, x[:2].to(dtype), bad, x[2:].to(dtype)):
        patch_covariance(state, batch, pairs, patches=20)
    expected = State.of(x, pairs, patches=20)
    expected.skipped += 2
    assert_close(state, expected, 2e-7 if dtype == torch.float32 else 1e-13)


def test_only_pixels_of_pairs_are_looked_at(patch_covariance: PatchCovariance) -> None:
    x = exact_batch((2, 3, 4, 5), patch_covariance.device)
    pairs = Pairs.one_each([(1, 1, 2, 3, 0, 0), (1, 1, 2, 3, 1, -1)])
    expected = State.of(x, pairs)
    x[:, :, 0] = x[:, :, :2, 4] = math.nan
    for dtype in ChannelView.DTYPES:
        state = State.zero(pairs, 3, 1, patch_covariance.device)
        patch_covariance(state, x.to(dtype), pairs)
        assert_close(state, expected, 2e-7 if dtype == torch.float32 else 1e-14)


def test_partners_of_pixels_that_are_not_their_own(patch_covariance: PatchCovariance) -> None:
    x = exact_batch((2, 3, 4, 5), patch_covariance.device)
    for lattices in ([(0, 0, 4, 4, 0, 1)], [(0, 0, 4, 4, 0, 1), (1, 0, 3, 5, -1, 0)]):
        pairs = Pairs.one_each(lattices)
        for dtype in ChannelView.DTYPES:
            state = State.zero(pairs, 3, 1, patch_covariance.device)
            patch_covariance(state, x.to(dtype), pairs)
            assert_close(state, State.of(x, pairs), 2e-7 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("layout", ["channels", "columns"])
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
def test_the_same_bits_in_every_schedule(patch_covariance: PatchCovariance, dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = LAYOUTS[layout](torch.randn(2, 20, 18, 18, generator=generator).to(patch_covariance.device, dtype))
    pairs = Pairs.one_each([(0, 0, 18, 18, 0, 0), (0, 2, 17, 16, 1, -2)])
    results = []
    for schedule in SCHEDULES:
        state = State.zero(pairs, 20, 1, patch_covariance.device)
        patch_covariance(state, x, pairs, schedule=schedule)
        results.append(state.tensors())
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("strides", [(1 << 31, 1, 40, 8), (1 << 31, 64, 16, 1), (40, 5 << 26, 8, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_offsets_beyond_32_bits(
    patch_covariance: PatchCovariance, dtype: torch.dtype, strides: tuple[int, int, int, int]
) -> None:
    x = exact_batch((2, 8, 4, 5), patch_covariance.device)
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    far = torch.empty(elements, dtype=dtype, device=x.device).as_strided(x.shape, strides).copy_(x)
    pairs = Pairs.one_each([(0, 0, 4, 5, 0, 0), (1, 0, 3, 4, -1, 1)])
    state = State.zero(pairs, 8, 1, patch_covariance.device)
    patch_covariance(state, far, pairs)
    assert_close(state, State.of(x, pairs), 2e-7 if dtype == torch.float32 else 1e-14)


def test_equals_unfold(patch_covariance: PatchCovariance) -> None:
    """The blocks of a 3 x 3 kernel without padding, each tap pair a lattice of its own: F.unfold, in its order."""
    x = torch.randn(3, 4, 6, 7, generator=torch.Generator().manual_seed(3)).to(patch_covariance.device)
    taps = [(i, j) for i in range(3) for j in range(3)]
    pairs = Pairs.one_each([(i, j, 4, 5, k - i, m - j) for i, j in taps for k, m in taps if (i, j) <= (k, m)])
    state = State.zero(pairs, 4, 1, patch_covariance.device)
    patch_covariance(state, x, pairs, patches=20)
    columns = torch.nn.functional.unfold(x.double(), 3).movedim(1, 2).flatten(0, 1)
    expected = (torch.cov(columns.T, correction=0) * len(columns)).unflatten(0, (4, 9)).unflatten(2, (4, 9))
    slots = iter(state.comoment[:, 0])
    for one in range(9):
        for other in range(one, 9):
            torch.testing.assert_close(next(slots), expected[:, one, :, other], rtol=1e-6, atol=1e-5)
