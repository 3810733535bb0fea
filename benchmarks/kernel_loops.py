"""What the warps of a CUDA kernel execute for a unit of work, put together from the loops of its machine code."""

import itertools
import math
import re
import sys
from collections import Counter
from pathlib import Path

from launches import Launch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from machine_code import Code, number

Counts = Counter[str]
Lattices = list[tuple[int, bool]]
"""Of pixels: how many samples each has, and whether they are their own partners."""


def times(counts: Counts, factor: float) -> Counts:
    return Counter({opcode: count * factor for opcode, count in counts.items()})


def pair_chunks(channels: int, lattices: Lattices, kernel: str) -> float:
    """How often a warp multiplies a chunk of 32 samples, by all warps together.

    A warp has some rows and half of the columns of a tile; of a lattice of pixels that are their own partners it has
    nothing to do below the diagonal.
    """
    rows, columns = tile_of_warp(kernel)
    parts = list(itertools.product(range(0, channels, rows), range(0, channels, columns)))
    of_symmetric = sum(row < column + columns for row, column in parts)
    return sum(pixels / 32 * (of_symmetric if symmetric else len(parts)) for pixels, symmetric in lattices)


def block_samples(channels: int, lattices: Lattices, launch: Launch) -> list[int]:
    """How many samples every block of a launch has, in order.

    The size of a piece is not in the launch; it is one that comes to as many blocks.
    """
    _, columns = tile_of_warp(launch.kernel)
    tiles = math.ceil(channels / (2 * columns))

    def cut(piece: int) -> list[int]:
        blocks = []
        for samples, symmetric in lattices:
            own = math.ceil(samples / math.ceil(samples / piece) / 32) * 32
            pieces = [own] * (samples // own) + [samples % own] * (samples % own > 0)
            blocks += [one for one in pieces for _ in range(tiles * (tiles + 1) // 2 if symmetric else tiles * tiles)]
        return blocks

    lattices = sorted(lattices, key=lambda one: -one[0])  # as patch_covariance.cu does
    sizes = range(32, max(samples for samples, _ in lattices) + 32, 32)
    return next(blocks for blocks in map(cut, sizes) if len(blocks) <= launch.blocks)


def tile_of_warp(kernel: str) -> tuple[int, int]:
    """Its rows and columns."""
    tile, rows = re.findall(r", (\d+), (?:false|true), (\d+)>", kernel)[0]
    return int(rows), int(tile) // 2


def chunk_counts(code: Code, kernel: str) -> Counts:
    """What a warp does for 32 samples, but for sums of channels."""
    inner = code.innermost("HMMA")
    rows, columns = tile_of_warp(kernel)
    half = "Half" in kernel
    needed = (1 if half else 6) * rows * columns * 32 // (16 * 8 * 16)
    outer, within = (inner if half else code.around(inner)), code.counts(inner)
    counts = code.counts(outer)
    sums = number(counts, "STS.64", *(["STS.128"] if half else []))
    copies = {key: number(counts, key) for key in ("LDGSTS", "LDG", "FFMA")}
    copies["STS"] = number(counts, "STS") - sums
    rounds = max(needed // number(within, "HMMA"), 1)
    around = code.once_round(outer, {"HMMA": needed // rounds, **copies})
    return around + times(within, rounds - 1)


def rank_small(code: Code, kernel: str, side: int) -> Counts:
    """All that the warps do for one map: reflections in phases, then Sturm sequences, one of them for a whole block."""
    row_lanes, column_lanes = map(int, re.findall(r"\d+", kernel)[:2])
    lanes = row_lanes * column_lanes
    phases = sorted((one for one in code.loops if number(code.counts(one), "SHFL.IDX")), key=lambda one: one.first)
    total: Counts = Counter()
    for phase, loop in enumerate(phases):
        steps = min(max(side - phase * row_lanes, 0), row_lanes)
        total += times(code.once_round(loop, {"MUFU": 4}), steps)
    bounds, ranks = sturm_loops(code)
    rounds = {4: 9, 16: 5, 32: 4}[lanes]
    total += times(bounds, rounds * side / 4)
    return times(total, lanes / 32) + times(ranks, 2 * side / 4 * lanes / 128)


def sturm_loops(code: Code) -> tuple[Counts, Counts]:
    """Four steps of testing bounds of the largest singular value, and four of counting those above a threshold."""
    bounds = code.innermost("DSETP.GT")
    ranks = [one for one in code.loops if number(code.counts(one), "MUFU.RCP64H") == 4]
    return code.once_round(bounds, {"DSETP.GT": 4, "MUFU": 0}), code.once_round(ranks[0], {"MUFU": 4})


def rank_large(code: Code, kernel: str, side: int) -> Counts:
    """For one map: the eight warps of a block repeat what is done with vectors, and share the columns, two at once."""
    bounds, ranks = sturm_loops(code)
    total = times(bounds, 4 * side / 4) + times(ranks, 2 * side / 4)
    chunks = int(re.findall(r"\d+", kernel)[0])
    of_columns = sorted(
        (one for one in code.loops if number(code.counts(one), "SHFL.BFLY") == 20), key=lambda one: one.first
    )
    for phase, columns in enumerate(of_columns):
        around, each = code.once_round(code.around(columns), {"MUFU": 4}), code.counts(columns)
        rows = math.ceil(chunks / 4) * 32
        for k in range(phase * rows, min((phase + 1) * rows, side)):
            total += times(around, 8) + times(each, max((side - k - 1) / 2 - 8, 0))
    return total
