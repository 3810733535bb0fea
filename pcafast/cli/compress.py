"""``pcafast compress``: make a smaller model."""

from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from pcafast.apply import reestimate_batch_norm
from pcafast.cli import options
from pcafast.cli.doctor import command_line, environment
from pcafast.cli.tables import LATENCY_BATCH, as_report, comparison, console
from pcafast.data import loader, open_dataset
from pcafast.errors import ArgumentError
from pcafast.loop import Evaluation, calibrate, evaluate, measure
from pcafast.plan import Budget, plan_low_rank
from pcafast.progress import track
from pcafast.result import save
from pcafast.statistics import Covariance


class Method(str, Enum):
    """How the model is made smaller."""

    pca = "pca"


def command(
    model: options.ModelName,
    out: Annotated[Path, typer.Option(help="The folder to write the result to.")],
    method: Annotated[Method, typer.Option(help="pca: low-rank layers from the covariance of their outputs.")] = (
        Method.pca
    ),
    budget: Annotated[str | None, typer.Option(help="Share to keep, macs=0.5 or params=0.5.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of channels to keep in every layer.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of variance to keep in every layer.")] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Name or pattern such as 'layer1.*'; may be repeated. Default: all.")
    ] = None,
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
    """Compress a model and write the result: plan.json, model.safetensors and report.json."""
    share = Budget.parse(budget) if budget else None
    if (share is None) + (ratio is None) + (energy is None) != 2:
        raise ArgumentError("expected exactly one of --budget, --ratio and --energy, such as --budget macs=0.5")
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out: expected a folder, and {out} is a file")
    network = options.build_model(model, weights, None, num_classes, device)
    test = open_dataset(data, "test", image_size=image_size)
    train = open_dataset(data, "train", image_size=image_size)
    batches = options.training_batches(train, images, batch_size, seed)

    def judge(candidate: nn.Module, what: str) -> Evaluation:
        return evaluate(candidate, track(loader(test, batch_size=batch_size), f"evaluating {what}"))

    images_to_time, _ = next(iter(loader(test, batch_size=LATENCY_BATCH)))
    stats = calibrate(network, track(batches, "collecting"), layers=layers, covariance=Covariance())
    example = images_to_time[:1].to(options.choose_device(device))
    plan = plan_low_rank(network, stats["covariance"], budget=share, ratio=ratio, energy=energy, example_input=example)
    if not plan.actions:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plan.skipped.items())[:10])
        raise ArgumentError(f"none of the layers can be made cheaper ({reasons})")
    before = judge(network, "the model")
    small = plan.apply(network)
    if reestimate:
        reestimate_batch_norm(small, track(batches, "re-estimating batch norms"))
    after = judge(small, "the result")
    costs = measure(network, small, batch=images_to_time)
    rows = {"before": (before, costs[0]), "after": (after, costs[1])}

    report = {
        "command": command_line(),
        "environment": environment(),
        "data": {"train": train.name, "test": test.name, "images": min(images, len(train))},
        **{name: as_report(*row) for name, row in rows.items()},
    }
    save(small, plan, out, report)
    console.print(comparison(rows))
    console.print(f"{len(plan.actions)} layers factorised; written to {out}")
    for reason, names in groupby(sorted(plan.skipped, key=plan.skipped.__getitem__), key=plan.skipped.__getitem__):
        console.print(f"left alone, since {reason}: {', '.join(names)}", highlight=False)
