"""Covariance of the patches of a 3x3 convolution: the peers, and the truth.

Every side adds a batch to running sums that are there already: pcafast to its pairs of pixels, in float64; the peers to
the products of all pairs of entries, in the dtype of the batch. The two that unfold by themselves here find the mean of
the patches and subtract it; curvlinops and kfac-pytorch multiply the patches as they are, as K-FAC wants them.
"""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from cases import Case, Side, activations, check_covariance, with_sgemm
from torch import Tensor, nn

from pcafast.functional import add_patches, finish_patch_covariance
from pcafast.patches import Layout, Patches

SIZE = 9
PEERS = ("pcafast", "unfold, matmul", "unfold, ssyrk", "curvlinops", "kfac-pytorch", "sgemm")
PACKAGES = {"curvlinops": "curvlinops.kfac", "kfac-pytorch": "kfac.layers.modules"}


def patch_covariance_case(network: str, shape: tuple[int, ...], stride: int) -> Case:
    """One batch of a layer's inputs, float32."""
    x = inputs(shape, "float32", "channels first")
    missing = absent()
    found = checked_sides(x, stride, {name: make for name, make in sides(x, stride).items() if name not in missing})
    given = {"shape": shape, "network": network, "stride": stride}
    return with_sgemm("patch covariance", given, found, multiply_adds(x, stride), absent=missing)


def absent() -> dict[str, str]:
    """The peers whose packages are not there."""
    return {name: "not installed" for name, module in PACKAGES.items() if not importable(module)}


def importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:  # also where another package has that name
        return False
    return True


def inputs(shape: tuple[int, ...], dtype: str, layout: str, device: str = "cpu") -> Tensor:
    """As after a ReLU."""
    return activations(shape, dtype, layout, seed=0, device=device).relu_()


def layout_of(x: Tensor, stride: int) -> Layout:
    return Patches.of(3, stride, 1).layout(x, 1)


def multiply_adds(x: Tensor, stride: int) -> float:
    """Of all pairs of pixels that the layout names; half where a pixel is its own partner."""
    layout = layout_of(x, stride)
    pairs = sum(
        rows * columns * (1 if down or right else 0.5)
        for _, _, rows, columns, down, right in layout.rectangles.tolist()
    )
    return len(x) * pairs * (x.shape[1] * len(layout.taps)) ** 2


def sides(x: Tensor, stride: int) -> dict[str, Callable[[], Side]]:
    """What makes each side."""
    return {
        "pcafast": lambda: native(x, stride),
        "unfold, matmul": lambda: unfold_matmul(x, stride),
        "unfold, ssyrk": lambda: unfold_ssyrk(x, stride),
        "curvlinops": lambda: curvlinops(x, stride),
        "kfac-pytorch": lambda: kfac_pytorch(x, stride),
    }


def checked_sides(x: Tensor, stride: int, makers: dict[str, Callable[[], Side]]) -> dict[str, Side]:
    """Each side, after one batch."""
    made = {name: make() for name, make in makers.items()}
    exact = {centred: exact_covariance(x, stride, centred) for centred in {side.centred for side in made.values()}}
    for name, side in made.items():
        side.update()
        check_covariance(name, side, exact[side.centred], x.dtype)
    return made


def exact_covariance(x: Tensor, stride: int, centred: bool) -> Tensor:
    """From patches in float64, image by image."""
    images = [F.unfold(image.double(), 3, padding=1, stride=stride)[0] for image in x.split(1)]
    count = len(images) * images[0].shape[1]
    mean = sum(patches.sum(1, keepdim=True) for patches in images) / count if centred else 0.0
    return sum((patches - mean) @ (patches - mean).T for patches in images) / count


def native(x: Tensor, stride: int) -> Side:
    """The operator behind ``PatchCovariance``, with its layout at hand."""
    layout = layout_of(x, stride)
    state = empty_state(layout, x.shape[1], x.device)

    def covariance() -> Tensor:
        return finish_patch_covariance({**state, "members": layout.members.to(x.device)}, 0).covariance

    return Side(lambda: add_patches(x, layout, 1, state), list(state.values()), covariance)


def empty_state(layout: Layout, channels: int, device: Any) -> dict[str, Tensor]:
    """As ``add_patches`` takes it."""
    slots, entries = len(layout.slot_ends), channels * len(layout.taps)
    shapes = {
        "patches": (),
        "count": (slots,),
        "left": (slots, entries),
        "right": (slots, entries),
        "comoment": (slots, 1, entries, entries),
    }
    sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
    return {**sums, "skipped": torch.zeros((), dtype=torch.int64, device=device)}


def unfold_matmul(x: Tensor, stride: int) -> Side:
    """What pca-compress does for the input of a convolution: a copy with a row for every patch."""
    total = running_sum(x)

    def update() -> None:
        rows = F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2).reshape(-1, len(total))
        rows -= rows.mean(0)
        total.addmm_(rows.T, rows)

    return Side(update, [total], lambda: total / patch_count(x, stride))


def unfold_ssyrk(x: Tensor, stride: int) -> Side:
    """The symmetric product of BLAS: image by image where that has much to do, else of all images at once."""
    from scipy.linalg.blas import ssyrk
    from threadpoolctl import threadpool_limits

    threadpool_limits(torch.get_num_threads(), "blas")
    total = running_sum(x)
    sums = total.numpy().T  # by columns; the upper triangle of this is the lower of that

    def update() -> None:
        columns = F.unfold(x, 3, padding=1, stride=stride)
        columns -= columns.mean((0, 2), keepdim=True)
        if columns.shape[2] < 1000:
            columns = columns.transpose(0, 1).flatten(1).unsqueeze(0)
        for image in columns:
            ssyrk(1.0, image.numpy().T, trans=1, beta=1.0, c=sums, overwrite_c=1)

    def covariance() -> Tensor:
        return (total.tril() + total.tril(-1).T) / patch_count(x, stride)

    return Side(update, [total], covariance)


def curvlinops(x: Tensor, stride: int) -> Side:
    """The hook by which KFACLinearOperator finds the input factor of a layer (curvlinops-for-pytorch)."""
    kfac = importlib.import_module("curvlinops.kfac")
    operator = SimpleNamespace(
        _kfac_approx=kfac.KFACType.EXPAND,
        _mapping={"conv": {"weight": 0}},
        _separate_weight_and_bias=True,
        _N_data=len(x),
        _input_covariances={"conv": running_sum(x)},
        _set_or_add_=kfac.KFACLinearOperator._set_or_add_,
    )
    conv, total = convolution(x, stride), operator._input_covariances["conv"]

    def update() -> None:
        kfac.KFACLinearOperator._hook_accumulate_input_covariance(operator, conv, (x,), "conv")

    return Side(update, [total], lambda: total, centred=False)


def kfac_pytorch(x: Tensor, stride: int) -> Side:
    """The input factor of a layer as ``kfac`` finds it, whose patches are over the number of positions."""
    helper = importlib.import_module("kfac.layers.modules").Conv2dModuleHelper(convolution(x, stride))
    total = running_sum(x)

    def update() -> None:
        total.add_(helper.get_a_factor(x))

    positions = patch_count(x, stride) // len(x)
    return Side(update, [total], lambda: total * positions**2, centred=False)


def convolution(x: Tensor, stride: int) -> nn.Conv2d:
    return nn.Conv2d(x.shape[1], 1, 3, stride=stride, padding=1, bias=False).to(x)


def running_sum(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[1] * SIZE, x.shape[1] * SIZE)


def patch_count(x: Tensor, stride: int) -> int:
    return len(x) * layout_of(x, stride).patches
