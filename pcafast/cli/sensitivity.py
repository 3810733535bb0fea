"""``pcafast sensitivity``: what each layer's rank costs the model."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from rich.text import Text
from torch import nn

from pcafast.cli import options
from pcafast.cli.tables import console
from pcafast.collect.layers import choose_layers
from pcafast.data import open_dataset
from pcafast.errors import ArgumentError, FileError, PcafastError
from pcafast.files import write_atomically
from pcafast.loop import rank_losses
from pcafast.loop.checkpoint import fingerprint, state_of
from pcafast.loop.factorisation import DIRECTIONS
from pcafast.loop.sensitivity import SHARES

FORMAT, VERSION = "pcafast rank losses", 1
_COLOURS = ("green", "bright_green", "yellow", "dark_orange", "red")

Losses = dict[str, dict[int, float]]


def command(
    model: options.ModelName,
    out: Annotated[Path, typer.Option(help="The .json file to write, for the --losses of compress.")],
    method: Annotated[str, typer.Option(help=f"Which directions to keep: {', '.join(DIRECTIONS)}.")] = "pca",
    layers: Annotated[
        list[str] | None, typer.Option(help="Name or pattern such as 'layer1.*'; may be repeated. Default: all.")
    ] = None,
    data: options.Data = "digits",
    weights: options.Weights = None,
    num_classes: options.NumClasses = None,
    image_size: options.ImageSize = None,
    images: options.Images = 512,
    batch_size: options.BatchSize = 128,
    seed: options.Seed = 0,
    device: options.Device = None,
) -> None:
    """Factorise one layer at a time, at several ranks, and measure how far the model's outputs move.

    The loss is KL(original, factorised) of the class probabilities, in nats per image, on training images. Seven ranks
    are tried of each layer, up to the largest that is cheaper than the layer.
    """
    if method not in DIRECTIONS:
        raise ArgumentError(f"--method: expected one of {', '.join(DIRECTIONS)}, got {method!r}.")
    torch.manual_seed(seed)  # for weights that are not given, as in compress
    network = options.build_model(model, weights, None, num_classes, device)
    dataset = open_dataset(data, "train", image_size=image_size)
    batches = options.training_batches(dataset, images, batch_size, seed)
    chosen = None if layers is None else set(choose_layers(network, layers))
    found = DIRECTIONS[method].bases(network, batches, None if chosen is None else lambda name, _: name in chosen)
    losses = rank_losses(network, found, batches)
    write(out, losses, method, network)
    console.print(_table(losses))
    console.print(f"nats per image over {min(images, len(dataset))} training images; written to {out}")


def write(path: Path, losses: Losses, method: str, model: nn.Module) -> None:
    """Write measured losses, and of which model and directions they are.

    Raises:
        FileError: the file cannot be written.
    """
    head = {"format": FORMAT, "version": VERSION, **_origin(method, model)}
    text = json.dumps({**head, "losses": losses}, indent=2) + "\n"
    write_atomically({path: lambda file: file.write_text(text)})


def read(path: Path, method: str, model: nn.Module) -> Losses:
    """What ``write`` wrote for this model and method.

    Raises:
        FileError: it is absent, damaged or of another format.
        ArgumentError: it is of another model or method.
    """
    try:
        found = json.loads(path.read_text())
        if (found["format"], found["version"]) != (FORMAT, VERSION):
            raise FileError(f"{path} is not a file of rank losses of version {VERSION}: measure them anew.")
        for what, wanted in _origin(method, model).items():
            if found[what] != wanted:
                raise ArgumentError(
                    f"--losses: {path} was measured with another {what.split('_')[0]} ({found[what]}, not {wanted}). "
                    "Run pcafast sensitivity with the model, the weights and the method of this command."
                )
        return {layer: {int(rank): float(loss) for rank, loss in of.items()} for layer, of in found["losses"].items()}
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    except PcafastError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is not a file that pcafast sensitivity wrote, or it is damaged ({error}).") from error


def _origin(method: str, model: nn.Module) -> dict[str, str]:
    return {"method": method, "model_sha256": fingerprint(state_of(model))}


def _table(losses: Mapping[str, Mapping[int, float]]) -> Table:
    """Layers by shares of their largest cheaper rank; the colours are those of a common scale of powers of ten."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", min_width=max(map(len, losses), default=0))
    table.add_column("largest rank", justify="right")
    for share in SHARES:
        table.add_column(f"{share:.0%}", justify="right")
    for layer, of in losses.items():
        largest = max(of)
        cells = [of[max(1, round(share * largest))] for share in SHARES]
        table.add_row(layer, str(largest), *map(_cell, cells))
    return table


def _cell(loss: float) -> Text:
    """Green up to a thousandth of a nat, red from one on."""
    level = 0 if loss <= 0 else min(max(math.ceil(math.log10(loss)) + 3, 0), len(_COLOURS) - 1)
    return Text(f"{loss:.2g}", style=_COLOURS[level])
