"""A ResNet-56 with half its MACs: its accuracy by criterion, and by what is done once the channels are gone.

Every criterion removes channels by the same rules: wherever the scores are lowest for the MACs they save, with widths
that are multiples of 8; and by Taylor scores with multiples of 16, the floats of one AVX-512 register. Accuracies are
of all 10,000 CIFAR-10 test images; statistics, means and batch norms come from the same 1,024 training images. The
retrained networks are those with batch norms re-estimated. Every row has a process and a thread of its own; the times
of all rows are measured at the end, in turns.

PCAFAST_DATA names a folder with cifar10-{train,test}.npz and resnet56-4bfd9763.th.
"""

import argparse
import copy
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import results
import torch
from torch import Tensor, nn

import pcafast
from pcafast.data import loader, open_dataset
from pcafast.loop import Trainer, calibrate, evaluate, measure
from pcafast.loop.pruning import CRITERIA, Criterion
from pcafast.models import build
from pcafast.progress import track

IMAGES = 1024
BUDGET = pcafast.Budget(macs=0.5)
DATA = Path(os.environ["PCAFAST_DATA"])
LEARNING_RATE = 0.02


def random_scores(model: nn.Module, _: Any) -> dict[str, Tensor]:
    """Noise, for every layer that has filters."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(len(norms), generator=generator) for name, norms in pcafast.scores.filter_norm(model).items()
    }


COMPARED = {
    "taylor": (CRITERIA["taylor"], 8),
    "rank": (CRITERIA["rank"], 8),
    "l1": (CRITERIA["l1"], 8),
    "random": (Criterion("random", random_scores), 8),
    "taylor, widths of 16": (CRITERIA["taylor"], 16),
}
"""Criteria, and what widths are multiples of."""

NOT_RETRAINED = "random"


class Bench:
    """The network, the data, and what is measured on them."""

    def __init__(self, epochs: int) -> None:
        self.train, self.test = (open_dataset(str(DATA / f"cifar10-{split}.npz"), split) for split in ("train", "test"))
        self.model = build("resnet56", weights=DATA / "resnet56-4bfd9763.th").eval()
        self.calibration = loader(self.train, batch_size=128, images=IMAGES)
        self.example = next(iter(self.calibration))[0][:1]
        self.epochs = epochs

    def pruned(self, row: str) -> tuple[nn.Module, nn.Module]:
        """Without and with the means of the removed channels made up for."""
        criterion, round_to = COMPARED[row]
        statistics = {**criterion.statistics, "moments": pcafast.ChannelMoments(side="input")}
        stats = calibrate(self.model, track(self.calibration, "collecting"), **statistics)
        scores = criterion.scores(self.model, stats)
        options = {"budget": BUDGET, "example_input": self.example, "round_to": round_to}
        plan = partial(pcafast.plan_pruning, self.model, scores, **options)
        return plan().apply(self.model), plan(means=stats["moments"]).apply(self.model)

    def accuracy(self, model: nn.Module, what: str) -> float:
        """On the test images."""
        return evaluate(model, track(loader(self.test, batch_size=250), what)).accuracy

    def reestimated(self, model: nn.Module) -> nn.Module:
        """A copy whose batch norms have seen the training images."""
        model = copy.deepcopy(model)
        pcafast.reestimate_batch_norm(model, self.calibration, new_share=1.0)
        return model

    def retrained(self, model: nn.Module, what: str) -> nn.Module:
        """The model after some epochs of the built-in trainer; the seed is the same for all."""
        torch.manual_seed(0)
        batches = loader(self.train, batch_size=128, shuffle=True, augment=True)
        model.to(memory_format=torch.channels_last)
        trainer = Trainer(model, self.epochs * len(batches), learning_rate=LEARNING_RATE)
        for epoch in range(self.epochs):
            batches.set_epoch(epoch)
            trainer.epoch(track(batches, f"{what}, epoch {epoch + 1}"))
        return model.eval()

    def accuracies(self, row: str) -> dict[str, float]:
        """Of the pruned network, after each treatment."""
        small, compensated = self.pruned(row)
        reestimated = self.reestimated(small)
        variants = {
            "no retraining": small,
            "compensated means": compensated,
            "batch norm re-estimated": reestimated,
        }
        found = {what: self.accuracy(one, f"{row}, {what}") for what, one in variants.items()}
        if self.epochs and row != NOT_RETRAINED:
            what = f"{self.epochs} epochs"
            found[what] = self.accuracy(self.retrained(reestimated, f"{row}, {what}"), what)
        return found

    def costs(self) -> dict[str, dict[str, float]]:
        """What the network and the pruned ones cost; all are timed in turns."""
        models = {"original": self.model, **{row: self.pruned(row)[0] for row in track(COMPARED, "pruning")}}
        costs = measure(*models.values(), batch=next(iter(loader(self.test, batch_size=64)))[0])
        whole = costs[0]
        return {
            row: {
                "macs": one.macs / whole.macs,
                "params": one.params / whole.params,
                "milliseconds_for_64": one.seconds * 1000,
                "speedup": whole.seconds / one.seconds,
            }
            for row, one in zip(models, costs, strict=True)
        }


def accuracies(row: str, epochs: int) -> dict[str, float]:
    """Those of one row, in a process of its own."""
    torch.set_num_threads(1)
    return Bench(epochs).accuracies(row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2, help="of retraining; 0 for none")
    parser.add_argument(
        "--only", nargs="*", default=list(COMPARED), help="rows to measure the accuracy of anew; none for times alone"
    )
    arguments = parser.parse_args()
    epochs, only = arguments.epochs, arguments.only
    found = {}
    if set(only) < set(COMPARED):
        before = results.read("pruning")
        assert before["epochs"] == epochs, "the other rows were retrained for another number of epochs"
        found = {row: one["accuracy"] for row, one in before["rows"].items()}
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        found |= dict(zip(only, pool.map(partial(accuracies, epochs=epochs), only), strict=True))
    bench = Bench(epochs)
    found["original"] = {"no retraining": bench.accuracy(bench.model, "original")}
    rows = {row: {"accuracy": found[row], **costs} for row, costs in bench.costs().items()}
    results.write("pruning", {"images": IMAGES, "epochs": epochs, "rows": rows})
