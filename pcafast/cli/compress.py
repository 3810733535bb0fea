"""``pcafast compress``: make a smaller model."""

from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pcafast.cli import options, sensitivity
from pcafast.cli.doctor import command_line
from pcafast.cli.tables import comparison, console, notes_shown
from pcafast.data import loader, open_dataset
from pcafast.loop import Costs, Evaluation, compress
from pcafast.plan import Budget


class Method(str, Enum):
    """How the model is made smaller."""

    pca = "pca"
    pca_input = "pca-input"
    uncentred = "uncentred"
    fisher = "fisher"
    gradient = "gradient"
    greedy = "greedy"
    taylor = "taylor"
    rank = "rank"
    l1 = "l1"


class Scope(str, Enum):
    """Where channels are removed."""

    everywhere = "global"
    layer = "layer"


def command(
    model: options.ModelName,
    out: Annotated[Path, typer.Option(help="The folder to write the result to.")],
    budget: Annotated[
        str | None, typer.Option(help="Share to keep: macs=0.5, params=0.5 or, when pruning, channels=0.5.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option(help="In place of a budget, the share of its rank that every low-rank layer keeps.")
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="pca: low-rank layers from the covariance of their outputs; pca-input: of the patches they take in. "
            "uncentred: about zero instead of the mean; fisher: weighted by gradients; gradient and greedy: by the "
            "first-order change of the loss, its magnitude or with its sign. The others remove channels: those with "
            "the lowest Taylor scores, the lowest ranks of their feature maps, or the smallest filters (L1 norm)."
        ),
    ] = Method.pca,
    layers: Annotated[
        list[str] | None, typer.Option(help="Name or pattern such as 'layer1.*'; may be repeated. Default: all.")
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            help="Fit low-rank factors front to back to the outputs of each layer; the method then only chooses ranks.",
        ),
    ] = False,
    losses: Annotated[
        Path | None, typer.Option(help="Choose ranks by what `pcafast sensitivity` measured, from its file.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Reach the budget in so many steps.")] = 1,
    retrain_epochs: Annotated[int, typer.Option(min=0, help="Epochs of retraining in every step.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of retraining: the highest of its schedule.")] = 0.02,
    label_smoothing: Annotated[float, typer.Option(help="Of retraining: share of a label spread over all.")] = 0.0,
    augment: Annotated[bool, typer.Option(help="Shift and mirror the images at random when retraining.")] = True,
    scope: Annotated[
        Scope,
        typer.Option(help="When pruning, remove channels where they matter least, or the same share in every layer."),
    ] = Scope.everywhere,
    min_width: Annotated[int, typer.Option(min=1, help="When pruning, the channels that every layer keeps.")] = 1,
    round_to: Annotated[int, typer.Option(min=1, help="When pruning, make new widths multiples of this.")] = 1,
    compensate_means: Annotated[
        bool, typer.Option(help="When pruning, let what follows take in what removed channels added on average.")
    ] = False,
    reestimate: Annotated[
        bool,
        typer.Option(
            "--reestimate-batch-norm/--keep-batch-norm",
            help="Move the batch norms to what they see, on the training images, in the smaller model.",
        ),
    ] = True,
    data: options.Data = "digits",
    weights: options.Weights = None,
    num_classes: options.NumClasses = None,
    image_size: options.ImageSize = None,
    images: options.Images = 1024,
    batch_size: options.BatchSize = 128,
    seed: options.Seed = 0,
    device: options.Device = None,
) -> None:
    """Compress a model and write the result: plan.json, model.safetensors and report.json.

    Killed at any moment, the same command goes on where it was.
    """
    share = None if budget is None else Budget.parse(budget)
    torch.manual_seed(seed)  # for weights that are not given
    network = options.build_model(model, weights, None, num_classes, device)
    train, test = (open_dataset(data, split, image_size=image_size) for split in ("train", "test"))
    target = options.choose_device(device)
    with notes_shown():
        report = compress(
            network,
            method.value,
            budget=share,
            ratio=ratio,
            train=loader(train, batch_size=batch_size, shuffle=True, augment=augment, seed=seed, device=target),
            test=loader(test, batch_size=batch_size, device=target),
            calibration=options.training_batches(train, images, batch_size, seed),
            out=out,
            layers=layers,
            scope=scope.value,
            min_width=min_width,
            round_to=round_to,
            compensate_means=compensate_means,
            refit=refit,
            losses=None if losses is None else sensitivity.read(losses, method.value, network),
            steps=steps,
            retrain_epochs=retrain_epochs,
            reestimate_batch_norm=reestimate,
            learning_rate=learning_rate,
            label_smoothing=label_smoothing,
            seed=seed,
            name=model,
            data={
                "train": train.name,
                "test": test.name,
                "images": min(images, len(train)),
                "batch_size": batch_size,
                "augment": augment,
            },
            command=command_line(),
        ).report
    console.print(comparison({side: _row(report[side]) for side in ("before", "after")}))
    smaller = sum(layer["after"] < layer["before"] for layer in report["layers"])
    console.print(f"{smaller} of {len(report['layers'])} layers are smaller; the report is {out / 'report.html'}")
    skipped: dict[str, str] = report["skipped"]
    for reason, names in groupby(sorted(skipped, key=skipped.__getitem__), key=skipped.__getitem__):
        console.print(f"left alone, since {reason}: {', '.join(names)}", highlight=False)


def _row(side: dict[str, Any]) -> tuple[Evaluation, Costs]:
    costs = Costs(side["params"], side["macs"], side["latency_seconds"], side["latency_batch_size"])
    return Evaluation(side["correct"], side["images"], side["loss"]), costs
