"""What gpu.py measures, by name. Every section is a function of the device and of whether tiny inputs will do."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import covariance_case
import moments_case
import patch_covariance_case
import taylor_case
import torch
from cases import activations
from gpu_covariance import covariance, patch_covariance
from gpu_timings import moments, rank, roofline, taylor
from rank_case import feature_maps
from torch import Tensor

from pcafast import native
from pcafast.functional import add_patches, default_rtol
from pcafast.native import operators


def kernels(device: str, tiny: bool) -> dict[str, Any]:
    """What is measured on, and which operators have a kernel of their own there."""
    found: dict[str, Any] = {"own": [one for one in native.OPERATORS if native.has_kernel(one, device.upper())]}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        for name in ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size"):
            found[name] = getattr(properties, name)
    return found


def graphs(device: str, tiny: bool) -> dict[str, str]:
    """Every operator with a kernel there, in a CUDA graph: replayed, it must do what it does without, bit for bit."""
    a, g = (activations((8, 64, 14, 14), "float32", "channels first", seed=seed, device=device) for seed in (0, 1))
    maps = feature_maps(2, 32).to(device)
    sums, moments = taylor_case.empty_state(64, device), moments_case.empty_state(64, device)
    covariance, layout = covariance_case.empty_state(64, device), patch_covariance_case.layout_of(a, 1)
    patches = patch_covariance_case.empty_state(layout, 64, device)
    ranks = torch.zeros(maps.shape[:2], dtype=torch.int64, device=device)
    calls: dict[str, tuple[Callable[[], object], list[Tensor]]] = {
        "covariance_update_": (lambda: operators.covariance_update_(a, 1, 1, 1.0, None, *covariance), covariance),
        "patch_covariance_update_": (lambda: add_patches(a, layout, 1, patches), list(patches.values())),
        "taylor_update_": (lambda: operators.taylor_update_(a, g, 1, 1.0, *sums), sums),
        "channel_moments_update_": (lambda: operators.channel_moments_update_(a, 1, *moments), moments),
        "feature_map_rank": (lambda: ranks.copy_(operators.feature_map_rank(maps, default_rtol(maps), 0.0)), [ranks]),
    }
    calls = {name: one for name, one in calls.items() if native.has_kernel(name, device.upper())}
    for name, (call, outputs) in calls.items():
        expected = called_twice(call, outputs)
        found = called_twice(captured(call, device), outputs)
        assert expected[0].any(), name
        assert all(map(torch.equal, found, expected)), name
        print(f"{name} can be captured", flush=True)
    return dict.fromkeys(calls, "the same, captured and replayed")


def called_twice(call: Callable[[], object], outputs: list[Tensor]) -> list[Tensor]:
    """What two calls make of zeros."""
    for output in outputs:
        output.zero_()
    call()
    call()
    return [output.clone() for output in outputs]


def captured(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call as a CUDA graph; itself on the CPU, which has none."""
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def training(device: str, tiny: bool) -> dict[str, Any]:
    """A training step of ResNet-50 with and without ``collect``, and hook calls."""
    import gpu_training

    return gpu_training.training(device, tiny)


def hrank(device: str, tiny: bool) -> dict[str, Any]:
    """The procedures of hrank.py, with random weights and images: pcafast's for all places and images.

    HRank's, whose time is that of its SVDs one by one, is timed for one place of each size of map on the first batch,
    and estimated from that for all.
    """
    import hrank as procedure

    from pcafast.models import build

    torch.manual_seed(0)
    model = build("resnet20" if tiny else "resnet56").eval().to(device)
    images, batch_size = (4, 2) if tiny else (procedure.IMAGES, procedure.BATCH_SIZE)
    batches = [
        (torch.randn(batch_size, 3, 32, 32, device=device), torch.zeros(batch_size, dtype=torch.int64, device=device))
        for _ in range(images // batch_size)
    ]
    places, chosen = procedure.places(model), [f"layer{stage}.1.conv1" for stage in (1, 2, 3)]
    for layer in chosen:  # the first SVD of a size takes longer
        procedure.hrank(model, [(one[:1], labels[:1]) for one, labels in batches[:1]], places[layer])
    found = procedure.procedures(model, batches[:1], chosen)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        procedure.one_pass(model, batches)
        seconds.append(time.perf_counter() - begin)
    alike = {layer: sum(place.startswith(layer[:6]) for place in places) for layer in chosen}
    alike[chosen[0]] += 1  # the first convolution's
    by_place = found["hrank_seconds_by_place"]
    estimate = len(batches) * sum(by_place[layer] * alike[layer] for layer in chosen)
    all_images = {"images": images, "estimated_hrank_seconds": estimate, "pcafast_seconds": statistics.median(seconds)}
    return {"first_batch": found, **all_images, "estimated_speedup": estimate / all_images["pcafast_seconds"]}


SECTIONS: dict[str, Callable[[str, bool], Any]] = {
    section.__name__: section
    for section in (kernels, roofline, graphs, covariance, patch_covariance, rank, taylor, moments, training, hrank)
}
