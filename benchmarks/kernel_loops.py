"""What the warps of a CUDA kernel execute for a unit of work, put together from the loops of its machine code."""

import itertools
import re
import sys
from collections import Counter
from pathlib import Path

from launches import Launch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from machine_code import Code, number

Counts = Counter[str]


def times(counts: Counts, factor: float) -> Counts:
    return Counter({opcode: count * factor for opcode, count in counts.items()})


def pair_chunks(channels: int, lattices: list[tuple[int, bool]], launch: Launch) -> float:
    """How often a warp multiplies a chunk of 32 samples, by all warps together.

    A warp has 32 rows and half of the columns of a tile; of a lattice of pixels that are their own partners it has
    nothing to do below the diagonal.
    """
    half = launch.threads // 4
    parts = list(itertools.product(range(0, channels, 32), range(0, channels, half)))
    of_symmetric = sum(row < column + half for row, column in parts)
    return sum(pixels / 32 * (of_symmetric if symmetric else len(parts)) for pixels, symmetric in lattices)


def chunk_counts(code: Code, kernel: str) -> Counts:
    """What a warp does for 32 samples, but for sums of channels."""
    inner = code.innermost("HMMA")
    if "Half" in kernel:
        products = number(code.counts(inner), "HMMA") - 4  # those are the sums
        copies = {"LDGSTS": number(code.counts(inner), "LDGSTS")}
        return code.once_round(inner, {"HMMA": products, **copies})
    outer, within = code.around(inner), code.counts(inner)
    copies = {key: number(code.counts(outer), key) for key in ("LDG.E.128", "STS", "FFMA")}
    around = code.once_round(outer, {"HMMA": number(within, "HMMA"), **copies})
    return around + within  # which goes round twice


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
    """For one map: the eight warps of a block repeat what is done with vectors, and share the columns."""
    column = code.innermost("SHFL.BFLY")
    step = code.around(column)
    around, each = code.once_round(step, {"MUFU": 4}), code.counts(column)
    bounds, ranks = sturm_loops(code)
    total = times(around, 8 * side) + times(each, side * (side - 1) / 2 - 8 * side)
    return total + times(bounds, 4 * side / 4) + times(ranks, 2 * side / 4)
