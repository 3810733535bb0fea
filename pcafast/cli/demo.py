"""``pcafast demo``: the whole way in under a minute, on digits that come with scikit-learn."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from pcafast.cli.doctor import command_line, environment
from pcafast.cli.tables import LATENCY_BATCH, as_report, comparison, console
from pcafast.collect import collect
from pcafast.data import loader, open_dataset
from pcafast.loop import Evaluation, Trainer, evaluate, measure
from pcafast.models import build
from pcafast.plan import Budget, plan_low_rank
from pcafast.progress import track
from pcafast.result import save
from pcafast.statistics import Covariance, FeatureMapRank, Taylor

EPOCHS = 8
RETRAIN_EPOCHS = 3
BATCH_SIZE = 64


def command(
    out: Annotated[Path, typer.Option(help="The folder to write the result to.")] = Path("pcafast-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the images.")] = 0,
) -> None:
    """Train a small network on digits, collect statistics while it trains, and compress it to half its MACs."""
    torch.manual_seed(seed)
    train, test = open_dataset("digits", "train"), open_dataset("digits", "test")
    batches = loader(train, batch_size=BATCH_SIZE, shuffle=True, seed=seed)
    example, _ = next(iter(loader(test, batch_size=LATENCY_BATCH)))

    def judge(model: nn.Module) -> Evaluation:
        return evaluate(model, loader(test, batch_size=BATCH_SIZE))

    model = build("digits_cnn")
    trainer = Trainer(model, EPOCHS * len(batches))
    for _ in track(range(EPOCHS - 1), "training"):
        trainer.epoch(batches)
    # The last epoch is watched: the statistics come out of the training itself.
    with collect(model, covariance=Covariance(), taylor=Taylor(), rank=FeatureMapRank()) as stats:
        trainer.epoch(track(batches, "training, and collecting statistics"))
    trained = judge(model)

    plan = plan_low_rank(model, stats["covariance"], budget=Budget(macs=0.5), example_input=example[:1])
    small = plan.apply(model)
    compressed = judge(small)
    retrainer = Trainer(small, RETRAIN_EPOCHS * len(batches), learning_rate=0.02)
    for _ in track(range(RETRAIN_EPOCHS), "retraining"):
        retrainer.epoch(batches)
    retrained = judge(small)

    before, after = measure(model, small, batch=example)
    rows = {"trained": (trained, before), "PCA, half MACs": (compressed, after), "retrained": (retrained, after)}
    report = {
        "command": command_line(),
        "environment": environment(),
        **{name: as_report(*row) for name, row in rows.items()},
    }
    save(small, plan, out, report)
    stats.save(out / "statistics.safetensors")
    console.print(comparison(rows))
    console.print(
        f"The result is in {out}, and so are the statistics. In Python: "
        f'pcafast.load(pcafast.models.build("digits_cnn"), "{out}")',
        soft_wrap=True,
    )
