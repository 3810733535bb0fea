"""How near every CUDA kernel comes to an H200's limits: estimates, from what it must do and from its machine code.

The least time of an operator is that of the bytes it must move or of the operations it must do, whichever is longer, at
the rates of the datasheet. Its estimated time is that of whatever its main kernel keeps busy longest: memory, the L2
cache, or a unit that executes the instructions of its loops, while whole waves of blocks run. Latencies, launches and
the merge of a batch into the state are left out, so that a time that is measured will mostly be longer; where a batch
stays in the L2 cache it may be shorter.

    python benchmarks/cuda_estimates.py
"""

import heapq
import itertools
import math
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import covariance_case
import gpu_launches
import h200
import launches  # with which the folder of the tests can be imported from
import patch_covariance_case
import results
from cases import DTYPES, LAYOUTS
from cuda_compiler import SOURCES, Resources, compile_for
from cuda_kernels import nvcc
from cuda_tables import estimates_digest
from gpu_covariance import IMAGES
from gpu_timings import MAPS, SHAPES
from h200 import Least
from kernel_loops import (
    Code,
    Counts,
    Lattices,
    block_samples,
    pair_bytes,
    pair_counts,
    rank_large,
    rank_small,
    scaled,
)
from launches import Launch, Launches
from machine_code import disassembled, number
from networks import INPUTS, OUTPUTS

from pcafast.progress import track

Row = dict[str, Any]
ARCHITECTURE = 90
SIZE = {"float32": 4, "bfloat16": 2}


def estimates() -> dict[str, Any]:
    """Of all inputs that gpu.py times."""
    kernels = Kernels()
    rows = [
        *(kernels.covariance(*one) for one in itertools.product(layers(OUTPUTS), DTYPES, LAYOUTS)),
        *(kernels.patch_covariance(*one) for one in itertools.product(layers(INPUTS), DTYPES, LAYOUTS)),
        *(kernels.streaming("taylor", 2, *one) for one in itertools.product(SHAPES, DTYPES, LAYOUTS)),
        *(kernels.streaming("moments", 1, *one) for one in itertools.product(SHAPES, DTYPES, LAYOUTS)),
        *(kernels.rank(side, count) for side, (count, _) in MAPS.items()),
    ]
    return {"digest": estimates_digest(), "nvcc": nvcc_version(), "rows": rows, "kernels": kernels.described()}


def nvcc_version() -> str:
    """Of the compiler whose machine code this is."""
    printed = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    return printed.splitlines()[-1]


def layers(networks: dict[str, list[tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    """The inputs of gpu_covariance.py; for patches with the stride last."""
    return [(network, (IMAGES[network], *shape)) for network, shapes in networks.items() for shape in shapes]


def batch_bytes(inputs: Row) -> int:
    return math.prod(inputs["shape"]) * SIZE[inputs["dtype"]]


class Kernels:
    """What the compiler makes of them, and what an H200 would take at least for what an operator launches."""

    def __init__(self) -> None:
        self.codes: dict[str, Code] = {}
        self.compiled: list[Resources] = []
        with tempfile.TemporaryDirectory() as folder:
            for source in track(SOURCES, "compiling"):
                compiled = compile_for(source, ARCHITECTURE, Path(folder))
                self.codes |= disassembled(compiled.cubin)
                self.compiled += compiled.kernels
        self.registers = {one.kernel: one for one in self.compiled}

    def covariance(self, layer: tuple[str, tuple[int, ...]], dtype: str, layout: str) -> Row:
        """The outputs of a convolution."""
        network, shape = layer
        launched = launches.covariance(shape, dtype, layout)
        state = 8 * (shape[1] ** 2 + shape[1])
        lattices = [(samples(shape), True)]
        inputs = {"operator": "covariance", "network": network, "shape": shape, "dtype": dtype, "layout": layout}
        return self.pairs(inputs, launched, state, covariance_case.multiply_adds(shape), shape[1], lattices)

    def patch_covariance(self, layer: tuple[str, tuple[int, ...]], dtype: str, layout: str) -> Row:
        """The inputs of a 3x3 convolution."""
        network, (*sizes, stride) = layer
        shape = tuple(sizes)
        launched = launches.patch_covariance(shape, dtype, layout, stride)
        x = launches.maps(shape, dtype, layout)
        of = patch_covariance_case.layout_of(x, stride)
        state = sum(part.nbytes for part in patch_covariance_case.empty_state(of, shape[1], "meta").values())
        lattices = [
            (shape[0] * rows * columns, down == right == 0)
            for _, _, rows, columns, down, right in of.rectangles.tolist()
        ]
        inputs = {"operator": "patch_covariance", "network": network, "shape": shape, "stride": stride}
        work = patch_covariance_case.multiply_adds(x, stride)
        entries = shape[1] * len(of.taps)
        return self.pairs({**inputs, "dtype": dtype, "layout": layout}, launched, state, work, entries, lattices)

    def pairs(
        self, inputs: Row, launched: Launches, state: int, multiply_adds: float, entries: int, lattices: Lattices
    ) -> Row:
        """Both covariances: a warp's work for a chunk of samples, as often as there are chunks and warps."""
        launch = main_launch(launched)
        counts = pair_counts(self.codes[launch.kernel], entries, lattices, launch)
        cached = pair_bytes(entries, lattices, launch.kernel, SIZE[inputs["dtype"]])
        least = Least(batch_bytes(inputs) + 2 * state, 2 * multiply_adds, inputs["dtype"])
        blocks = block_samples(entries, lattices, launch)
        return self.row(inputs, launched, least, counts, cached, blocks)

    def streaming(self, operator: str, operands: int, shape: tuple[int, ...], dtype: str, layout: str) -> Row:
        """One read of each operand, in the loop with the widest loads."""
        launched = getattr(launches, operator)(shape, dtype, layout)
        code, moved = self.codes[main_launch(launched).kernel], operands * math.prod(shape) * SIZE[dtype]
        widest = max((one for one in code.counts() if one.startswith("LDG")), key=h200.access_bytes)
        loop = code.counts(code.innermost(widest))
        loaded = sum(32 * h200.access_bytes(opcode) * count for opcode, count in loop.items() if "LDG" in opcode)
        inputs = {"operator": operator, "shape": shape, "dtype": dtype, "layout": layout}
        return self.row(inputs, launched, Least(moved), scaled(loop, moved / loaded), moved)

    def rank(self, side: int, count: int) -> Row:
        """The operations are those of bringing a map to bidiagonal form, in float64."""
        launched = launches.rank(side, count)
        launch = main_launch(launched)
        of_map = (rank_small if side <= 32 else rank_large)(self.codes[launch.kernel], launch.kernel, side)
        inputs = {"operator": "rank", "shape": (1, count, side, side), "dtype": "float32"}
        counts = scaled(of_map, count)
        least = Least(batch_bytes(inputs) + 8 * count, 8 / 3 * side**3 * count, "float64")
        return self.row(inputs, launched, least, counts, h200.global_bytes(counts))

    def row(
        self,
        inputs: Row,
        launched: Launches,
        least: Least,
        counts: Counts,
        cached: float,
        blocks: list[int] | None = None,
    ) -> Row:
        """One input.

        Args:
            inputs: its shape and so on.
            launched: what the operator launches.
            least: what it must do.
            counts: all instructions of the main kernel's loops, of all warps together.
            cached: bytes that this kernel asks the L2 cache for.
            blocks: how much work each block has, if not all have the same.
        """
        launch = main_launch(launched)
        if "rank_large" in launch.kernel:
            blocks = [1] * inputs["shape"][1]  # those with a workspace take one map after another
        resident = self.resident(launch)
        busy = busy_share(blocks or [1] * launch.blocks, resident)
        at_once = h200.MULTIPROCESSORS * h200.CLOCKS_PER_SECOND * busy
        seconds = {unit: clocks / at_once for unit, clocks in h200.clocks(counts).items()}
        # Maps are read and written in the workspace, in loops that `cached` is of; others write to it and read it once.
        of_maps = inputs["operator"] == "rank"
        kept, beside = (cached, 0) if of_maps else (2 * launched.workspace_bytes, least.moved_bytes)
        stays = launched.workspace_bytes + beside <= h200.CACHE_BYTES
        seconds["memory"] = (least.moved_bytes + (0 if stays else kept)) / h200.BYTES_PER_SECOND
        seconds["cache"] = (cached + (0 if of_maps else kept)) / h200.CACHE_BYTES_PER_SECOND
        limit = max(seconds, key=seconds.__getitem__)
        copying = launched.copied_bytes / h200.BYTES_PER_SECOND
        return {
            **inputs,
            "kernel": launch.kernel,
            "launches": len(launched.launches) + (launched.copied_bytes > 0),
            "blocks": launch.blocks,
            "busy": busy,
            "workspace_bytes": launched.workspace_bytes,
            "least": asdict(least),
            "least_seconds": least.seconds(h200.BYTES_PER_SECOND, {**h200.PLAIN_FLOPS, **h200.TENSOR_FLOPS}),
            "widest_load": widest_load(counts),
            "limited_by": limit,
            "seconds": seconds[limit] + copying,
        }

    def resident(self, launch: Launch) -> int:
        """Blocks of this launch that a multiprocessor holds at once."""
        resources = self.registers[launch.kernel]
        return h200.resident_blocks(launch.threads, resources.registers, resources.shared + launch.shared_bytes)

    def described(self) -> list[Row]:
        """What the compiler and the machine code say of every kernel, and how one of its launches fills the device."""
        launched = {launch.kernel: launch for one in gpu_launches.recorded() for launch in one.launches}
        rows = []
        for resources in self.compiled:
            counts, launch = self.codes[resources.kernel].counts(), launched.get(resources.kernel)
            row = {
                **asdict(resources),
                "instructions": sum(counts.values()),
                "loads": {one: count for one, count in counts.items() if one.startswith(("LDG", "LDSM"))},
                "matrix": {one: count for one, count in counts.items() if one.startswith("HMMA")},
                "local": number(counts, "LDL", "STL"),
            }
            if launch is not None:
                blocks = self.resident(launch)
                row |= {"threads": launch.threads, "dynamic_shared": launch.shared_bytes}
                row |= {"blocks_per_multiprocessor": blocks, "occupancy": blocks * launch.threads / 2048}
            rows.append(row)
        return rows


def main_launch(launched: Launches) -> Launch:
    """That of the kernel which reads the batch."""
    names = ("multiply_pairs", "sum_rows", "sum_columns", "rank")
    return next(one for one in launched.launches if one.kernel.startswith(names))


def busy_share(blocks: list[int], resident: int) -> float:
    """Share of the places for blocks that are taken while the blocks run, each of which takes the next free one.

    Where there are few blocks, each multiprocessor gets as many of them as the others.
    """
    resident = min(resident, math.ceil(len(blocks) / h200.MULTIPROCESSORS))
    places = h200.MULTIPROCESSORS * resident
    ends = [0] * min(places, len(blocks))
    for work in blocks:
        heapq.heapreplace(ends, ends[0] + work)
    return sum(blocks) / (max(ends) * places)


def widest_load(counts: Counts) -> str | None:
    """Of the loads from global memory in the loops; none if those of a map are not counted."""
    loads = [one for one, count in counts.items() if count > 0 and one.startswith(("LDG.", "LDGSTS."))]
    return max(loads, key=h200.access_bytes, default=None)


def samples(shape: tuple[int, ...]) -> int:
    return shape[0] * math.prod(shape[2:])


if __name__ == "__main__":
    results.write("cuda_estimates", estimates())
