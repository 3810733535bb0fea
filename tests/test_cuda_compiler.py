"""What nvcc says of the kernels, and the machine code it makes of them.

The report of every kernel is kept as build/cuda_resources.txt.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from itertools import product
from pathlib import Path

import pytest
from cuda_compiler import SOURCES, Compiled, Resources, compile_for
from cuda_kernels import ROOT, nvcc
from machine_code import Code, disassembled, number

from pcafast.files import write_atomically

ARCHITECTURES = [80, 90]
WITHOUT_KERNELS = {"covariance.cu", "patch_covariance.cu"}  # they plan what pair_products.cu launches
REPORT = ROOT / "build" / "cuda_resources.txt"

pytestmark = pytest.mark.skipif(nvcc() is None, reason="there is no CUDA compiler: neither nvcc on PATH nor CUDA_HOME")


def table(rows: list[Resources]) -> str:
    cells = [["source", "architecture", "registers", "shared", "stack", "spill stores", "spill loads", "kernel"]]
    cells += [[str(cell) for cell in astuple(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Path, int], Compiled]:
    """Every source for every architecture, and the report written."""
    folder = tmp_path_factory.mktemp("compiled")
    pairs = list(product(SOURCES, ARCHITECTURES))
    with ThreadPoolExecutor() as pool:
        results = dict(zip(pairs, pool.map(lambda pair: compile_for(*pair, folder), pairs), strict=True))
    rows = [row for result in results.values() for row in result.kernels]
    report = table(sorted(rows, key=lambda row: (row.source, row.kernel, row.architecture)))
    write_atomically({REPORT: lambda path: path.write_text(report)})
    return results


@pytest.fixture(scope="session", params=ARCHITECTURES)
def codes(compiled: dict[tuple[Path, int], Compiled], request: pytest.FixtureRequest) -> dict[str, Code]:
    """Every kernel's machine code."""
    found: dict[str, Code] = {}
    for (_, architecture), result in compiled.items():
        if architecture == request.param:
            found |= disassembled(result.cubin)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_warning_no_spill_no_stack(
    compiled: dict[tuple[Path, int], Compiled], source: Path, architecture: int
) -> None:
    result = compiled[source, architecture]
    assert result.returncode == 0, result.printed
    assert bool(result.kernels) == (source.name not in WITHOUT_KERNELS)
    assert [row for row in result.kernels if row.stack or row.spill_stores or row.spill_loads] == []


def test_the_report_has_every_kernel(compiled: dict[tuple[Path, int], Compiled]) -> None:
    lines = REPORT.read_text().splitlines()
    assert len(lines) == 1 + sum(len(result.kernels) for result in compiled.values())
    assert all(re.match(r"\w+\.cu +sm_\d+( +\d+){5} +\S", line) for line in lines[1:])


# What a warp with half a tile of columns does for 32 samples: matrix instructions of 16 x 8 products, over 16 samples
# of 16 bits or 8 of TF32, of which float32 takes three; one column more is for the sums of channels.
@pytest.mark.parametrize("layout", ["false", "true"])
@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize(("dtype", "opcode"), [("BFloat16", "HMMA.16816.F32.BF16"), ("Float16", "HMMA.16816.F32")])
def test_matrix_instructions_of_halves(codes: dict[str, Code], dtype: str, opcode: str, tile: int, layout: str) -> None:
    rows = 64
    code = codes[f"multiply_pairs<Tiling<Half<{dtype}>, {tile}, {layout}, {rows}>, AsyncStaging, {dtype}, 8>"]
    inner = code.counts(code.innermost("HMMA"))
    assert inner[opcode] == number(inner, "HMMA") == 2 * (rows // 16) * (tile // 16 + 1)
    assert number(inner, "LDGSTS.E.BYPASS.128") == number(inner, "LDGSTS") == 8
    assert (
        number(inner, "LDSM") == number(inner, "LDSM.16.M88.4", "LDSM.16.MT88.4") == 2 * 2 * (rows // 16) + tile // 16
    )


@pytest.mark.parametrize("layout", ["false", "true"])
def test_matrix_instructions_of_float32(codes: dict[str, Code], layout: str) -> None:
    """Half of the samples at a time."""
    code = codes[f"multiply_pairs<Tiling<Single, 64, {layout}, 32>, RegisterStaging, float, 4>"]
    inner = code.innermost("HMMA")
    assert code.counts(inner)["HMMA.1688.F32.TF32"] == number(code.counts(inner), "HMMA") == 3 * 2 * 4 * 4 / 2
    assert number(code.counts(code.around(inner)), "LDG.E.128") == 8


@pytest.mark.parametrize("op", ["Taylor", "TaylorOfPoints", "Moments"])
@pytest.mark.parametrize("dtype", ["Float16", "BFloat16", "float", "double"])
def test_rows_are_read_sixteen_bytes_at_a_time(codes: dict[str, Code], dtype: str, op: str) -> None:
    """Four loads or more on their way at once, of two operands or one."""
    code = codes[f"sum_rows<{dtype}, {op}>"]
    loop = code.counts(code.innermost("LDG.E.128"))
    assert number(loop, "LDG.E.128") == number(loop, "LDG") >= 4


def test_nothing_goes_to_local_memory(codes: dict[str, Code]) -> None:
    assert [name for name, code in codes.items() if number(code.counts(), "LDL", "STL")] == []
