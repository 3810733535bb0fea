"""What the CUDA kernels must do at least, counted from their source, over what an H200 can do by its datasheet.

Estimates, not measurements: they stand where no GPU has been at hand, and say which unit a kernel waits for.
Instructions are those of one warp; a multiprocessor is taken to be busy all the time.

    python benchmarks/cuda_estimates.py
"""

from typing import Any

import results

# NVIDIA H200 datasheet; instructions of a warp per clock and multiprocessor from the CUDA programming guide,
# "Arithmetic Instructions", compute capability 9.0.
BYTES_PER_SECOND = 4.8e12
MULTIPROCESSORS = 132
CLOCKS_PER_SECOND = 1.98e9
PER_CLOCK = {"float64": 2.0, "shuffle": 1.0, "shared": 1.0}

# Operations per second, dense: of tensor cores, which csrc/cuda/pair_single.h has multiply float32 in three products of
# TF32, and of what torch takes for float32.
TENSOR = {"bfloat16": 989e12, "float32": 494e12 / 3}
PLAIN = {"bfloat16": 989e12, "float32": 67e12}

REFLECTION = 16  # float64 instructions of a square root, a reciprocal and what goes with them, by the machine code
DIVISION = 9
Counts = dict[str, float]


def small_map(size: int) -> Counts:
    """Instructions for one map of rank_small.h, whose team is a part of a warp."""
    row_lanes, column_lanes, rows, columns = next(
        team for side, team in {8: (2, 2, 4, 4), 16: (4, 4, 4, 4), 32: (4, 8, 8, 4)}.items() if size <= side
    )
    lanes = row_lanes * column_lanes
    float64 = shuffles = 0.0
    for k in range(size):
        live_rows, live_columns = rows - k // row_lanes, columns - k // row_lanes * row_lanes // column_lanes
        butterflies = live_columns * (row_lanes.bit_length() - 1) + live_rows * (column_lanes.bit_length() - 1)
        float64 += 4 * live_rows * live_columns + butterflies + 3 * (live_rows + live_columns) + 2 * REFLECTION
        shuffles += 2 * (butterflies + live_rows + live_columns + 4)
    rounds = {4: 9, 16: 5, 32: 4}[lanes]
    float64 += rounds * size * 4
    counting = 2 * size * (DIVISION + 3) * lanes / 128 * (128 // lanes + 31) // 32  # a thread per map of the block
    teams = 32 / lanes
    return {"float64": float64 / teams + counting, "shuffle": shuffles / teams, "shared": 0.0}


def large_map(size: int) -> Counts:
    """Instructions for one map of rank_large.h, by the eight warps of its block."""
    warps, chunks = 8, -(-size // 32)
    float64 = shuffles = shared = 0.0
    for k in range(size - 1):
        live, columns = chunks - k // 32, size - k - 1
        float64 += columns * (4 * live + 5) + warps * (14 * live + 10 + 2 * REFLECTION)
        shuffles += columns * 12 + warps * 28
        shared += columns * 4 * live + warps * 22 * live  # 8 bytes a lane take two turns
    return {"float64": float64 + 4 * size * 4 + 2 * size * DIVISION, "shuffle": shuffles, "shared": shared}


def rank_row(size: int) -> dict[str, Any]:
    """Time for one map with all multiprocessors at work, and the unit that it is for."""
    counts = small_map(size) if size <= 32 else large_map(size)
    fits = size <= 32 or 8 * (size * size + 16 * size + 6 * size) <= 227 << 10
    if not fits:  # the matrix comes from the second-level cache: about a quarter of the bandwidth of shared memory
        counts["shared"] *= 4
    clocks = {unit: count / PER_CLOCK[unit] for unit, count in counts.items()}
    unit = max(clocks, key=lambda one: clocks[one])
    seconds = clocks[unit] / CLOCKS_PER_SECOND / MULTIPROCESSORS
    memory = 4 * size * size / BYTES_PER_SECOND
    return {"counts": counts, "waits_for": unit, "seconds": max(seconds, memory), "seconds_to_read": memory}


def channel_rows(shape: tuple[int, ...], element_bytes: int) -> dict[str, float]:
    """Seconds for the one read of Taylor and of the moments, and for what torch's expression reads and writes."""
    n, c, h, w = shape
    operand = n * c * h * w * element_bytes / BYTES_PER_SECOND
    return {"taylor": 2 * operand, "expression": 4 * operand, "moments": operand}


def pair_row(shape: tuple[int, ...], dtype: str, element_bytes: int) -> dict[str, float]:
    """Seconds for one read, for the tiles of a covariance or 3 x 3 patch covariance, and for torch's product.

    Border strips are not counted. Tensor cores reach their full speed by instructions of Hopper's own alone; what the
    kernels use is good for about 60 % of it.
    """
    n, c, h, w = shape
    samples, tile = n * h * w, 128 if dtype == "bfloat16" and c > 64 else 64
    tiles = -(-c // tile)
    pair = 2 * tile * tile * samples / TENSOR[dtype]
    of_covariance = tiles * (tiles + 1) // 2
    return {
        "read": samples * c * element_bytes / BYTES_PER_SECOND,
        "covariance": of_covariance * pair,
        "patch_covariance": (of_covariance + 12 * tiles * tiles) * pair,
        "product": 2 * c * c * samples / PLAIN[dtype],
    }


if __name__ == "__main__":
    shapes = [(256, 64, 112, 112), (256, 512, 28, 28), (256, 2048, 7, 7)]
    of_pairs = [(256, 64, 56, 56), (256, 128, 28, 28), (256, 256, 14, 14), (256, 512, 7, 7)]
    results.write(
        "cuda_estimates",
        {
            "rank": {str(size): rank_row(size) for size in (8, 16, 32, 56, 112, 224)},
            "channels": [
                {"shape": shape, "dtype": dtype, **channel_rows(shape, size)}
                for shape in shapes
                for dtype, size in (("float32", 4), ("bfloat16", 2))
            ],
            "pairs": [
                {"shape": shape, "dtype": dtype, **pair_row(shape, dtype, size)}
                for shape in of_pairs
                for dtype, size in (("float32", 4), ("bfloat16", 2))
            ],
        },
    )
