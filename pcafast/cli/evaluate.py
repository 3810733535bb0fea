"""``pcafast evaluate``: accuracy and costs of a model."""

from pathlib import Path
from typing import Annotated

import typer

from pcafast.cli import options
from pcafast.cli.tables import LATENCY_BATCH, comparison, console
from pcafast.data import loader, open_dataset
from pcafast.loop import evaluate, measure
from pcafast.progress import track


def command(
    model: options.ModelName,
    data: options.Data = "digits",
    weights: options.Weights = None,
    compressed: Annotated[
        Path | None, typer.Option(help="Result folder of `pcafast compress` for this model; holds its own weights.")
    ] = None,
    num_classes: options.NumClasses = None,
    image_size: options.ImageSize = None,
    batch_size: options.BatchSize = 256,
    device: options.Device = None,
) -> None:
    """Accuracy on the test images, parameters, MACs and latency of a model."""
    network = options.build_model(model, weights, compressed, num_classes, device)
    dataset = open_dataset(data, "test", image_size=image_size)
    evaluation = evaluate(network, track(loader(dataset, batch_size=batch_size), "evaluating"))
    batch, _ = next(iter(loader(dataset, batch_size=LATENCY_BATCH)))
    (costs,) = measure(network, batch=batch)
    console.print(comparison({model: (evaluation, costs)}))
    console.print(f"{evaluation.correct} of {evaluation.images} test images of {dataset.name} are right.")
