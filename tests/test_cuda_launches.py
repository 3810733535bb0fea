"""What benchmarks/launches.py says the CUDA operators launch, against what their source comes to by hand."""

import ctypes
import importlib
import itertools
import math
import re
from types import ModuleType

import pytest
import torch
from cuda_kernels import ROOT
from kernel_arguments import MapView, RankArgs

DTYPES = {"float16": "Float16", "bfloat16": "BFloat16", "float32": "float", "float64": "double"}
LAYOUTS = ["channels first", "channels last"]
SHAPE = (256, 512, 28, 28)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("launches")


def channel_sums(launches: ModuleType, of: str, kernel: str, blocks: int) -> list[object]:
    """The three launches of Taylor and the moments, of which the first says how the batch was cut."""
    sums = [(kernel, blocks, 256, 0), (f"sum_units<{of}>", 512, 256, 0), ("commit", 1, 1024, 0)]
    return [launches.Launch(*launch) for launch in sums]


# Blocks aim at 1024. First: 8 rows of 32 lanes are 8 channels, so each of the 256 examples has 64 blocks, already too
# many to cut it. Last: 32 lanes of w channels, so 512 / 32w blocks.
@pytest.mark.parametrize(
    ("dtype", "layout", "kernel", "blocks"),
    [
        *((dtype, "channels first", f"sum_rows<{name}, Taylor>", 256 * 64) for dtype, name in DTYPES.items()),
        ("bfloat16", "channels last", "sum_columns<BFloat16, 4, Taylor>", 256 * 4),
        ("float32", "channels last", "sum_columns<float, 4, Taylor>", 256 * 4),
        ("float64", "channels last", "sum_columns<double, 2, Taylor>", 256 * 8),
    ],
)
def test_taylor(launches: ModuleType, dtype: str, layout: str, kernel: str, blocks: int) -> None:
    found = launches.taylor(SHAPE, dtype, layout)
    assert found.launches == channel_sums(launches, "Taylor", kernel, blocks)
    assert found.workspace_bytes == (256 + 1) * 512 * 4 * 8  # four sums of each example and channel, and of all


def test_moments(launches: ModuleType) -> None:
    """All examples are one in this layout: 200,704 positions in 242 parts of 13 * 64."""
    found = launches.moments(SHAPE, "bfloat16", "channels last")
    assert found.launches == channel_sums(launches, "Moments", "sum_columns<BFloat16, 4, Moments>", 242 * 4)
    assert found.workspace_bytes == (242 + 1) * 512 * 4 * 8


def test_covariance(launches: ModuleType) -> None:
    """10 pairs of tiles of 128 channels, in as many pieces as one wave of 2 * 132 blocks has room for."""
    found = launches.covariance(SHAPE, "bfloat16", "channels first")
    pieces, step = 26, 64
    half, single = (
        "multiply_pairs<Tiling<Half<BFloat16>, 128, false, 64>, AsyncStaging, BFloat16, 8>",
        "multiply_pairs<Tiling<Single, 128, false, 32>, RegisterStaging, BFloat16, 4>",
    )
    expected = [
        ("choose_shift", 64, 256, 0),  # a warp to a channel
        # Four stages of 32 padded samples, the shifts, how to step on, and two sums of channels to a thread.
        (half, 10 * pieces, 128, 2 * 4 * 128 * (32 + 8) * 2 + 2 * 128 * 4 + step + 128 * 2 * 8),
        ("add_channel_sums", 64, 256, 0),
        (single, 10 * pieces, 256, 2 * 2 * 128 * (32 + 4) * 4 + 2 * 128 * 4 + step + 256 * 8),
        ("add_channel_sums", 64, 256, 0),
        ("commit_products", 512 // 4 * 512 // 32, 32 * 16, 0),  # four threads share the pieces, so four rows of 32
        ("commit_means", 1, 256, 0),
    ]
    assert found.launches == [launches.Launch(*launch) for launch in expected]
    records = 10 * pieces * (2 * 128 + 128 * 128 // 2)
    tables = 8 + 1 + 2 * 512 + 3 * 512 + 10 + 4 + 1  # verdicts, weight, shifts, means and squares, lattice, slot, entry
    assert found.workspace_bytes == 8 * (records + tables)


@pytest.mark.parametrize(
    ("stride", "slots", "tables", "rows"), [(1, 29, [], 4), (2, 45, [("write_numbers", 1, 256, 0)], 8)]
)
def test_patch_covariance(
    launches: ModuleType, stride: int, slots: int, tables: list[tuple[str, int, int, int]], rows: int
) -> None:
    """So many rectangles, each of 10 + 4 + 1 numbers in the tables; the first launch takes 448 of them."""
    found = launches.patch_covariance((128, 64, 56, 56), "float32", "channels last", stride).launches
    product = found[1 + len(tables)]
    assert product.kernel == "multiply_pairs<Tiling<Single, 64, true, 32>, RegisterStaging, float, 4>"
    expected = [
        *tables,
        ("choose_shift", 8, 256, 0),
        (product.kernel, product.blocks, 128, 2 * 2 * 32 * (64 + 8) * 4 + 2 * 64 * 4 + 64 + 128 * 8),
        ("add_channel_sums", 8 * slots, 256, 0),
        ("judge", 1, 256, 0),
        (product.kernel, product.blocks, 128, product.shared_bytes),
        ("add_channel_sums", 8 * slots, 256, 0),
        ("commit_products", 64 // rows * 2 * slots, 512, 0),
        ("commit_means", slots, 256, 0),
    ]
    assert found == [launches.Launch(*launch) for launch in expected]
    assert 0.97 <= product.blocks / (3 * 132) <= 1  # one wave


def test_patches_of_few_channels_are_channels(launches: ModuleType) -> None:
    found = launches.patch_covariance((16, 3, 32, 32), "float32", "channels last", 2)
    assert found == launches.covariance((16, 27, 16, 16), "float32", "channels first")


@pytest.mark.parametrize(
    ("side", "count", "kernel", "blocks", "threads", "doubles", "in_workspace"),
    [
        (8, 1 << 17, "rank_small<rank::Team<2, 2, 4, 4> >", (1 << 17) * 4 // 128, 128, 0, 0),
        (14, 1000, "rank_small<rank::Team<4, 4, 4, 4> >", 1000 * 16 // 128, 128, 0, 0),
        (32, 1001, "rank_small<rank::Team<4, 8, 8, 4> >", 251, 128, 0, 0),
        (56, 1000, "rank_large<2, true>", 1000, 256, 64 * 56 + 16 * 64 + 6 * 56, 0),
        (112, 1000, "rank_large<4, true>", 1000, 256, 128 * 112 + 16 * 128 + 6 * 112, 0),
        (224, 1000, "rank_large<7, false>", 2 * 132, 256, (16 + 6) * 224, 2 * 132 * 224 * 224),
        (512, 1000, "rank_large<16, false>", 128, 256, (16 + 6) * 512, 1 << 25),  # as many as 256 MiB hold
    ],
)
def test_rank(
    launches: ModuleType,
    side: int,
    count: int,
    kernel: str,
    blocks: int,
    threads: int,
    doubles: int,
    in_workspace: int,
) -> None:
    found = launches.rank(side, count)
    assert found.launches == [launches.Launch("rank::" + kernel, blocks, threads, 8 * doubles)]
    assert found.workspace_bytes == 8 * in_workspace


@pytest.mark.parametrize(
    ("operator", "shape", "dtype", "layout", "kernel"),
    [
        ("taylor", (8, 510, 28, 28), "float32", "channels last", "sum_columns<float, 1, Taylor>"),
        ("moments", (8, 7, 28, 28), "bfloat16", "channels last", "sum_columns<BFloat16, 1, Moments>"),
        (
            *("covariance", (8, 510, 7, 7), "bfloat16", "channels first"),
            "multiply_pairs<Tiling<Half<BFloat16>, 128, false, 32>, RegisterStaging, BFloat16, 1>",
        ),
        (
            *("covariance", (8, 516, 7, 7), "float16", "channels last"),
            "multiply_pairs<Tiling<Half<Float16>, 128, true, 32>, AsyncStaging, Float16, 4>",
        ),
        (
            *("covariance", (8, 33, 28, 28), "float64", "channels last"),
            "multiply_pairs<Tiling<Double, 64, true, 32>, RegisterStaging, double, 1>",
        ),
    ],
)
def test_sizes_that_wide_loads_do_not_fit(
    launches: ModuleType, operator: str, shape: tuple[int, ...], dtype: str, layout: str, kernel: str
) -> None:
    found = getattr(launches, operator)(shape, dtype, layout).launches
    assert kernel in [launch.kernel for launch in found]


def test_every_kernel_stands_in_the_source(launches: ModuleType) -> None:
    files = (ROOT / "csrc" / "cuda").glob("*.*")
    declared = r"__global__ void __launch_bounds__\([^()]*\)\s+(\w+)\("
    standing = {name for file in files for name in re.findall(declared, file.read_text())}
    cases = list(itertools.product([(2, 80, 6, 6), (900, 6, 1, 1)], DTYPES, LAYOUTS))
    operators = (launches.covariance, launches.taylor, launches.moments)
    found = [operator(*case) for operator in operators for case in cases]
    found += [launches.patch_covariance(*case, stride) for case in cases for stride in (1, 2)]
    found += [launches.rank(side, 10) for side in (3, 40)]
    names = {re.sub(r"^rank::|<.*", "", launch.kernel) for one in found for launch in one.launches}
    assert names == standing - {"add_weights"}  # nothing is weighted here


def test_a_recorded_launch_is_not_run(launches: ModuleType) -> None:
    x, ranks = torch.eye(8).expand(1, 3, -1, -1), torch.full((1, 3), -7)
    args = RankArgs(MapView.of(x), 1e-6, 0.0, ranks.data_ptr())
    planner = launches.planner("rank")
    assert len(planner.plan("rank_workspace", "rank", args).launches) == 1
    assert ranks.tolist() == [[-7] * 3]
    planner.library.record_launches(False)
    try:
        planner.call("rank", ctypes.byref(args))
    finally:
        planner.library.record_launches(True)
    assert ranks.tolist() == [[8] * 3]


def test_a_launch_that_cannot_be_is_refused(launches: ModuleType) -> None:
    planner = launches.planner("rank")
    planner.library.set_max_shared_bytes(ctypes.c_size_t(1000))
    try:
        with pytest.raises(RuntimeError, match="invalid configuration"):
            launches.rank(40, 10)
    finally:
        planner.library.set_max_shared_bytes(ctypes.c_size_t(launches.SHARED_BYTES))


@pytest.mark.parametrize(
    ("dtype", "name", "kind"),
    [("bfloat16", "BFloat16, 8", "Half<BFloat16>, 128, true, 64"), ("float32", "float, 4", "Single, 64, true, 32")],
)
def test_covariance_of_linear_layers(launches: ModuleType, dtype: str, name: str, kind: str) -> None:
    """One position to an example: read as wide as any."""
    found = launches.covariance((4096, 512, 1, 1), dtype, "channels first")
    staging = "AsyncStaging" if dtype == "bfloat16" else "RegisterStaging"
    assert f"multiply_pairs<Tiling<{kind}>, {staging}, {name}>" in [one.kernel for one in found.launches]


@pytest.mark.parametrize("operator", ["covariance", "patch_covariance"])
def test_batches_are_copied_where_else_every_element_were_loaded_by_itself(launches: ModuleType, operator: str) -> None:
    """So that channels lie side by side, if rows of positions do not begin at multiples of four."""
    stride = [1] if operator == "patch_covariance" else []
    first, last = (getattr(launches, operator)((8, 512, 7, 7), "bfloat16", layout, *stride) for layout in LAYOUTS)
    assert (first.copied_bytes, last.copied_bytes) == (2 * 8 * 512 * 7 * 7 * 2, 0)
    assert first.launches == last.launches
    assert "AsyncStaging, BFloat16, 8>" in " ".join(one.kernel for one in first.launches)


@pytest.mark.parametrize(("dtype", "last"), [("bfloat16", "AsyncStaging, BFloat16, 8>"), ("float32", "float, 4>")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_of_few_channels_are_copied_with_room_for_vectors(
    launches: ModuleType, dtype: str, last: str, layout: str
) -> None:
    found = launches.patch_covariance((16, 3, 32, 32), dtype, layout, 1)
    size = 2 if dtype == "bfloat16" else 4
    assert found.copied_bytes == 16 * 32 * 32 * (3 * size + 16)
    (first, _) = (one.kernel for one in found.launches if one.kernel.startswith("multiply_pairs"))
    assert first.endswith(last)


@pytest.mark.parametrize("shape", [(128, c, side, side) for c, side in ((64, 56), (256, 14), (512, 28), (1024, 14))])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_waves_are_full(launches: ModuleType, shape: tuple[int, ...], dtype: str) -> None:
    """The blocks of a covariance take the same time, so a last wave of few would keep most of the device idle."""
    found = launches.covariance(shape, dtype, "channels first").launches[1]
    kinds = {"Single": 3, "Half<BFloat16>, 64": 5, "128, false, 64>": 2, "128, false, 32>": 1}
    wave = 132 * next(resident for kind, resident in kinds.items() if kind in found.kernel)
    assert math.ceil(found.blocks / wave) * wave / found.blocks < 1.1
