"""What nvcc says of the kernels; its report of every kernel is kept as build/cuda_resources.txt."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path

import pytest
from cuda_kernels import ROOT, nvcc

from pcafast.files import write_atomically

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = [80, 90]
WITHOUT_KERNELS = {"covariance.cu", "patch_covariance.cu"}  # they plan what pair_products.cu launches
REPORT = ROOT / "build" / "cuda_resources.txt"

pytestmark = pytest.mark.skipif(nvcc() is None, reason="there is no CUDA compiler: neither nvcc on PATH nor CUDA_HOME")


@dataclass
class Resources:
    """Of one kernel on one architecture; numbers but registers in bytes."""

    source: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int
    kernel: str


def demangled(symbol: str) -> str:
    """The kernel and its template arguments, without return type, parameters and the namespace they share."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|pcafast::cuda::", "", name)
    return re.sub(r"^void ", "", re.sub(r"\([^()]*\)$", "", name))


def resources(source: Path, printed: str) -> list[Resources]:
    """Of every kernel that ptxas describes."""
    pattern = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>\w+)'\n"
        r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
        r".*?Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?[^\n]*\n",
        re.DOTALL,
    )
    rows = []
    for block in printed.split("ptxas info    : Compiling entry")[1:]:
        found = pattern.match("Compiling entry" + block)
        assert found, block
        numbers = [int(found[name] or 0) for name in ("registers", "shared", "stack", "stores", "loads")]
        rows.append(Resources(source.name, found["architecture"], *numbers, demangled(found["symbol"])))
    return rows


@dataclass
class Compiled:
    returncode: int
    printed: str
    kernels: list[Resources]


def compile_for(source: Path, architecture: int, folder: Path) -> Compiled:
    target = folder / f"{source.stem}_{architecture}.o"
    command = [str(nvcc()), "-std=c++17", f"-arch=sm_{architecture}", "-c", "-o", str(target)]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Werror", "-Xptxas", "-v", str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    return Compiled(result.returncode, result.stderr, resources(source, result.stderr))


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
