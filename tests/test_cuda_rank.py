"""The rank kernels on the CPU, and on the GPU where there is one."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from cuda_kernels import DEVICES, ROOT, SCHEDULES, Kernels, defined_behaviour, unneeded_barriers  # noqa: F401
from kernel_arguments import ChannelView, MapView, RankArgs
from test_rank_accuracy import default_rtol, low_rank_maps, maps_with_spectra
from torch import Tensor

# Around the sides of the largest map of every kernel: 8, 16 and 32 of teams, 64, 128, 256 and 512 of blocks.
SHAPES = [
    (1, 1), (1, 2), (2, 2), (3, 2), (4, 4), (5, 7), (7, 8), (8, 8), (8, 1), (9, 9), (9, 3), (12, 15), (16, 16),
    (16, 17), (17, 17), (24, 31), (31, 31), (32, 32), (32, 5), (33, 33), (33, 1), (40, 64), (64, 20), (65, 10),
    (12, 128), (129, 9), (256, 7), (6, 257), (512, 3),
]  # fmt: skip


@dataclass
class Rank:
    """The compiled kernels; called like the operator."""

    kernels: Kernels

    def __call__(self, x: Tensor, rtol: float | None = None, atol: float = 0.0, schedule: int = 0) -> Tensor:
        x = x.to(self.kernels.device)
        ranks = torch.full(x.shape[:2], -7, device=x.device)
        args = RankArgs(MapView.of(x), default_rtol(x) if rtol is None else rtol, atol, ranks.data_ptr())
        size = self.kernels.size("rank_workspace", ctypes.byref(args))
        workspace = torch.full((size + 64,), torch.nan, dtype=torch.float64, device=x.device)
        workspace[size:] = 7  # nothing may be written here
        args.workspace = workspace.data_ptr()
        self.kernels.call("rank", ctypes.byref(args), schedule=schedule)
        assert (workspace[size:] == 7).all()
        return ranks.cpu()


@pytest.fixture(scope="session", params=DEVICES)
def rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rank:
    path = tmp_path_factory.mktemp("rank") / "rank.so"
    kernels = Kernels(path, "rank_entry.cpp", [ROOT / "csrc" / "cuda" / "rank.cu"], request.param)
    assert kernels.size("rank_args_bytes") == ctypes.sizeof(RankArgs)
    return Rank(kernels)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def around_threshold(height: int, width: int, rtol: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Maps (1, 3, height, width) with singular values 0.2 % above or below the threshold, and their ranks."""
    above = torch.rand(1, 3, min(height, width), generator=generator) < torch.rand(1, 3, 1, generator=generator)
    above[..., 0] = True
    spectra = rtol * torch.where(above, 1.002, 0.998).double()
    spectra[..., 0] = 1
    return maps_with_spectra(spectra, height, width, generator), above.sum(2)


@pytest.mark.parametrize("rtol", [None, 1e-3, 1e-9])
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_counts_singular_values_around_the_threshold(
    rank: Rank, height: int, width: int, rtol: float | None, generator: torch.Generator
) -> None:
    relative = max(height, width) * torch.finfo(torch.float32).eps if rtol is None else rtol
    maps, expected = around_threshold(height, width, relative, generator)
    assert torch.equal(rank(maps, rtol), expected)


@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width"), [(6, 8), (16, 13), (20, 32), (32, 32), (40, 10)])
def test_exact_rank_of_integer_maps(
    rank: Rank, height: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """A product of integer factors, one of them unit triangular, has its inner size as its rank, in every type."""
    for inner in (1, 2, 5):  # well conditioned
        left = torch.randint(0, 2, (2, 3, height, inner), generator=generator).tril(-1) + torch.eye(height, inner)
        right = torch.randint(0, 2, (2, 3, inner, width), generator=generator).triu(1) + torch.eye(inner, width)
        assert (rank((left @ right).to(dtype)) == inner).all()


@pytest.mark.parametrize(("height", "width"), [(7, 7), (15, 12), (32, 30), (36, 8)])
def test_every_layout(rank: Rank, height: int, width: int, generator: torch.Generator) -> None:
    maps = low_rank_maps(height, width, generator).float()
    expected = rank(maps)
    wide = torch.zeros(3, maps.shape[1], 2 * height, 3 * width)
    wide[:, :, ::2, ::3] = maps
    layouts = [maps.contiguous(memory_format=torch.channels_last), maps.mT.contiguous().mT, wide[:, :, ::2, ::3]]
    for layout in layouts:
        assert torch.equal(rank(layout), expected)
    assert torch.equal(rank(maps.mT), expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 8), (16, 16), (32, 32), (7, 40)])
def test_constant_and_zero_maps_at_every_magnitude(rank: Rank, height: int, width: int) -> None:
    values = [0.1, -3.7, 1e30, 1e-30, 1e300, 1e-300, 5e-324, -torch.finfo(torch.float64).max, 0.0, -0.0]
    maps = torch.tensor(values, dtype=torch.float64)[:, None, None, None].expand(-1, 2, height, width)
    values32 = torch.tensor([0.1, 1e30, 1e-30, 1e-42, 0.0])[:, None, None, None].expand(-1, 2, height, width)
    assert rank(maps).tolist() == [[1, 1]] * 8 + [[0, 0]] * 2
    assert rank(values32).tolist() == [[1, 1]] * 4 + [[0, 0]]


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e15, 1e300])
@pytest.mark.parametrize("size", [8, 14, 32, 35])
def test_scaled_maps_and_an_absolute_threshold(rank: Rank, size: int, scale: float, generator: torch.Generator) -> None:
    maps, expected = around_threshold(size, size, 1e-4, generator)
    assert torch.equal(rank(maps * scale, rtol=0.0, atol=1e-4 * scale), expected)
    assert torch.equal(rank(maps * scale, rtol=1e-4), expected)
    assert (rank(maps * scale, atol=1e300 * max(1.0, scale)) == 0).all()


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (11, 11), (16, 16), (32, 32), (34, 4)])
def test_nonfinite_maps_leave_their_neighbours_alone(
    rank: Rank, height: int, width: int, generator: torch.Generator
) -> None:
    clean = low_rank_maps(height, width, generator).float()
    expected = rank(clean)
    for value in (float("nan"), float("inf"), -float("inf")):
        maps = clean.clone()
        maps[0, 2, 3, 2] = value
        maps[1, 0, 0, 0] = value
        found = rank(maps)
        assert found[0, 2] == found[1, 0] == -1
        found[0, 2], found[1, 0] = expected[0, 2], expected[1, 0]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [1, 31, 33, 70])
def test_numbers_of_maps_that_do_not_fill_a_block(rank: Rank, count: int, generator: torch.Generator) -> None:
    for size in (3, 12, 20):
        kept = torch.randint(0, size + 1, (1, count), generator=generator)
        spectra = (torch.arange(size) < kept[..., None]).double()
        assert torch.equal(rank(maps_with_spectra(spectra, size, size, generator)), kept)


@pytest.fixture
def small_device(rank: Rank) -> Iterator[None]:
    """Shared memory for six columns of 64 rows but not for seven; two multiprocessors, so four blocks at a time."""
    if rank.kernels.device != "cpu":
        pytest.skip("a GPU's shared memory is what it is")
    rank.kernels.library.set_max_shared_bytes(ctypes.c_size_t(12_000))
    yield
    rank.kernels.library.set_max_shared_bytes(ctypes.c_size_t(227 << 10))


@pytest.mark.usefixtures("small_device")
@pytest.mark.parametrize(("height", "width"), [(48, 8), (7, 45), (40, 40)])
def test_maps_beyond_shared_memory(rank: Rank, height: int, width: int, generator: torch.Generator) -> None:
    maps = low_rank_maps(height, width, generator)[:, :2]
    expected = torch.linalg.matrix_rank(maps)
    assert torch.equal(rank(maps), expected)
    assert torch.equal(rank(maps * 1e100, schedule=2), expected)


def test_more_shared_memory_than_a_launch_has_by_default(rank: Rank, generator: torch.Generator) -> None:
    maps, expected = around_threshold(90, 90, 1e-5, generator)
    assert torch.equal(rank(maps, rtol=1e-5), expected)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 16), (32, 32), (40, 10)])
def test_the_same_in_every_schedule(rank: Rank, height: int, width: int, generator: torch.Generator) -> None:
    maps, expected = around_threshold(height, width, 1e-5, generator)
    for schedule in SCHEDULES:
        assert torch.equal(rank(maps, rtol=1e-5, schedule=schedule), expected)


@pytest.mark.parametrize("rank", ["cpu"], indirect=True)  # schedules and absent barriers are the emulation's
def test_every_barrier_is_needed(rank: Rank, small_device: None, generator: torch.Generator) -> None:
    shapes = [(8, 8), (32, 20), (33, 6), (48, 8)]
    batches = [around_threshold(*shape, 1e-5, generator)[0].repeat(1, 2, 1, 1) for shape in shapes]
    # The scale of a map depends on one thread's element.
    spectrum = torch.tensor([1e90, 1.1e85, 0.9e85, 1.2e85, 1e80], dtype=torch.float64)
    batches.append(torch.nn.functional.pad(torch.diag(spectrum), (0, 0, 0, 30)).expand(1, 6, -1, -1))
    # Beyond shared memory, each ten times the one before: a column of the next map would show.
    batches.append(torch.eye(52, 2).double() * torch.tensor([1.0, 0.5e-5]) * 10.0 ** torch.arange(12)[:, None, None])
    batches[-1] = torch.nn.functional.pad(batches[-1], (0, 6))[None]

    def run(schedule: int) -> list[Tensor]:
        return [rank(maps, rtol=1e-5, schedule=schedule) for maps in batches]

    files = ("rank_steps.h", "rank_small.h", "rank_large.h")
    assert unneeded_barriers(rank.kernels, run, *files) == []
