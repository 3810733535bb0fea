"""What compute-sanitizer is given to watch: that it is right, notices what is wrong, and reaches every kernel."""

import importlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_kernels import ROOT, demangled

NEVER_LARGE_ENOUGH = {f"rank::rank_large<{chunks}, false>" for chunks in (2, 3, 4)}  # maps that do not fit on an H200


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


def test_every_kernel_is_reached(module: Any) -> None:
    launches = module("launches")
    reached = {launch.kernel for one in module("gpu_launches").recorded() for launch in one.launches}
    declared = r"__global__ void __launch_bounds__\([^()]*\)\s+(\w+)\("
    files = (ROOT / "csrc" / "cuda").glob("*.*")
    names = {name for file in files for name in re.findall(declared, file.read_text())}
    kernel = re.compile(rf"(rank::)?({'|'.join(names)})(<.*>)?")
    symbols = {one for family in launches.SOURCES for one in launches.planner(family).symbols.values()}
    some = {demangled(one) for one in symbols if any(name in one for name in names)}
    standing = {one for one in some if kernel.fullmatch(one)}
    assert len(standing) > 80
    assert standing - reached == NEVER_LARGE_ENOUGH
