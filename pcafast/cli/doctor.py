"""``pcafast doctor``: what is installed, what is active, and why."""

import shlex
import sys

from rich.table import Table

from pcafast import native
from pcafast.cli.tables import console
from pcafast.loop.environment import environment


def command_line() -> str:
    """The command that is running, as reports record it."""
    return shlex.join(["pcafast", *sys.argv[1:]])


def command() -> None:
    """Show what is installed, which kernels are active, and why others are not."""
    for name, value in environment().items():
        console.print(f"{name.replace('_', ' '):12} {'none' if value is None else value}", highlight=False)
    if native.MISSING:
        console.print(f"\nThe native library is not in use: {native.MISSING}", highlight=False)
    elif built := native.build_description():
        console.print(f"\nCUDA kernels: {built['cuda_reason']}", highlight=False)
        if built["cuda_architectures"]:
            console.print(f"architectures {built['cuda_architectures']}", highlight=False)
    console.print(_operators())


def _operators() -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("operator", "on the CPU", "on CUDA"):
        table.add_column(title)
    for name in native.OPERATORS:
        on_cpu = "native" if native.MISSING is None else "reference, in plain torch"
        on_cuda = "native" if name in native.OWN_CUDA_KERNELS else "reference, in plain torch"
        table.add_row(name, on_cpu, on_cuda)
    return table
