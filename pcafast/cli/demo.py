"""``pcafast demo``: the whole way in a minute, on digits that come with scikit-learn."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from pcafast.cli.doctor import command_line
from pcafast.cli.tables import LATENCY_BATCH, comparison, console, notes_shown
from pcafast.data import loader, open_dataset
from pcafast.loop import Trainer, compress, evaluate, measure
from pcafast.models import build
from pcafast.plan import Budget
from pcafast.progress import track

EPOCHS = 8
RETRAIN_EPOCHS = 3
BATCH_SIZE = 64
METHODS = {"pca": "PCA", "taylor": "Taylor", "rank": "rank"}


def command(
    out: Annotated[Path, typer.Option(help="The folder to write the results to.")] = Path("pcafast-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the images.")] = 0,
) -> None:
    """Train a small network on digits, and compress it to half its MACs in three ways."""
    torch.manual_seed(seed)
    train, test = open_dataset("digits", "train"), open_dataset("digits", "test")
    batches = loader(train, batch_size=BATCH_SIZE, shuffle=True, seed=seed)
    to_judge = loader(test, batch_size=BATCH_SIZE)

    model = build("digits_cnn")
    trainer = Trainer(model, EPOCHS * len(batches))
    for _ in track(range(EPOCHS), "training"):
        trainer.epoch(batches)

    models, evaluations = {"trained": model}, {"trained": evaluate(model, to_judge)}
    for method, name in METHODS.items():
        with notes_shown():
            small = compress(
                model,
                method,
                budget=Budget(macs=0.5),
                train=batches,
                test=to_judge,
                out=out / method,
                retrain_epochs=RETRAIN_EPOCHS,
                seed=seed,
                name="digits_cnn",
                data={"train": "digits", "test": "digits", "images": len(train)},
                command=command_line(),
            ).model
        models[name], evaluations[name] = small, evaluate(small, to_judge)
    example, _ = next(iter(loader(test, batch_size=LATENCY_BATCH)))
    costs = measure(*models.values(), batch=example)
    console.print(comparison(dict(zip(models, zip(evaluations.values(), costs, strict=True), strict=True))))
    folders = ", ".join(str(out / method / "report.html") for method in METHODS)
    console.print(
        f"PCA makes low-rank layers, Taylor and rank remove channels; all were retrained for {RETRAIN_EPOCHS} epochs. "
        f"The reports to look at: {folders}. In Python: "
        f'pcafast.load(pcafast.models.build("digits_cnn"), "{out / "taylor"}")',
        soft_wrap=True,
    )
