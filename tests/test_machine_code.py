"""How machine code is read, and what an H200 makes of it, on listings and figures that can be checked by hand."""

import importlib
from collections import Counter
from types import ModuleType

import pytest
from cuda_kernels import ROOT
from machine_code import code_of, number

# Two nested loops; a branch over a slow path in the inner one, and a block behind the end that jumps back into it.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
.L_x_2:
        /*0020*/                   FFMA R5, R4, R4, R5 ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/               @P1 BRA `(.L_x_5) ;
        /*0050*/               @P2 BRA `(.L_x_3) ;
        /*0060*/                   MUFU.RCP R6, R5 ;
        /*0070*/                   FADD R6, R6, R5 ;
.L_x_3:
        /*0080*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0090*/               @P0 BRA `(.L_x_2) ;
        /*00a0*/                   STG.E [R2.64], R8 ;
        /*00b0*/               @P3 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
.L_x_5:
        /*00d0*/                   FMUL R5, R5, R5 ;
        /*00e0*/                   BRA `(.L_x_3) ;
.L_x_6:
        /*00f0*/                   BRA `(.L_x_6);
"""


def test_loops() -> None:
    code = code_of(LISTING)
    inner = code.innermost("HMMA")
    outer = code.around(inner)
    assert [(loop.first, loop.last) for loop in code.loops if loop.last > loop.first] == [(2, 8), (1, 10)]
    assert (inner.first, outer.first) == (2, 1)
    assert number(code.counts(outer), "LDG", "STG") == 2
    assert number(code.counts(), "LDS") == 0  # never executed
    assert number(code.counts(inner), "HMMA.16816") == 1
    assert number(code.counts(inner), "HMMA.168") == 0


def test_once_round_takes_the_shortest_way_that_has_what_is_needed() -> None:
    code = code_of(LISTING)
    inner = code.innermost("HMMA")
    fast = code.once_round(inner, {"HMMA": 1, "MUFU": 0})
    assert fast == Counter({"FFMA": 1, "BRA": 3, "HMMA.16816.F32.BF16": 1})
    assert code.once_round(inner, {"MUFU": 1}) == fast + Counter({"MUFU.RCP": 1, "FADD": 1})
    with pytest.raises(KeyError):
        code.once_round(inner, {"HMMA": 2})


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("cuda_estimates")


def test_clocks(module: ModuleType) -> None:
    """Results per clock and multiprocessor: 64 in float64, 128 in float32, 32 of shuffles, 16 of conversions."""
    counts = Counter({"DFMA": 10, "FADD": 8, "SHFL.BFLY": 3, "F2F.F64.F32": 2, "LDS.64": 4, "STS.128": 1, "LDG.E": 7})
    clocks = module.h200.clocks(counts)
    assert clocks["issue"] == sum(counts.values()) / 4
    assert [clocks[unit] for unit in ("float64", "float32", "shuffle", "conversion")] == [5, 2, 3, 4]
    assert clocks["shared"] == 4 * 2 + 4
    assert module.h200.global_bytes(counts) == 7 * 32 * 4


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [(256, 64, 0, 4), (256, 32, 0, 8), (1024, 32, 0, 2), (128, 168, 38_464, 3), (128, 255, 85_056, 2), (64, 141, 0, 6)],
)
def test_resident_blocks(module: ModuleType, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert module.h200.resident_blocks(threads, registers, shared) == blocks


@pytest.mark.parametrize(
    ("blocks", "resident", "share"),
    [([1] * 264, 2, 1), ([1] * 265, 2, 265 / 528), ([1] * 66, 2, 0.5), ([2] * 132 + [1] * 264, 1, 1)],
)
def test_busy_share(module: ModuleType, blocks: list[int], resident: int, share: float) -> None:
    assert module.busy_share(blocks, resident) == pytest.approx(share)


def test_tiles_of_warps(module: ModuleType) -> None:
    """Of 200 channels: tiles of 128 and 72; in a symmetric lattice three of four pairs, two of them with themselves."""
    kernel = "multiply_pairs<Tiling<Half<BFloat16>, 128, false, 64>, AsyncStaging, BFloat16, 8>"
    symmetric = module.pair_bytes(200, [(1000, True)], kernel, 2)
    assert symmetric == 2 * 1000 * (128 + 72 + (128 + 72))
    assert module.pair_bytes(200, [(1000, False)], kernel, 2) == 2 * 1000 * (2 * 128 + 2 * 72 + 2 * (128 + 72))
    launch = module.Launch(kernel, 4 * 5, 128, 0)
    found = module.block_samples(200, [(320, False)], launch)
    assert found == [64] * 20
