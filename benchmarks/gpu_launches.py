"""Every operator on small inputs that reach every kernel it has, each result compared with the reference.

This is what compute-sanitizer watches (gpu.py). Inputs and states are made on the CPU and copied, so that hardly any
kernels run but those of the operators.

    python benchmarks/gpu_launches.py [--device cpu]
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import bare
import torch
from torch import Tensor

bare.import_pcafast()

import covariance_case  # noqa: E402
import moments_case  # noqa: E402
import patch_covariance_case  # noqa: E402
import taylor_case  # noqa: E402

from pcafast import reference  # noqa: E402
from pcafast.native import operators  # noqa: E402
from pcafast.patches import Patches  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SIZES = [(40, 8), (36, 6), (37, 5), (136, 8), (132, 6), (133, 5)]
"""Channels, and the sides of their maps: for vectors of 8, 4 and 1, and for tiles of 64 and of 128 channels."""

Place = Callable[[Tensor], Tensor]
Call = Callable[[Any, Place], list[Tensor]]
"""Runs an operator, of a namespace, on tensors that are put in their place; returns the results."""


def normal(*shape: int, dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAYOUTS[0]) -> Tensor:
    x = torch.randn(shape).to(dtype)
    return x.contiguous(memory_format=layout) if len(shape) == 4 else x


def covariance(x: Tensor, weight: Tensor | None = None, groups: int = 1) -> Call:
    def call(namespace: Any, place: Place) -> list[Tensor]:
        count, mean, comoment, skipped = covariance_case.empty_state(x.shape[1], "cpu")
        comoment = comoment[0, : x.shape[1] // groups].reshape(groups, -1, x.shape[1] // groups)
        state = [place(one) for one in (count, mean, comoment, skipped)]
        weights = None if weight is None else place(weight)
        namespace.covariance_update_(place(x), 1, groups, 1.0, weights, *state)
        return state

    return call


def covariances() -> Iterator[Call]:
    for (channels, side), dtype, layout in itertools.product(SIZES, DTYPES, LAYOUTS):
        x = normal(3, channels, side, side, dtype=dtype, layout=layout)
        yield covariance(x)
        # These are multiplied anew, about their mean or in other units.
        yield covariance(x + 100 if dtype == torch.float16 else x * 1e-30)
        yield covariance(x, weight=torch.rand(3, side, side))
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        yield covariance(normal(3, 48, 6, 6, dtype=dtype, layout=layout), groups=4)


def patch_covariance(x: Tensor, patches: Patches) -> Call:
    layout = patches.layout(x, 1)

    def call(namespace: Any, place: Place) -> list[Tensor]:
        state = [place(one) for one in patch_covariance_case.empty_state(layout, x.shape[1], "cpu").values()]
        namespace.patch_covariance_update_(place(x), *layout[:8], 1, *state)
        return state

    return call


def patch_covariances() -> Iterator[Call]:
    for dtype, layout, stride in itertools.product(DTYPES, LAYOUTS, (1, 2)):
        yield patch_covariance(normal(2, 40, 8, 8, dtype=dtype, layout=layout), Patches.of(3, stride, 1))
    yield patch_covariance(normal(1, 136, 5, 5, dtype=torch.bfloat16), Patches.of(3, 1, 1))
    yield patch_covariance(normal(2, 3, 9, 9), Patches.of(3, 1, 1))


def channel_inputs(dtype: torch.dtype) -> Iterator[Tensor]:
    """In the layouts of csrc/cuda/channel_plan.h: rows, columns in vectors and one by one, others."""
    for shape in [(3, 40, 7, 7), (3, 37, 8, 8), (1, 8, 40, 40), (1100, 8, 3, 1)]:
        for layout in LAYOUTS:
            yield normal(*shape, dtype=dtype, layout=layout)
        yield normal(*shape[:3], 2 * shape[3], dtype=dtype)[..., ::2]
    for channels in (40, 37):
        yield normal(70, channels, dtype=dtype)
        yield normal(channels, 70, dtype=dtype).T
        yield normal(70, 2 * channels, dtype=dtype)[:, ::2]


def taylor(activation: Tensor, gradient: Tensor) -> Call:
    def call(namespace: Any, place: Place) -> list[Tensor]:
        state = [place(one) for one in taylor_case.empty_state(activation.shape[1], "cpu")]
        namespace.taylor_update_(place(activation), place(gradient), 1, 1.0, *state)
        return state

    return call


def moments(x: Tensor) -> Call:
    def call(namespace: Any, place: Place) -> list[Tensor]:
        state = [place(one) for one in moments_case.empty_state(x.shape[1], "cpu")]
        namespace.channel_moments_update_(place(x), 1, *state)
        return state

    return call


def channel_sums() -> Iterator[Call]:
    for dtype in DTYPES:
        for x in channel_inputs(dtype):
            yield moments(x)
            yield taylor(x, x)
    yield taylor(normal(3, 40, 7, 7, dtype=torch.bfloat16), normal(3, 40, 7, 7))


def ranks(maps: Tensor) -> Call:
    return lambda namespace, place: [namespace.feature_map_rank(place(maps), 0.05, 0.0)]


def all_ranks() -> Iterator[Call]:
    """Up to 32 x 32 many maps to a block; larger ones in shared memory; the largest in a workspace."""
    for height, width in [
        (8, 8),
        (16, 11),
        (32, 32),
        (48, 48),
        (80, 70),
        (100, 90),
        (150, 150),
        (160, 160),
        (200, 40),
        (224, 224),
        (250, 40),
        (240, 240),
        (300, 40),
        (300, 290),
    ]:
        few = min(height, width) // 3
        maps = torch.randn(1, 40 if height <= 32 else 2, height, few) @ torch.randn(few, width)
        for dtype in DTYPES if height in (32, 48) else (torch.float32,):
            yield ranks(maps.to(dtype))


CALLS: tuple[Callable[[], Iterator[Call]], ...] = (covariances, patch_covariances, channel_sums, all_ranks)


def recorded() -> list[Any]:
    """What all calls would launch on an H200 (launches.py)."""
    import launches

    found: list[launches.Launches] = []
    for call in itertools.chain.from_iterable(kind() for kind in CALLS):
        call(launches.recording(found), lambda x: x)
    return found


def copied_to(device: str) -> Place:
    """Copies a tensor with its strides; the memory ends where its last element does."""

    def place(x: Tensor) -> Tensor:
        elements = (
            x.storage_offset() + 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
        )
        memory = x.as_strided((elements,), (1,), 0).to(device, copy=True)
        return memory.as_strided(x.shape, x.stride(), x.storage_offset())

    return place


def check_all(device: str) -> int:
    """Run all calls on the device and compare with the reference on the CPU; returns how many they are."""
    torch.manual_seed(0)
    done = 0
    for kind in CALLS:
        for call in kind():
            expected = call(reference, copied_to("cpu"))
            for ours, exact in zip(call(operators, copied_to(device)), expected, strict=True):
                atol = 1e-5 * float(exact.abs().max())
                torch.testing.assert_close(ours.cpu(), exact, rtol=0, atol=atol, msg=lambda m, d=done: f"call {d}: {m}")
            done += 1
        print(f"{kind.__name__}: right", flush=True)
    return done


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    print(f"{check_all(parser.parse_args().device)} calls are right")
