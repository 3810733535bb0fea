"""The CPU kernels at each level of the instruction set they are compiled for, not only the widest one there is."""

import ctypes
import math
import platform
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_kernels import ROOT, Kernels, defined_behaviour, lay_out  # noqa: F401
from kernel_arguments import (
    ChannelView,
    CovarianceArgs,
    MapView,
    MomentsArgs,
    PatchCovarianceArgs,
    RankArgs,
    TaylorArgs,
)
from states import covariance_state, moments_state, patch_state, taylor_state
from test_cuda_rank import Rank, around_threshold
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from pcafast import reference
from pcafast.patches import Layout, Patches

HERE = ROOT / "tests" / "cpu_levels"
LEVELS = [1, 3, 4] if platform.machine() == "x86_64" else [1]  # of x86-64; the first has no choice to make
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": lambda x: lay_out(x, "NCP", offset=3),
    "channels last": lambda x: lay_out(x, "NPC", offset=1),
    "strided": lambda x: lay_out(x, "PNC", step=3),
}


ARGS = {
    "rank": RankArgs,
    "taylor": TaylorArgs,
    "channel_moments": MomentsArgs,
    "covariance": CovarianceArgs,
    "patch_covariance": PatchCovarianceArgs,
}


class LevelKernels(Kernels):
    """The kernels of one level; some have a workspace and an update as those for CUDA have."""

    def __init__(self, library: Path) -> None:
        self.device = "cpu"
        self.library = ctypes.CDLL(str(library))

    def call(self, name: str, *arguments: Any, schedule: int = 0) -> None:
        self.library[name](*arguments)


def compile_level(level: int, library: Path) -> None:
    target = f'target("arch=x86-64-v{level}"),' if level > 1 else ""
    options = ["-O2", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi", "-fno-gnu-unique"]
    options += ["-fsanitize=undefined", f"-DPCAFAST_MULTIARCH=__attribute__(({target} flatten))"]
    options.append(f"-D__builtin_cpu_supports(name)=(name[8]<='{level}')")  # the name is "x86-64-v3" or "x86-64-v4"
    options += [f"-I{folder}" for folder in (HERE, ROOT / "csrc", *include_paths())]
    sources = [
        HERE / "entry.cpp",
        *(
            ROOT / "csrc" / "cpu" / f"{name}.cpp"
            for name in ("rank", "covariance", "patch_covariance", "pixel_sums", "taylor")
        ),
    ]
    result = subprocess.run(["g++", *options, "-o", library, *sources], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("cpu_levels")
    paths = {level: folder / f"level{level}.so" for level in LEVELS}
    with ThreadPoolExecutor() as threads:
        list(threads.map(compile_level, paths.keys(), paths.values()))
    return paths


@pytest.fixture(params=LEVELS, ids="level {}".format)
def kernels(request: pytest.FixtureRequest, libraries: dict[int, Path]) -> Kernels:
    kernels = LevelKernels(libraries[request.param])
    if kernels.library.processor_level() < request.param:
        pytest.skip(f"this processor has no x86-64-v{request.param}")
    for name, args in ARGS.items():
        assert kernels.size(f"{name}_args_bytes") == ctypes.sizeof(args)
    return kernels


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pointers(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def taylor_update(kernels: Kernels, a: Tensor, g: Tensor, scale: float, state: list[Tensor]) -> None:
    kernels.update("taylor", TaylorArgs(ChannelView.of(a), ChannelView.of(g), scale, *pointers(state)))


def moments_update(kernels: Kernels, x: Tensor, state: list[Tensor]) -> None:
    kernels.update("channel_moments", MomentsArgs(ChannelView.of(x), *pointers(state)))


def covariance_update(
    kernels: Kernels, x: Tensor, groups: int, scale: float, weight: Tensor | None, state: list[Tensor]
) -> None:
    of_weight = None if weight is None else weight.data_ptr()
    args = CovarianceArgs(ChannelView.of(x), of_weight, groups, scale, *pointers(state))
    kernels.call("covariance_update", ctypes.byref(args))


def patch_update(kernels: Kernels, x: Tensor, layout: Layout, groups: int, state: list[Tensor]) -> None:
    source_rows, source_columns, taps, _, rectangles, ends, numbers = pointers(list(layout[:7]))
    args = PatchCovarianceArgs(
        MapView.of(x),
        len(layout.source_rows),
        len(layout.source_columns),
        source_rows,
        source_columns,
        len(layout.taps),
        taps,
        *layout.steps.tolist(),
        len(layout.rectangles),
        rectangles,
        len(layout.slot_ends),
        ends,
        numbers,
        groups,
        layout.patches,
        *pointers(state),
    )
    kernels.call("patch_covariance_update", ctypes.byref(args))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.skipif(len(LEVELS) == 1, reason="the levels are those of x86-64")
def test_each_library_is_of_its_level(libraries: dict[int, Path]) -> None:
    registers = {}
    for level, library in libraries.items():
        code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
        registers[level] = {name for name in ("%xmm", "%ymm", "%zmm") if name in code}
    assert registers == {1: {"%xmm"}, 3: {"%xmm", "%ymm"}, 4: {"%xmm", "%ymm", "%zmm"}}


@pytest.mark.parametrize("rtol", [1e-4, 1e-9])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (16, 16), (33, 20), (66, 70)])
def test_rank_of_spectra_around_the_threshold(
    kernels: Kernels, height: int, width: int, rtol: float, generator: torch.Generator
) -> None:
    """The largest maps go by way of their Gram matrices at 1e-4, and as the others do at 1e-9."""
    batches = [around_threshold(height, width, rtol, generator) for _ in range(5)]
    maps, expected = map(torch.cat, zip(*batches, strict=True))  # 15 maps, the last in a vector that is not full
    for number in (1, 9, 14):
        maps.flatten(0, 1)[number, number % height, 2] = math.nan if number > 1 else math.inf
        expected.flatten()[number] = -1
    for layout in (maps, maps.contiguous(memory_format=torch.channels_last), maps.mT):
        assert torch.equal(Rank(kernels)(layout, rtol), expected)


@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
@pytest.mark.parametrize(("height", "width"), [(12, 9), (70, 66)])
def test_rank_of_every_dtype(
    kernels: Kernels, height: int, width: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    maps = torch.randn(3, 5, height, width, generator=generator).relu()
    maps = (maps * torch.rand(3, 5, 1, width, generator=generator).square()).to(dtype)
    expected = reference.feature_map_rank(maps, 0.05, 0.0)
    assert len(expected.unique()) > 1
    assert torch.equal(Rank(kernels)(maps, 0.05), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
@pytest.mark.parametrize("positions", [7, 49, 130])
def test_taylor_and_moments_are_those_of_the_reference(
    kernels: Kernels, positions: int, dtype: torch.dtype, layout: str, generator: torch.Generator
) -> None:
    channels = 37
    taylor, moments = taylor_state(channels), moments_state(channels)
    of_reference = taylor_state(channels), moments_state(channels)
    for mean in (2.0, -0.5):
        x, g = torch.randn(2, 3, channels, positions, generator=generator, dtype=torch.float64)
        x, g = LAYOUTS[layout]((x + mean).relu().to(dtype)), LAYOUTS[layout](g.to(dtype))
        taylor_update(kernels, x, g, 3.5, taylor)
        reference.taylor_update_(x, g, 1, 3.5, *of_reference[0])
        moments_update(kernels, x, moments)
        reference.channel_moments_update_(x, 1, *of_reference[1])
    assert_close(taylor, of_reference[0], 1e-13)
    assert_close(moments, of_reference[1], 1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_16_bits_is_converted_exactly(kernels: Kernels, dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    for layout, shape in (("channels last", (1, -1, 1)), ("channels first", (1, 8, -1))):
        x = LAYOUTS[layout](numbers.reshape(shape))
        g = LAYOUTS[layout](torch.ones_like(x))
        state = taylor_state(x.shape[1])
        taylor_update(kernels, x, g, 1.0, state)
        reference_state = taylor_state(x.shape[1])
        reference.taylor_update_(x, g, 1, 1.0, *reference_state)
        assert_close(state, reference_state, 0 if x.shape[2] == 1 else 1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (3, 1), (16, 1), (17, 1), (70, 1), (70, 2)])
def test_covariance_is_that_of_the_reference(
    kernels: Kernels,
    channels: int,
    groups: int,
    weighted: bool,
    dtype: torch.dtype,
    layout: str,
    generator: torch.Generator,
) -> None:
    found, expected = covariance_state(channels, groups), covariance_state(channels, groups)
    for mean in (2.0, -1.0):
        x = torch.randn(3, channels, 130, generator=generator, dtype=torch.float64) + mean
        x = LAYOUTS[layout](x.to(dtype))
        weight = None
        if weighted:
            weight = torch.rand(3, 130, generator=generator, dtype=torch.float64).round(decimals=1)
            x.movedim(1, 2)[weight == 0] = math.nan
        covariance_update(kernels, x, groups, 2.5, weight, found)
        reference.covariance_update_(x, 1, groups, 2.5, weight, *expected)
    assert_close(found, expected, 1e-13 if dtype == torch.float64 else 1e-6)
    assert torch.equal(found[2], found[2].mT)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "groups", "kernel"), [(1, 1, 5), (3, 1, 3), (37, 1, 3), (100, 1, 2), (20, 20, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_patch_covariance_is_that_of_the_reference(
    kernels: Kernels,
    channels: int,
    groups: int,
    kernel: int,
    stride: int,
    dtype: torch.dtype,
    last: bool,
    generator: torch.Generator,
) -> None:
    cut = Patches.of(kernel, stride, padding=1)
    states = []
    for mean in (2.0, -1.0):
        x = (torch.randn(2, channels, 11, 10, generator=generator, dtype=torch.float64) + mean).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        layout = cut.layout(x, groups)
        states = states or [patch_state(layout, channels, groups) for _ in range(2)]
        patch_update(kernels, x, layout, groups, states[0])
        reference.patch_covariance_update_(x, *layout[:8], groups, *states[1])
    assert_close(*states, 1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ChannelView.DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_that_is_not_finite_is_left_out_and_counted(
    kernels: Kernels, value: float, dtype: torch.dtype, layout: str
) -> None:
    good = LAYOUTS[layout](torch.ones(2, 19, 49, dtype=dtype))
    for place in ((0, 0, 0), (1, 3, 21), (1, 18, 48)):
        bad = LAYOUTS[layout](good)
        bad[place] = value
        states = [taylor_state(19), moments_state(19), covariance_state(19)]
        taylor_update(kernels, bad, good, 1.0, states[0])
        moments_update(kernels, bad, states[1])
        covariance_update(kernels, bad, 1, 1.0, None, states[2])
        for *sums, skipped in states:
            assert not any(tensor.any() for tensor in sums)
            assert skipped == 1
