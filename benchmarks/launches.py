"""What the CUDA operators would launch on an H200, learnt on a machine that has none.

Their own host code says it: compiled for the CPU as tests/cuda_on_cpu does, but with launches noted in place of being
run. No element is read, so the tensors have no memory; their address, zero, is as well aligned as one from torch.
"""

import ctypes
import functools
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from cases import LAYOUTS
from h200 import MULTIPROCESSORS, SHARED_BYTES
from torch import Tensor

from pcafast.patches import Layout, Patches

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from cuda_kernels import ROOT, Kernels, demangled
from kernel_arguments import (
    ChannelView,
    CovarianceArgs,
    MapView,
    MomentsArgs,
    PatchCovarianceArgs,
    RankArgs,
    TaylorArgs,
)

SOURCES = {
    "covariance": ("covariance.cu", "pair_products.cu"),
    "patch_covariance": ("patch_covariance.cu", "pair_products.cu"),
    "taylor": ("taylor.cu",),
    "moments": ("moments.cu",),
    "rank": ("rank.cu",),
}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: with its template arguments, as in the compiler's report (tests/test_cuda_compiler.py).
        blocks: of the whole grid.
        threads: of a block.
        shared_bytes: of a block, beside what the kernel itself declares.
    """

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Launches:
    """All launches of one call of an operator, in their order."""

    launches: list[Launch]
    workspace_bytes: int
    copied_bytes: int = 0  # read and written where torch copies the batch first, so that channels lie side by side


class Planner(Kernels):
    """The kernels of one family, which are never run."""

    def __init__(self, family: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "kernels.so"
            sources = [ROOT / "csrc" / "cuda" / name for name in SOURCES[family]]
            super().__init__(library, f"{family}_entry.cpp", sources, options=())
            printed = subprocess.run(["nm", "--defined-only", library], capture_output=True, text=True, check=True)
        lines = [line.split() for line in printed.stdout.splitlines()]
        self.symbols = {int(offset, 16): symbol for offset, kind, symbol in lines if kind in "tTW"}
        self.library.set_multiprocessors(MULTIPROCESSORS)
        self.library.set_max_shared_bytes(ctypes.c_size_t(SHARED_BYTES))
        self.library.recorded_launches.restype = ctypes.c_char_p
        self.library.record_launches(True)

    def plan(self, workspace_size: str, update: str, args: ctypes.Structure) -> Launches:
        """What the operator, known by two functions of the library, would launch and ask for."""
        workspace = self.size(workspace_size, ctypes.byref(args)) * torch.float64.itemsize
        self.call(update, ctypes.byref(args))
        lines = self.library.recorded_launches().decode().splitlines()
        rows = [map(int, line.split()) for line in lines]
        return Launches([Launch(demangled(self.symbols[kernel]), *sizes) for kernel, *sizes in rows], workspace)


planner = functools.cache(Planner)


def covariance(shape: Shape, dtype: str, layout: str) -> Launches:
    return of_covariance(maps(shape, dtype, layout))


def patch_covariance(shape: Shape, dtype: str, layout: str, stride: int) -> Launches:
    """Of a 3x3 kernel with padding 1."""
    x = maps(shape, dtype, layout)
    return of_patch_covariance(x, Patches.of(3, stride, 1).layout(x, 1), 1)


def taylor(shape: Shape, dtype: str, layout: str) -> Launches:
    return of_taylor(maps(shape, dtype, layout), maps(shape, dtype, layout))


def moments(shape: Shape, dtype: str, layout: str) -> Launches:
    return of_moments(maps(shape, dtype, layout))


def rank(side: int, count: int) -> Launches:
    """Of so many square maps of float32."""
    return of_rank(maps((1, count, side, side), "float32", "channels first"))


def maps(shape: Shape, dtype: str, layout: str) -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta", memory_format=LAYOUTS[layout])


def of_covariance(x: Tensor, groups: int = 1, weight: Tensor | None = None) -> Launches:
    fits = x.ndim < 3 or x.shape[1] <= 64 or weight is not None or math.prod(x.shape[2:]) % 4 == 0
    inside, copied = with_channels_inside(x, fits)
    args = CovarianceArgs(view(inside), None if weight is None else weight.data_ptr(), groups, 1.0)
    return replace(planner("covariance").plan("covariance_workspace", "covariance_update", args), copied_bytes=copied)


def of_patch_covariance(x: Tensor, of: Layout, groups: int) -> Launches:
    """Without torch's launches that make the patches where there are few channels."""
    if len(of.taps) > 1:  # as csrc/ops.cpp does, a tensor of all patches, and the covariance of its pixels
        rows, columns = of.rectangles[0, 2:4].tolist()
        layout = "channels first" if columns % 4 == 0 else "channels last"
        x = maps((len(x), x.shape[1] * len(of.taps), rows, columns), str(x.dtype).split(".")[-1], layout)
        of = Patches.of(1).layout(x, groups)
    edges = of.rectangles[:, [1, 3, 5]]
    strides_fit = x.stride(3) == 1 and all(stride % 4 == 0 for stride in x.stride()[:3])
    fits = strides_fit and int(of.steps[1]) == 1 and bool((edges % 4 == 0).all())
    padded = not fits and x.shape[1] % 4 != 0
    inside, copied = with_padded_channels(x) if padded else with_channels_inside(x, fits)
    args = PatchCovarianceArgs(
        MapView.of(inside),
        *x.shape[2:],
        None,
        None,
        1,
        None,
        *of.steps.tolist(),
        len(of.rectangles),
        of.rectangles.data_ptr(),
        len(of.slot_ends),
        of.slot_ends.data_ptr(),
        of.slot_rectangles.data_ptr(),
        groups,
        of.patches,
    )
    args.padded = padded
    planned = planner("patch_covariance").plan("patch_covariance_workspace", "patch_covariance_update", args)
    return replace(planned, copied_bytes=copied)


def of_taylor(activation: Tensor, gradient: Tensor) -> Launches:
    args = TaylorArgs(view(activation), view(gradient), 1.0)
    return planner("taylor").plan("taylor_workspace", "taylor_update", args)


def of_moments(x: Tensor) -> Launches:
    return planner("moments").plan("channel_moments_workspace", "channel_moments_update", MomentsArgs(view(x)))


def of_rank(maps: Tensor) -> Launches:
    return planner("rank").plan("rank_workspace", "rank", RankArgs(MapView.of(maps), 0.0, 0.0))


def with_channels_inside(x: Tensor, positions_fit: bool) -> tuple[Tensor, int]:
    """As csrc/ops.cpp copies a batch, and the bytes read and written."""
    if x.ndim < 3 or x.stride(1) == 1 or x.shape[1] % 4 != 0 or positions_fit:
        return x, 0
    return x.movedim(1, -1).contiguous().movedim(-1, 1), 2 * x.nbytes


def with_padded_channels(x: Tensor) -> tuple[Tensor, int]:
    """As csrc/ops.cpp leaves room after the channels, and the bytes read and written."""
    count, channels, height, width = x.shape
    room = math.ceil(channels * x.itemsize / 16) * 16 // x.itemsize
    copy = torch.empty((count, height, width, room), dtype=x.dtype, device=x.device)
    return copy[..., :channels].movedim(3, 1), x.nbytes + copy.nbytes


def view(x: Tensor) -> ChannelView:
    """As csrc/ops.cpp makes it; one position has the stride 1."""
    flat = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    step = flat.stride(2) if flat.shape[2] > 1 else 1
    return ChannelView.of(flat.as_strided(flat.shape, (*flat.stride()[:2], step)))


def recording(calls: list[Launches]) -> SimpleNamespace:
    """In place of ``torch.ops.pcafast``: adds what every operator would launch."""

    def patches(x: Tensor, *arguments: Any) -> None:
        of, groups = Layout(*arguments[:8], members=torch.empty(0)), arguments[8]
        calls.append(of_patch_covariance(x, of, groups))

    return SimpleNamespace(
        covariance_update_=lambda x, _, groups, scale, weight, *state: calls.append(of_covariance(x, groups, weight)),
        patch_covariance_update_=patches,
        taylor_update_=lambda activation, gradient, *_: calls.append(of_taylor(activation, gradient)),
        channel_moments_update_=lambda x, *_: calls.append(of_moments(x)),
        feature_map_rank=lambda maps, rtol, atol: calls.append(of_rank(maps)),
    )
