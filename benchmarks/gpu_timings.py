"""What the device can do, and how near to it the operators come."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from cases import DTYPES, LAYOUTS, Case, activations
from clock import milliseconds
from moments_case import moments_case
from rank_case import CHANNELS, check, feature_maps, one_by_one, share_wrong
from taylor_case import taylor_case

from pcafast.functional import feature_map_rank

Rows = list[dict[str, Any]]

# All but the first are larger than the L2 cache.
SHAPES = [(1, 2048, 7, 7), (256, 2048, 7, 7), (256, 512, 28, 28), (64, 256, 56, 56), (256, 64, 112, 112)]
MAPS = {8: (2**17, 2**17), 16: (2**17, 2**17), 32: (2**16, 2**16), 56: (2**14, 256), 112: (2**12, 64), 224: (2**10, 32)}
"""By side: maps for pcafast, enough to fill the device, and for torch, which above 32x32 goes through them in turn."""
STEPS = 512


def roofline(device: str, tiny: bool) -> dict[str, float]:
    """Copying, in bytes read and written per second; matrix products; float64 multiply-adds in registers."""
    side = 32 if tiny else 4096
    x, y = (torch.rand(shape, dtype=torch.float64, device=device) / 2 for shape in ((side, 1), (side,)))
    chain = torch.compile(multiply_adds, fullgraph=True)
    torch.testing.assert_close(chain(x, y), multiply_adds(x, y))
    return {
        "copy_bytes_per_second": copy_bandwidth(device, tiny),
        "bfloat16_matmul_flops": matmul_flops(torch.bfloat16, device, tiny),
        "float32_matmul_flops": matmul_flops(torch.float32, device, tiny),
        "tf32_matmul_flops": matmul_flops(torch.float32, device, tiny, tf32=True),
        "float64_matmul_flops": matmul_flops(torch.float64, device, tiny),
        "float64_multiply_add_flops": 2e3 * STEPS * side**2 / milliseconds(lambda: chain(x, y), device),
    }


def multiply_adds(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of all pairs of an element of x and one of y, so that next to nothing is read and the least is written."""
    for _ in range(STEPS):
        x = x * y + y
    return x


def copy_bandwidth(device: str, tiny: bool) -> float:
    source = torch.empty(2**20 if tiny else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e3 * source.numel() / milliseconds(lambda: target.copy_(source), device)


def matmul_flops(dtype: torch.dtype, device: str, tiny: bool, *, tf32: bool = False) -> float:
    """Of a square product that takes a millisecond or more; float32 is rounded to TF32 only if asked for."""
    side = 64 if tiny else 8192 if dtype == torch.bfloat16 or tf32 else 4096
    square = torch.randn(side, side, device=device).to(dtype)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        return 2e3 * side**3 / milliseconds(lambda: square @ square, device)
    finally:
        torch.set_float32_matmul_precision("highest")


def taylor(device: str, tiny: bool) -> Rows:
    """Against pytorch-pruning's expression, plain and compiled."""
    return streaming(taylor_case, "operator", 2, device, tiny)


def moments(device: str, tiny: bool) -> Rows:
    """Against torch's expressions."""
    return streaming(moments_case, "pcafast", 1, device, tiny)


def streaming(make: Callable[..., Case], operator: str, inputs: int, device: str, tiny: bool) -> Rows:
    """An operator that reads each of its inputs once, in all dtypes and layouts."""
    bandwidth, rows = copy_bandwidth(device, tiny), []
    shapes = [(2, 8, 7, 7)] if tiny else SHAPES
    for shape, dtype, layout in itertools.product(shapes, DTYPES, LAYOUTS):
        case = make(shape, dtype, layout, device)
        times = {peer: milliseconds(call, device) for peer, call in case.calls.items()}
        read = inputs * activations(shape, dtype, layout, seed=0, device=device).nbytes
        share = 1e3 * read / times[operator] / bandwidth
        rows.append({**case.inputs, "milliseconds": times, "absent": case.absent, "share_of_copy_bandwidth": share})
        print(rows[-1], flush=True)
    return rows


def rank(device: str, tiny: bool) -> Rows:
    """Microseconds per map; one SVD per map is timed on 32 maps, and torch.linalg on fewer where it would take long."""
    calls = {"pcafast": feature_map_rank, "batched": torch.linalg.matrix_rank, "one by one": one_by_one}
    rows = []
    for side, counts in MAPS.items():
        images = [1, 1, 1] if tiny else [*(count // CHANNELS for count in counts), 1]
        maps = feature_maps(images[0], side).to(device)
        checked = maps[: min(images[1], 64)]
        check(checked, feature_map_rank(checked))
        wrong = share_wrong(checked, torch.linalg.matrix_rank(checked))
        row: dict[str, Any] = {"side": side, "share_wrong_batched": wrong}
        for (peer, call), count in zip(calls.items(), images, strict=True):
            some = maps[:count]
            time = milliseconds(lambda call=call, some=some: call(some), device)
            row[peer] = {"maps": count * CHANNELS, "microseconds_per_map": 1e3 * time / (count * CHANNELS)}
        rows.append(row)
        print(row, flush=True)
    return rows
