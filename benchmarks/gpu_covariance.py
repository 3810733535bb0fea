"""The two covariances on the device: their times, what memory they need, and how near they come to the roofline."""

import itertools
from typing import Any

import covariance_case
import patch_covariance_case
import torch
from cases import DTYPES, LAYOUTS, Side
from clock import milliseconds
from gpu_timings import Rows, copy_bandwidth, matmul_flops
from networks import INPUTS, OUTPUTS
from torch import Tensor

IMAGES = {"ResNet-50": 128, "ResNet-18": 128, "VGG-16": 16, "ResNet-56": 512}


def covariance(device: str, tiny: bool) -> Rows:
    """Against recipes of torch calls, on the outputs of convolutions."""
    ceilings, rows = Ceilings(device, tiny), []
    layers = [(network, (IMAGES[network], *shape)) for network, shapes in OUTPUTS.items() for shape in shapes]
    if tiny:
        layers = [("ResNet-50", (2, 24, 7, 7))]
    for (network, shape), dtype, layout in itertools.product(layers, DTYPES, LAYOUTS):
        x = covariance_case.outputs(shape, dtype, layout, device)
        sides = covariance_case.checked_sides(x, covariance_case.ON_GPU)
        inputs = {"network": network, "shape": shape, "dtype": dtype, "layout": layout}
        rows.append({**inputs, **ceilings.measure(x, sides, covariance_case.multiply_adds(shape))})
        print(rows[-1], flush=True)
    return rows


def patch_covariance(device: str, tiny: bool) -> Rows:
    """Against unfolding, on the inputs of 3x3 convolutions."""
    ceilings, rows = Ceilings(device, tiny), []
    layers = [(network, (IMAGES[network], *shape), s) for network, some in INPUTS.items() for *shape, s in some]
    if tiny:
        layers = [("ResNet-18", (2, 20, 6, 6), stride) for stride in (1, 2)]
    for (network, shape, stride), dtype, layout in itertools.product(layers, DTYPES, LAYOUTS):
        x = patch_covariance_case.inputs(shape, dtype, layout, device)
        makers = patch_covariance_case.sides(x, stride)
        made = {name: makers[name] for name in ("pcafast", "unfold, matmul")}
        sides = patch_covariance_case.checked_sides(x, stride, made)
        inputs = {"network": network, "shape": shape, "stride": stride, "dtype": dtype, "layout": layout}
        rows.append({**inputs, **ceilings.measure(x, sides, patch_covariance_case.multiply_adds(x, stride))})
        print(rows[-1], flush=True)
    return rows


class Ceilings:
    """What the device can do, as measured, and what that makes of a time.

    Products of float32 have to be exact to float32's rounding, so their ceiling is that of float32 matrix products, or
    that of three products in TF32 if that is higher.
    """

    def __init__(self, device: str, tiny: bool) -> None:
        self.device = device
        self.bandwidth = copy_bandwidth(device, tiny)
        exact, tf32 = (matmul_flops(torch.float32, device, tiny, tf32=one) for one in (False, True))
        self.flops = {
            torch.float32: max(exact, tf32 / 3),
            torch.bfloat16: matmul_flops(torch.bfloat16, device, tiny),
        }

    def measure(self, x: Tensor, sides: dict[str, Side], multiply_adds: float) -> dict[str, Any]:
        """The least time is that of the products, or of reading the batch and reading and writing the state."""
        times = {name: milliseconds(side.update, self.device, budget=40) for name, side in sides.items()}
        moved = x.nbytes + 2 * sum(part.nbytes for part in sides["pcafast"].state)
        seconds = {"memory": moved / self.bandwidth, "products": 2 * multiply_adds / self.flops[x.dtype]}
        bound = max(seconds, key=lambda one: seconds[one])
        found = {"milliseconds": times, "bound": bound, "share_of_roofline": 1e3 * seconds[bound] / times["pcafast"]}
        if self.device == "cuda":
            found["extra_bytes"] = {name: extra_bytes(side) for name, side in sides.items()}
        return found


def extra_bytes(side: Side) -> int:
    """What an update holds at most, beside what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side.update()
    return torch.cuda.max_memory_allocated() - before
