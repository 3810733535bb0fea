"""What compute-sanitizer is given to watch: that it is right, notices what is wrong, and reaches every kernel."""

import ctypes
import importlib
import re
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_kernels import ROOT, demangled
from kernel_arguments import (
    ChannelView,
    CovarianceArgs,
    MapView,
    MomentsArgs,
    PatchCovarianceArgs,
    RankArgs,
    TaylorArgs,
)
from torch import Tensor

NEVER_LARGE_ENOUGH = {"rank::rank_large<2, false>", "rank::rank_large<4, false>"}  # maps that do not fit on an H200


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def test_all_calls_are_right(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = module("gpu_launches")
    assert calls.check_all("cpu") > 300

    def wrong(*arguments: Any) -> None:
        torch.ops.pcafast.taylor_update_(*arguments)
        arguments[6][1, 3] *= 1.01

    monkeypatch.setattr(calls, "operators", SimpleNamespace(taylor_update_=wrong))
    monkeypatch.setattr(calls, "CALLS", [lambda: [calls.taylor(calls.normal(3, 8, 5, 5), calls.normal(3, 8, 5, 5))]])
    with pytest.raises(AssertionError, match="call 0"):
        calls.check_all("cpu")


class Recorded:
    """The operators, none of which runs; the kernels that they would launch on an H200."""

    def __init__(self, launches: ModuleType) -> None:
        self.planner = launches.planner
        self.kernels: set[str] = set()

    def covariance_update_(self, x: Tensor, _: int, groups: int, scale: float, weight: Tensor | None, *__: Any) -> None:
        pointer = None if weight is None else weight.data_ptr()
        self.record("covariance", CovarianceArgs(view(x), pointer, groups, scale))

    def patch_covariance_update_(self, x: Tensor, *arguments: Any) -> None:
        taps, steps, rectangles, slot_ends, slot_rectangles, patches, groups = arguments[2:9]
        if len(taps) > 1:  # csrc/ops.cpp makes a tensor of all patches
            shape = (len(x), x.shape[1] * len(taps), *rectangles[0, 2:4].tolist())
            return self.covariance_update_(torch.empty(shape), 1, groups, 1.0, None)
        tables = (len(rectangles), rectangles.data_ptr(), len(slot_ends), slot_ends.data_ptr())
        args = PatchCovarianceArgs(
            *(MapView.of(x), *x.shape[2:], None, None, 1, None, *steps.tolist()),
            *(*tables, slot_rectangles.data_ptr(), groups, patches),
        )
        self.record("patch_covariance", args)

    def taylor_update_(self, activation: Tensor, gradient: Tensor, *_: Any) -> None:
        self.record("taylor", TaylorArgs(view(activation), view(gradient), 1.0))

    def channel_moments_update_(self, x: Tensor, *_: Any) -> None:
        self.record("moments", MomentsArgs(view(x)), "channel_moments")

    def feature_map_rank(self, maps: Tensor, rtol: float, atol: float) -> None:
        self.record("rank", RankArgs(MapView.of(maps), rtol, atol), "rank", "rank")

    def record(self, family: str, args: ctypes.Structure, name: str | None = None, update: str | None = None) -> None:
        name = name or family
        found = self.planner(family).plan(f"{name}_workspace", update or f"{name}_update", args)
        self.kernels |= {launch.kernel for launch in found.launches}


def view(x: Tensor) -> ChannelView:
    """As csrc/ops.cpp makes it; one position has the stride 1."""
    flat = x.flatten(2) if x.ndim > 2 else x.unsqueeze(2)
    step = flat.stride(2) if flat.shape[2] > 1 else 1
    return ChannelView.of(flat.as_strided(flat.shape, (*flat.stride()[:2], step)))


def test_every_kernel_is_reached(module: Any) -> None:
    calls, recorded = module("gpu_launches"), Recorded(module("launches"))
    for kind in calls.CALLS:
        for call in kind():
            call(recorded, lambda x: x)
    declared = r"__global__ void __launch_bounds__\([^()]*\)\s+(\w+)\("
    files = (ROOT / "csrc" / "cuda").glob("*.*")
    names = {name for file in files for name in re.findall(declared, file.read_text())}
    kernel = re.compile(rf"(rank::)?({'|'.join(names)})(<.*>)?")
    symbols = {one for family in module("launches").SOURCES for one in recorded.planner(family).symbols.values()}
    some = {demangled(one) for one in symbols if any(name in one for name in names)}
    standing = {one for one in some if kernel.fullmatch(one)}
    assert len(standing) > 80
    assert standing - recorded.kernels == NEVER_LARGE_ENOUGH
