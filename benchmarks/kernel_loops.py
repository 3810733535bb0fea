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
"""How many samples each lattice of pixels has, and whether it is symmetric: whether pixels are their own partners."""


def scaled(counts: Counts, factor: float) -> Counts:
    return Counter({opcode: count * factor for opcode, count in counts.items()})


def pair_counts(code: Code, channels: int, lattices: Lattices, launch: Launch) -> Counts:
    """What all warps execute for the products of pairs of pixels, but for sums of channels.

    A warp has some rows and half of the columns of a tile; of a symmetric lattice it has nothing to multiply below the
    diagonal. Those that multiply nothing copy samples to shared memory all the same.
    """
    rows, columns = tile_of_warp(launch.kernel)
    parts = list(itertools.product(range(0, channels, rows), range(0, channels, columns)))
    upper, tiles = sum(row < column + columns for row, column in parts), math.ceil(channels / (2 * columns))
    multiplying = all_warps = 0.0
    for samples, symmetric in lattices:
        multiplying += samples / 32 * (upper if symmetric else len(parts))
        pairs = tiles * (tiles + 1) // 2 if symmetric else tiles * tiles
        all_warps += samples / 32 * pairs * launch.threads / 32
    working, copying = chunk_counts(code, launch.kernel)
    return scaled(working, multiplying) + scaled(copying, all_warps - multiplying)


def pair_bytes(channels: int, lattices: Lattices, kernel: str, element_bytes: int) -> float:
    """Bytes that blocks ask the L2 cache for: the channels of both tiles of every pair, or of one that is its own."""
    tile = 2 * tile_of_warp(kernel)[1]
    sizes = [min(tile, channels - first) for first in range(0, channels, tile)]
    apart = sum(a + b for a, b in itertools.product(sizes, sizes))
    upper = sum(sizes) + sum(a + b for a, b in itertools.combinations(sizes, 2))
    return element_bytes * sum(samples * (upper if symmetric else apart) for samples, symmetric in lattices)


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
    return next(blocks for blocks in map(cut, sizes) if len(blocks) == launch.blocks)


def tile_of_warp(kernel: str) -> tuple[int, int]:
    """Rows and columns of channels that one warp multiplies."""
    tile, rows = re.findall(r", (\d+), (?:false|true), (\d+)>", kernel)[0]
    return int(rows), int(tile) // 2


def chunk_counts(code: Code, kernel: str) -> tuple[Counts, Counts]:
    """What a warp executes for a chunk of 32 samples: one that multiplies, and one that only copies."""
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
    return around + scaled(within, rounds - 1), code.once_round(outer, {"HMMA": 0, **copies})


def rank_small(code: Code, kernel: str, side: int) -> Counts:
    """All that the warps do for one map: reflections in phases, then Sturm sequences, one of them for a whole block."""
    row_lanes, column_lanes = map(int, re.findall(r"\d+", kernel)[:2])
    lanes = row_lanes * column_lanes
    phases = sorted((one for one in code.loops if number(code.counts(one), "SHFL.IDX")), key=lambda one: one.first)
    total: Counts = Counter()
    for phase, loop in enumerate(phases):
        steps = min(max(side - phase * row_lanes, 0), row_lanes)
        total += scaled(code.once_round(loop, {"MUFU": 4}), steps)
    bounds, ranks = sturm_loops(code)
    rounds = {4: 9, 16: 5, 32: 4}[lanes]  # kRounds of rank_steps.h
    total += scaled(bounds, rounds * side / 4)
    return scaled(total, lanes / 32) + scaled(ranks, 2 * side / 4 * lanes / 128)


def sturm_loops(code: Code) -> tuple[Counts, Counts]:
    """Four steps of testing bounds of the largest singular value, and four of counting those above a threshold."""
    bounds = code.innermost("DSETP.GT")
    ranks = [one for one in code.loops if number(code.counts(one), "MUFU.RCP64H") == 4]
    return code.once_round(bounds, {"DSETP.GT": 4, "MUFU": 0}), code.once_round(ranks[0], {"MUFU": 4})


def rank_large(code: Code, kernel: str, side: int) -> Counts:
    """For one map: the eight warps of a block repeat what is done with vectors, and share the columns, two at once."""
    bounds, ranks = sturm_loops(code)
    total = scaled(bounds, 4 * side / 4) + scaled(ranks, 2 * side / 4)
    chunks = int(re.findall(r"\d+", kernel)[0])
    of_columns = sorted(
        (one for one in code.loops if number(code.counts(one), "SHFL.BFLY") == 20), key=lambda one: one.first
    )
    for phase, columns in enumerate(of_columns):
        around, each = code.once_round(code.around(columns), {"MUFU": 4}), code.counts(columns)
        rows = math.ceil(chunks / 4) * 32
        for k in range(phase * rows, min((phase + 1) * rows, side)):
            total += scaled(around, 8) + scaled(each, (side - k - 1) / 2)
    return total
