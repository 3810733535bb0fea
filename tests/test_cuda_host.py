"""What the host header (tests/cuda_on_cpu/device_host.h) notices in kernels that are right or wrong."""

import ctypes

import pytest
import torch
from cuda_kernels import SCHEDULES, Kernels, defined_behaviour, unneeded_barriers  # noqa: F401

THREADS = 96  # of each block
SHARED_BYTES = 4 * THREADS


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("barriers") / "barriers.so", "barrier_kernels.cpp", [])


def run(kernels: Kernels, name: str, schedule: int = 0, blocks: int = 2, shared: int = SHARED_BYTES) -> torch.Tensor:
    out = torch.zeros(blocks, THREADS)
    arguments = (name.encode(), blocks, ctypes.c_size_t(shared), ctypes.c_void_p(out.data_ptr()))
    kernels.call("run_kernel", *arguments, schedule=schedule)
    return out


INDEX = torch.arange(THREADS)
RIGHT = {
    "reverse_block": INDEX.flip(0),
    "reverse_warps": INDEX.reshape(-1, 32).flip(1).flatten(),
    "rotate_twice": (INDEX + 2) % THREADS,
    "one_too_many": INDEX,
    "shuffles": INDEX // 32 * 32 * 100001 + (INDEX + 1) % 32 + (INDEX ^ 5) * 1000,
    "votes": torch.full((THREADS,), 2),
    "warp_votes": 16 + (INDEX // 32 == 1).int(),
    "half_warps": torch.ones(THREADS),
    "copy_and_wait": torch.where(INDEX == 5, 0, 4),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_is_right_in_every_schedule(kernels: Kernels, name: str, schedule: int) -> None:
    result = run(kernels, name, schedule, shared=32 * THREADS)
    assert torch.equal(result, RIGHT[name].float().expand(2, -1))


@pytest.mark.parametrize(
    ("name", "unneeded"), [("reverse_block", 0), ("reverse_warps", 0), ("rotate_twice", 0), ("one_too_many", 1)]
)
def test_a_missing_barrier_shows_between_schedules(kernels: Kernels, name: str, unneeded: int) -> None:
    assert len(unneeded_barriers(kernels, lambda schedule: [run(kernels, name, schedule)])) == unneeded


@pytest.mark.parametrize("name", ["read_unwritten_static", "read_unwritten_dynamic"])
def test_shared_memory_starts_as_nan_in_every_block(kernels: Kernels, name: str) -> None:
    assert run(kernels, name).isnan().all()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("thread_leaves", r"divergent barrier: .* 1 exited; 95 wait at \S+barrier_kernels.cpp:\d+;"),
        ("two_barriers", r"divergent barrier: .* 48 wait at \S+:\d+; 48 wait at \S+:\d+;"),
        ("lane_skips_shuffle", r"divergent barrier: .* 65 exited; 31 wait at"),
        ("barrier_or_shuffle", r"divergent barrier: .* 32 exited; 64 wait at"),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_divergent_barrier_is_an_error(kernels: Kernels, name: str, match: str, schedule: int) -> None:
    with pytest.raises(RuntimeError, match=match):
        run(kernels, name, schedule)
    assert torch.equal(run(kernels, "reverse_block")[0], RIGHT["reverse_block"].float())  # and the next launch is sound


def test_an_impossible_launch_is_an_error(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match="invalid configuration"):
        run(kernels, "votes", blocks=0)


def test_shared_memory_ends_where_the_device_says(kernels: Kernels) -> None:
    most = kernels.size("max_shared_bytes")
    kernels.library.set_max_shared_bytes(ctypes.c_size_t(50 << 10))
    try:
        assert kernels.size("max_shared_bytes") == 50 << 10
        run(kernels, "reverse_warps", shared=50 << 10)
        with pytest.raises(RuntimeError, match="invalid configuration"):
            run(kernels, "reverse_warps", shared=(50 << 10) + 1)
    finally:
        kernels.library.set_max_shared_bytes(ctypes.c_size_t(most))


def test_a_write_beyond_dynamic_shared_memory_is_an_error(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match="a write beyond the 384 bytes of dynamic shared memory"):
        run(kernels, "write_beyond_shared")
    run(kernels, "write_beyond_shared", shared=2 * SHARED_BYTES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grids_and_blocks_of_three_dimensions(kernels: Kernels, schedule: int) -> None:
    grid, block = (2, 3, 4), (5, 2, 3)
    out, count = torch.full((12, 6, 10), -1, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (out, count)]
    sizes = [(ctypes.c_uint * 3)(*x) for x in (grid, block)]
    kernels.call("run_number_threads", *sizes, *pointers, schedule=schedule)
    assert torch.equal(out.flatten().sort().values, torch.arange(720, dtype=torch.int32))
    first_block = out[:3, :2, :5].flatten()
    if schedule == 0:
        assert torch.equal(first_block, torch.arange(30, dtype=torch.int32))
    if schedule == 1:
        assert torch.equal(first_block, torch.arange(719, 689, -1, dtype=torch.int32))


def test_a_copy_is_not_there_before_it_is_waited_for(kernels: Kernels) -> None:
    assert run(kernels, "copy_and_wait_for_one", shared=32 * THREADS).isnan().all()


@pytest.mark.parametrize("depth", [8, 16])
def test_matrix_products(kernels: Kernels, depth: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-9, 10, (rows, depth), generator=generator).float() for rows in (16, 8))
    out = torch.zeros(16, 8)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (left, right, out)]
    kernels.call("run_multiply_matrices", depth, *pointers)
    assert torch.equal(out, 100 + left @ right.T)


def test_matrix_products_cut_off(kernels: Kernels) -> None:
    """Sums lose what float has no room for; TF32 operands all but ten bits after the point."""
    left, right, out = torch.zeros(16, 8), torch.ones(8, 8), torch.zeros(16, 8)
    left[:, 0] = torch.tensor([2.0**-18, -(2.0**-18), 1 + 2.0**-10, 1 + 2.0**-11]).repeat(4)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (left, right, out)]
    kernels.call("run_multiply_matrices", 8, *pointers)
    expected = torch.tensor([100, 100 - 2.0**-17, 101 + 2.0**-10, 101]).repeat(4)
    assert torch.equal(out, expected[:, None].expand(-1, 8))


@pytest.mark.parametrize("transposed", [False, True])
def test_loads_of_matrices(kernels: Kernels, transposed: bool) -> None:
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    out = torch.zeros(32, 4, dtype=torch.int32)
    kernels.call("run_load_four", transposed, *[ctypes.c_void_p(x.data_ptr()) for x in (matrices, out)])
    rows = matrices.mT if transposed else matrices
    pairs = out.view(torch.int16).reshape(8, 4, 4, 2)  # g, t, matrix, one of two
    assert torch.equal(pairs.permute(2, 0, 1, 3).reshape(4, 8, 8), rows)


@pytest.mark.parametrize(
    ("x", "high"), [(1 + 2.0**-11, 1 + 2.0**-10), (-1 - 2.0**-11, -1 - 2.0**-10), (1 + 2.0**-12, 1), (2 - 2.0**-23, 2)]
)
def test_a_float_is_split_in_two(kernels: Kernels, x: float, high: float) -> None:
    parts = (ctypes.c_float * 2)()
    kernels.library.split(ctypes.c_float(x), parts)
    assert list(parts) == [high, x - high]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800000])
def test_what_is_not_finite_is_never_lost(kernels: Kernels, bits: int) -> None:
    x, parts = ctypes.c_float.from_buffer(ctypes.c_uint32(bits)), (ctypes.c_float * 2)()
    kernels.library.split(x, parts)
    kept = [value for value in torch.tensor(list(parts)).view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32)]
    assert not all(value.isfinite() for value in kept)
