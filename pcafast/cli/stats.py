"""``pcafast stats``: collect statistics of a model's layers into a file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

from pcafast.bases import principal_components
from pcafast.cli import options
from pcafast.cli.tables import console
from pcafast.collect import Collection
from pcafast.data import open_dataset
from pcafast.errors import ArgumentError
from pcafast.loop import calibrate
from pcafast.loop.timing import LayerTime, time_layers
from pcafast.progress import track
from pcafast.statistics import (
    ActivationGradient,
    ChannelMoments,
    Covariance,
    FeatureMapRank,
    GradientCovariance,
    PatchCovariance,
    Statistic,
    Taylor,
)

AVAILABLE: dict[str, Callable[[], Statistic]] = {
    "covariance": Covariance,
    "patches": PatchCovariance,
    "taylor": Taylor,
    "rank": FeatureMapRank,
    "gradient": GradientCovariance,
    "moments": ChannelMoments,
    "activation_gradient": ActivationGradient,
}


def command(
    model: options.ModelName,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    data: options.Data = "digits",
    weights: options.Weights = None,
    statistics: Annotated[str, typer.Option(help=f"Any of {', '.join(AVAILABLE)}.")] = "covariance,taylor,rank",
    layers: Annotated[
        list[str] | None, typer.Option(help="Name or pattern such as 'layer1.*'; may be repeated. Default: all.")
    ] = None,
    num_classes: options.NumClasses = None,
    image_size: options.ImageSize = None,
    images: options.Images = 1024,
    batch_size: options.BatchSize = 128,
    seed: options.Seed = 0,
    device: options.Device = None,
    timings: Annotated[
        bool, typer.Option("--timings", help="Also show how long each layer takes for a batch; not in the file.")
    ] = False,
) -> None:
    """Collect statistics over training images, in one pass, and write them to a file."""
    chosen = {name: _kind(name)() for name in map(str.strip, statistics.split(","))}
    network = options.build_model(model, weights, None, num_classes, device)
    dataset = open_dataset(data, "train", image_size=image_size)
    batches = options.training_batches(dataset, images, batch_size, seed)
    stats = calibrate(network, track(batches, "collecting"), layers=layers, **chosen)
    stats.save(out)
    console.print(_summary(stats))
    console.print(f"{min(images, len(dataset))} training images of {dataset.name}; written to {out}")
    if timings:
        batch, _ = next(iter(batches))
        console.print(_timings(network, time_layers(network, batch, layers=layers)))


def _kind(name: str) -> Callable[[], Statistic]:
    if name not in AVAILABLE:
        raise ArgumentError(f"--statistics: expected any of {', '.join(AVAILABLE)}, got {name!r}")
    return AVAILABLE[name]


def _summary(stats: Collection) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer")
    for name in stats:
        table.add_column(_COLUMNS[name][0], justify="right")
    for layer in dict.fromkeys(layer for layers in stats.values() for layer in layers):
        cells = [_cell(name, layers.get(layer)) for name, layers in stats.items()]
        table.add_row(layer, *cells)
    return table


def _timings(model: nn.Module, times: Sequence[LayerTime]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("layer", "type"):
        table.add_column(title)
    for title in ("ms per batch", "of the forward", "params", "of the params"):
        table.add_column(title, justify="right")
    params = sum(parameter.numel() for parameter in model.parameters())
    for layer in sorted(times, key=lambda one: one.seconds, reverse=True):
        shares = f"{layer.share:.1%}", f"{layer.params / max(1, params):.1%}"
        table.add_row(layer.layer, layer.type, f"{layer.seconds * 1000:.3f}", shares[0], f"{layer.params:,}", shares[1])
    return table


def _cell(name: str, statistic: Statistic | None) -> str:
    """Empty for a layer that cannot have the statistic, or that the model never called."""
    return "" if statistic is None or statistic.is_empty else _COLUMNS[name][1](statistic)


def _directions(statistic: Statistic) -> str:
    variances, _ = principal_components(statistic.compute().covariance)
    variances = variances.flatten().sort(descending=True).values
    needed = int((variances.cumsum(0) < 0.9 * variances.sum()).sum()) + 1
    return f"{needed} of {len(variances)}"


def _range(values: Tensor) -> str:
    return f"{values.min():.3g} .. {values.max():.3g}"


_COLUMNS: dict[str, tuple[str, Callable[[Statistic], str]]] = {
    "covariance": ("directions with 90 % of variance", _directions),
    "patches": ("directions with 90 % of patch variance", _directions),
    "gradient": ("directions with 90 % of gradient variance", _directions),
    "taylor": ("Taylor score", lambda statistic: _range(statistic.compute())),
    "rank": ("mean rank", lambda statistic: _range(statistic.compute())),
    "moments": ("channel mean", lambda statistic: _range(statistic.compute().mean)),
    "activation_gradient": (
        "first-order loss, per direction and position",
        lambda statistic: _range(torch.linalg.eigvalsh(statistic.compute().symmetric) / 2),
    ),
}
