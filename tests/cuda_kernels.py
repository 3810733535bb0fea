"""The CUDA kernels for tests: their source on the CPU through tests/cuda_on_cpu, or compiled for the GPU there is."""

import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
HOST = ROOT / "tests" / "cuda_on_cpu"
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SCHEDULES = [0, 1, 2, 3]  # forward, reverse, two seeds
Shape = tuple[int, int, int]  # examples, channels, positions


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


@functools.cache
def demangled(symbol: str) -> str:
    """The kernel and its template arguments, without return type, parameters and the namespace they share."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|pcafast::cuda::", "", name)
    return re.sub(r"^void ", "", re.sub(r"\([^()]*\)$", "", name))


class Kernels:
    """A library of kernels for one device.

    The options are those of g++; without, the library is soon there, but slow, and not watched by the sanitizer.
    """

    CHECKED = ("-O1", "-fsanitize=undefined")

    def __init__(
        self, library: Path, entry: str, sources: list[Path], device: str = "cpu", options: Sequence[str] = CHECKED
    ) -> None:
        self.device = device
        if device == "cpu":
            # "#pragma unroll" is nvcc's own.
            compiler = ["g++", *options, "-Wall", "-Werror", "-Wno-unknown-pragmas", "-fno-gnu-unique", "-fPIC"]
            compiler += ["-U_FORTIFY_SOURCE", "-x", "c++"]
        else:
            compiler = [str(nvcc()), "-arch=native", "-Xcompiler", "-fPIC", "-x", "cu"]
        command = [*compiler, "-std=c++17", "-shared", f"-I{ROOT / 'csrc'}", f"-I{HOST}", "-o", str(library)]
        result = subprocess.run([*command, str(HOST / entry), *map(str, sources)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        self.library = ctypes.CDLL(str(library))

    def call(self, name: str, *arguments: Any, schedule: int = 0) -> None:
        """Run what is under that name in the entry file; the schedule means something on the CPU alone."""
        if self.device == "cpu":
            self.library.set_schedule(ctypes.c_uint64(schedule))
        function = self.library[name]
        function.restype = ctypes.c_char_p
        error = function(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())

    def size(self, name: str, *arguments: Any) -> int:
        function = self.library[name]
        function.restype = ctypes.c_int64
        return int(function(*arguments))

    def update(self, name: str, args: ctypes.Structure, schedule: int = 0) -> None:
        """Call NAME_update with a workspace of the size that NAME_workspace says."""
        size = self.size(f"{name}_workspace", ctypes.byref(args))
        workspace = torch.full((size + 64,), torch.nan, dtype=torch.float64, device=self.device)
        workspace[size:] = 7  # nothing may be written here
        args.workspace = workspace.data_ptr()
        self.call(f"{name}_update", ctypes.byref(args), schedule=schedule)
        assert (workspace[size:] == 7).all()

    def barriers_met(self) -> list[str]:
        """The places of all barriers that threads came to since the last call."""
        self.library.barriers_met.restype = ctypes.c_char_p
        return self.library.barriers_met().decode().split()

    @contextmanager
    def without(self, barrier: str) -> Iterator[None]:
        self.library.set_absent_barrier(barrier.encode())
        try:
            yield
        finally:
            self.library.set_absent_barrier(b"")


def unneeded_barriers(kernels: Kernels, run: Callable[[int], list[torch.Tensor]], *files: str) -> list[str]:
    """The barriers without which `run(schedule)` goes right in every schedule.

    These are of those that it comes to, and of all that stand in these files of csrc/cuda.
    """
    kernels.barriers_met()
    right = run(0)
    met = kernels.barriers_met()
    assert met

    def goes_wrong(schedule: int) -> bool:
        try:
            return not all(map(torch.equal, run(schedule), right))
        except RuntimeError:
            return True

    def needed(barrier: str) -> bool:
        with kernels.without(barrier):
            return any(map(goes_wrong, SCHEDULES))

    paths = [ROOT / "csrc" / "cuda" / file for file in files]
    standing = {
        f"{path}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "__syncthreads" in line or "__syncwarp" in line
    }
    return sorted((standing | set(met)) - set(filter(needed, met)))


@pytest.fixture(autouse=True)
def defined_behaviour(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Misaligned vectors, an index beyond a shared array, overflow: the sanitizer prints them to stderr."""
    yield
    assert "runtime error" not in (errors := capfd.readouterr().err), errors


def lay_out(
    values: torch.Tensor, order: str, step: int = 1, offset: int = 0, gaps: tuple[int, int] = (0, 0)
) -> torch.Tensor:
    """A copy of (N, C, P) values with dimensions in this order in memory, every `step` elements, NaN around them.

    The gaps lie between runs of the last dimension, and of the last two.
    """
    sizes = dict(zip("NCP", values.shape, strict=True))
    strides, stride = {}, step
    for name, gap in zip(reversed(order), (*gaps, 0), strict=True):
        strides[name] = stride
        stride = stride * sizes[name] + gap
    margin = 64 + offset
    memory = torch.full((stride + 2 * margin,), torch.nan, dtype=values.dtype, device=values.device)
    view = memory.as_strided(values.shape, [strides[name] for name in "NCP"], margin)
    return view.copy_(values)


def far_apart(values: torch.Tensor, strides: Shape) -> torch.Tensor:
    """A copy of the values at these strides; only the pages written take memory."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    memory = torch.empty(elements, dtype=values.dtype, device=values.device)
    return memory.as_strided(values.shape, strides).copy_(values)


FAR_STRIDES: list[Shape] = [(2**31, 16, 1), (2**31, 1, 8), (2**31, 64, 4), (1 << 10, 1, 9 << 24), (1, 5 << 26, 32)]

# At and around the widths of loads, warps and batches of loads; examples in parts, and enough to be taken together.
SHAPES: list[Shape] = [
    *((2, 3, positions) for positions in (1, 2, 7, 16, 31, 32, 33, 49, 255, 256, 257, 513)),
    *((1, 2, positions) for positions in (1023, 1024, 1025)),
    *((2, channels, 5) for channels in (1, 2, 8, 31, 32, 33, 128, 129, 257)),
    (9, 2, 300),
    (1, 132, 700),
    (1, 1, 40_001),
]
SHAPES_OF_MANY_EXAMPLES: list[tuple[Shape, str]] = [
    ((2100, 4, 2), "positions"),
    ((2100, 8, 17), "positions"),
    ((1030, 16, 5), "channels"),
    ((1100, 32, 9), "channels"),
    ((17000, 32, 1), "channels, misaligned"),
    ((2100, 2, 1), "strided"),
]
