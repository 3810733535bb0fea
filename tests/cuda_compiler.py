"""What nvcc makes of the kernels, and what it says of them."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cuda_kernels import ROOT, demangled, nvcc

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


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


@dataclass
class Compiled:
    """One source for one architecture; the cubin is there if it compiled."""

    returncode: int
    printed: str
    kernels: list[Resources]
    cubin: Path


def compile_for(source: Path, architecture: int, folder: Path) -> Compiled:
    """Compile as setup.py does, with all warnings as errors."""
    own = folder / f"{source.stem}_{architecture}"
    own.mkdir()
    command = [str(nvcc()), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-c", "-o", str(own / "all.o")]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Werror", "-Xptxas", "-v", str(source)]
    command += ["--keep", "--keep-dir", str(own)]
    result = subprocess.run(command, capture_output=True, text=True)
    cubin = own / f"{source.stem}.sm_{architecture}.cubin"
    return Compiled(result.returncode, result.stderr, resources(source, result.stderr), cubin)


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
