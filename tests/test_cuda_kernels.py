"""The CUDA kernels: compiled by nvcc; run on the CPU through tests/cuda_on_cpu, and on the GPU where there is one."""

import ctypes
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
HOST = ROOT / "tests" / "cuda_on_cpu"
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SCHEDULES = [0, 1, 2, 3]  # forward, reverse, two seeds


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def build(library: Path, entry: str, sources: list[Path], device: str = "cpu") -> ctypes.CDLL:
    if device == "cpu":
        # "#pragma unroll" is nvcc's own.
        compiler = ["g++", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fno-gnu-unique", "-fPIC"]
        compiler += ["-fsanitize=undefined", f"-I{HOST}", "-x", "c++"]
    else:
        compiler = [str(nvcc()), "-arch=native", "-Xcompiler", "-fPIC", "-x", "cu"]
    command = [*compiler, "-std=c++17", "-shared", f"-I{ROOT / 'csrc'}", "-o", str(library), str(HOST / entry)]
    result = subprocess.run([*command, *map(str, sources)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


@pytest.fixture(autouse=True)
def _defined_behaviour(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Misaligned vectors, an index beyond a shared array, overflow: the sanitizer prints them to stderr."""
    yield
    assert "runtime error" not in (errors := capfd.readouterr().err), errors


# ---- the Taylor kernels --------------------------------------------------------------------------------------------


class ChannelView(ctypes.Structure):
    DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("sizes", ctypes.c_int64 * 3),
        ("strides", ctypes.c_int64 * 3),
    )

    @classmethod
    def of(cls, x: torch.Tensor) -> "ChannelView":
        sizes, strides = (ctypes.c_int64 * 3)(*x.shape), (ctypes.c_int64 * 3)(*x.stride())
        return cls(x.data_ptr(), cls.DTYPES.index(x.dtype), sizes, strides)


class TaylorArgs(ctypes.Structure):
    _fields_ = (
        ("activation", ChannelView),
        ("gradient", ChannelView),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("examples", "positions", "sums", "skipped", "workspace")),
    )


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

    library: ctypes.CDLL
    device: str

    def __call__(self, state: State, a: torch.Tensor, g: torch.Tensor, scale: float = 1.0, schedule: int = 0) -> None:
        fields = (state.examples, state.positions, state.sums, state.skipped)
        pointers = [x.data_ptr() for x in fields]
        args = TaylorArgs(ChannelView.of(a), ChannelView.of(g), scale, *pointers)
        size = self.library.taylor_workspace(ctypes.byref(args))
        workspace = torch.full((size + 64,), torch.nan, dtype=torch.float64, device=self.device)
        workspace[size:] = 7  # nothing may be written here
        args.workspace = workspace.data_ptr()
        error = self.library.taylor_update(ctypes.byref(args), ctypes.c_uint64(schedule))
        assert error is None, error
        assert (workspace[size:] == 7).all()


@pytest.fixture(scope="session", params=DEVICES)
def taylor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Taylor:
    path = tmp_path_factory.mktemp("taylor") / "taylor.so"
    library = build(path, "taylor_entry.cpp", [ROOT / "csrc" / "cuda" / "taylor.cu"], request.param)
    library.taylor_workspace.restype = ctypes.c_int64
    library.taylor_update.restype = ctypes.c_char_p
    library.taylor_args_bytes.restype = ctypes.c_size_t
    assert library.taylor_args_bytes() == ctypes.sizeof(TaylorArgs)
    return Taylor(library, request.param)


def lay_out(values: torch.Tensor, order: str, step: int = 1, offset: int = 0) -> torch.Tensor:
    """A copy of (N, C, P) values with dimensions in this order in memory, every `step` elements, NaN around them."""
    sizes = dict(zip("NCP", values.shape, strict=True))
    strides, stride = {}, step
    for name in reversed(order):
        strides[name] = stride
        stride *= sizes[name]
    margin = 64 + offset
    memory = torch.full((stride + 2 * margin,), torch.nan, dtype=values.dtype, device=values.device)
    view = memory.as_strided(values.shape, [strides[name] for name in "NCP"], margin)
    return view.copy_(values)


Layout = Callable[[torch.Tensor], torch.Tensor]
LAYOUTS: dict[str, tuple[Layout, Layout]] = {
    "positions": (lambda x: lay_out(x, "NCP"), lambda x: lay_out(x, "NCP")),
    "positions, misaligned alike": (lambda x: lay_out(x, "NCP", offset=3), lambda x: lay_out(x, "NCP", offset=3)),
    "positions, misaligned": (lambda x: lay_out(x, "NCP", offset=1), lambda x: lay_out(x, "NCP", offset=2)),
    "channels": (lambda x: lay_out(x, "NPC"), lambda x: lay_out(x, "NPC")),
    "channels, misaligned": (lambda x: lay_out(x, "NPC", offset=1), lambda x: lay_out(x, "NPC")),
    "strided": (lambda x: lay_out(x, "NCP", step=2), lambda x: lay_out(x, "PNC", step=3)),
    "different": (lambda x: lay_out(x, "NCP"), lambda x: lay_out(x, "NPC")),
}
Shape = tuple[int, int, int]
SHAPES: list[Shape] = [
    *((2, 3, positions) for positions in (1, 2, 7, 16, 31, 32, 33, 49, 255, 256, 257, 513)),
    *((1, 2, positions) for positions in (1023, 1024, 1025)),
    *((2, channels, 5) for channels in (1, 2, 8, 31, 32, 33, 128, 129, 257)),
    (9, 2, 300),
]
# Enough examples of few positions that a block takes several.
MANY_EXAMPLES: list[tuple[Shape, str]] = [
    ((2100, 4, 2), "positions"),
    ((1030, 16, 5), "channels"),
    ((17000, 32, 1), "channels, misaligned"),
    ((2100, 2, 1), "strided"),
]


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
    [*((shape, layout) for shape in SHAPES for layout in LAYOUTS), *MANY_EXAMPLES],
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


@pytest.mark.parametrize("shape", [(0, 4, 9), (3, 0, 9), (3, 4, 0)], ids=str)
def test_an_empty_batch_changes_the_counters_at_most(taylor: Taylor, shape: Shape) -> None:
    state = State.zero(shape[1], taylor.device)
    state.sums += 1
    empty = torch.empty(shape, device=taylor.device)
    taylor(state, empty, empty)
    assert (state.sums == 1).all()
    assert state.counts() == (shape[0], shape[0] * shape[2], 0)


def test_offsets_beyond_32_bits(taylor: Taylor) -> None:
    """Only the pages written take memory."""
    memory = torch.empty(2**31 + 64, dtype=torch.float16, device=taylor.device)
    far = memory.as_strided((2, 4, 16), (2**31, 16, 1))
    a, g = exact_batch((2, 4, 16), taylor.device)
    state = State.zero(4, taylor.device)
    taylor(state, far.copy_(a), g.half())
    torch.testing.assert_close(state.sums, expected_sums(a, g), rtol=1e-13, atol=0)


# ---- what the host header notices ----------------------------------------------------------------------------------

THREADS = 96  # of each block


@pytest.fixture(scope="session")
def run_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., torch.Tensor]:
    library = build(tmp_path_factory.mktemp("barriers") / "barriers.so", "barrier_kernels.cpp", [])
    library.run_kernel.restype = ctypes.c_char_p

    def run(name: str, schedule: int = 0, blocks: int = 2) -> torch.Tensor:
        out = torch.zeros(blocks, THREADS)
        error = library.run_kernel(name.encode(), blocks, ctypes.c_void_p(out.data_ptr()), ctypes.c_uint64(schedule))
        if error is not None:
            raise RuntimeError(error.decode())
        return out

    run.library = library
    return run


INDEX = torch.arange(THREADS)
RIGHT = {
    "reverse_block": INDEX.flip(0),
    "reverse_warps": INDEX.reshape(-1, 32).flip(1).flatten(),
    "rotate_twice": (INDEX + 2) % THREADS,
    "shuffles": INDEX // 32 * 32 + (INDEX + 1) % 32 + (INDEX ^ 5) * 1000,
    "votes": torch.full((THREADS,), 2),
    "half_warps": torch.ones(THREADS),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_is_right_in_every_schedule(
    run_kernel: Callable[..., torch.Tensor], name: str, schedule: int
) -> None:
    assert torch.equal(run_kernel(name, schedule), RIGHT[name].float().expand(2, -1))


@pytest.mark.parametrize("name", ["reverse_block", "reverse_warps", "rotate_twice"])
def test_a_missing_barrier_shows_between_schedules(run_kernel: Callable[..., torch.Tensor], name: str) -> None:
    results = [run_kernel(f"{name}, barrier missing", schedule) for schedule in SCHEDULES]
    assert any(not torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", ["read_unwritten_static", "read_unwritten_dynamic"])
def test_shared_memory_starts_as_nan_in_every_block(run_kernel: Callable[..., torch.Tensor], name: str) -> None:
    assert run_kernel(name).isnan().all()


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
def test_a_divergent_barrier_is_an_error(
    run_kernel: Callable[..., torch.Tensor], name: str, match: str, schedule: int
) -> None:
    with pytest.raises(RuntimeError, match=match):
        run_kernel(name, schedule)
    assert torch.equal(run_kernel("reverse_block")[0], RIGHT["reverse_block"].float())  # and the next launch is sound


def test_an_impossible_launch_is_an_error(run_kernel: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match="invalid configuration"):
        run_kernel("votes", blocks=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_grids_and_blocks_of_three_dimensions(run_kernel: Callable[..., torch.Tensor], schedule: int) -> None:
    grid, block = (2, 3, 4), (5, 2, 3)
    out, count = torch.full((12, 6, 10), -1, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (out, count)]
    sizes = [(ctypes.c_uint * 3)(*x) for x in (grid, block)]
    assert run_kernel.library.run_number_threads(*sizes, *pointers, ctypes.c_uint64(schedule)) == 0
    assert torch.equal(out.flatten().sort().values, torch.arange(720, dtype=torch.int32))
    first_block = out[:3, :2, :5].flatten()
    if schedule == 0:
        assert torch.equal(first_block, torch.arange(30, dtype=torch.int32))
    if schedule == 1:
        assert torch.equal(first_block, torch.arange(719, 689, -1, dtype=torch.int32))


# ---- nvcc ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(nvcc() is None, reason="there is no CUDA compiler: neither nvcc on PATH nor CUDA_HOME")
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc_compiles_without_a_warning_or_a_spill(source: Path, architecture: int, tmp_path: Path) -> None:
    command = [str(nvcc()), "-std=c++17", f"-arch=sm_{architecture}", "-c", "-o", str(tmp_path / "kernel.o")]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Werror", "-Xptxas", "-v", str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills
    assert all(spill == ("0", "0") for spill in spills), result.stderr
