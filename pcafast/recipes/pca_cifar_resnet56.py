"""What pca-compress does to an ImageNet network, done to the CIFAR-10 ResNets, beside all that there is to do better.

Every method has the MACs of pca-compress's rule, the same share of the rank of every convolution of stride 1; pcafast
leaves out those that this makes dearer. Nothing is retrained where it is not said.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pcafast import bases
from pcafast.apply import reestimate_batch_norm
from pcafast.data import Batches, ImageDataset, loader, open_dataset
from pcafast.loop import Trainer, calibrate, evaluate, measure, projection_hessians, rank_losses, refit
from pcafast.models import build
from pcafast.plan import Budget, Plan, plan_low_rank
from pcafast.progress import track
from pcafast.recipes.recipe import Results, Table
from pcafast.statistics import ActivationGradient, Covariance, GradientCovariance, PatchCovariance

SUMMARY = "CIFAR-10: ResNet-20 and ResNet-56 made low-rank by every method, at the MACs of pca-compress's rule"

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
RATIOS = (0.5, 0.75)
LOSS_IMAGES = 512
HESSIAN_SAMPLES = 256
LEARNING_RATE = 0.01

UNIFORM, BY_LOSSES = "same share of every rank (pca-compress)", "ranks by measured losses, fitted front to back"

Row = dict[str, float]


def run(
    data: Path, *, images: int = 2048, epochs: int = 1, seed: int = 0, device: torch.device | str = "cpu"
) -> Results:
    """All methods on both networks.

    Args:
        data: a folder with cifar10-train.npz and cifar10-test.npz, or torchvision's cifar-10-batches-py, and the
            weights of https://github.com/akamaster/pytorch_resnet_cifar10.
        images: for statistics, drawn from the training images.
        epochs: of retraining, in the last row.
        seed: of the images that are drawn, and of retraining.
        device: where to compute.

    Returns:
        For each network and share of ranks, the share of MACs, and of each method its test accuracy and its costs.

    Raises:
        FileError: the data or the weights cannot be read.
    """
    spec = str(data if (data / "cifar-10-batches-py").is_dir() else data / "cifar10-{split}.npz")
    train, test = open_dataset(spec, "train"), open_dataset(spec, "test")
    return {
        name: _Experiment(name, data / weights, train, test, images, seed, device).results(epochs)
        for name, weights in WEIGHTS.items()
    }


class _Experiment:
    """One network."""

    def __init__(
        self,
        name: str,
        weights: Path,
        train: ImageDataset,
        test: ImageDataset,
        images: int,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.name, self.train, self.seed, self.device = name, train, seed, device
        model = build(name, weights=weights).to(device).to(memory_format=torch.channels_last)
        self.model = model.eval()
        self.test = loader(test, batch_size=500, device=device)
        self.calibration = loader(train, batch_size=128, images=images, seed=seed, device=device)
        self.example = next(iter(self.calibration))[0][:1]
        statistics = {
            "output": Covariance(),
            "input": PatchCovariance(),
            "gradient": GradientCovariance(),
            "matrix": ActivationGradient(),
        }
        convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        self.stats = calibrate(model, track(self.calibration, f"{name}, collecting"), layers=convolutions, **statistics)
        some = loader(train, batch_size=128, images=min(LOSS_IMAGES, images), seed=seed + 1, device=device)
        self.losses = rank_losses(model, self.stats["output"], some)
        self.hessians = projection_hessians(
            model, self.calibration, layers=convolutions, fit="local", loss="kl", samples=HESSIAN_SAMPLES, seed=seed
        )

    def results(self, epochs: int) -> Results:
        """Of all shares of ranks."""
        original = self._row(self.model, "original")
        return {
            "original": original,
            "budgets": [self._budget(ratio, epochs if ratio == RATIOS[0] else 0) for ratio in RATIOS],
        }

    def _budget(self, ratio: float, epochs: int) -> Results:
        stride_one = {name: one for name, one in self.stats["output"].items() if self._module(name).stride == (1, 1)}
        uniform = plan_low_rank(self.model, stride_one, ratio=ratio, example_input=self.example)
        share = uniform.reached["macs"]["share"]
        models, rows = {}, {}
        for method, model in self._models(uniform, Budget(macs=share)):
            rows[method] = self._row(model, method)
            if method in (UNIFORM, BY_LOSSES):
                models[method] = model
        if epochs:
            method = f"the same, {epochs} epoch{'s' * (epochs > 1)} of retraining"
            rows[method] = self._row(self._retrained(models[BY_LOSSES], epochs), method)
        batch = next(iter(self.test))[0][:64]
        timed = measure(self.model, models[UNIFORM], models[BY_LOSSES], batch=batch)
        seconds = dict(zip(("original", UNIFORM, BY_LOSSES), (one.seconds for one in timed), strict=True))
        return {"ratio": ratio, "share_of_macs": share, "rows": rows, "seconds_for_64": seconds}

    def _models(self, uniform: Plan, budget: Budget) -> Iterator[tuple[str, nn.Module]]:
        def planned(found: Mapping[str, Any], **options: Any) -> Plan:
            return plan_low_rank(self.model, found, budget=budget, example_input=self.example, **options)

        by_energy = planned(self.stats["output"])
        yield UNIFORM, uniform.apply(self.model)
        yield f"{UNIFORM}, batch norm re-estimated", self._reestimated(uniform.apply(self.model))
        for name, find in self._bases().items():
            yield f"ranks by budget, {name}", planned(find).apply(self.model)
        yield "ranks by budget, PCA, batch norm re-estimated", self._reestimated(by_energy.apply(self.model))
        yield "ranks by budget, fitted front to back", refit(self.model, by_energy, self.calibration).apply(self.model)
        by_losses = planned(self.stats["output"], losses=self.losses)
        yield "ranks by measured losses, PCA", by_losses.apply(self.model)
        yield BY_LOSSES, refit(self.model, by_losses, self.calibration).apply(self.model)

    def _bases(self) -> dict[str, Mapping[str, Any]]:
        output, gradient = self.stats["output"], self.stats["gradient"]

        def of_all(find: Callable[[Any], bases.Basis], kind: str) -> dict[str, bases.Basis]:
            return {name: find(one) for name, one in self.stats[kind].items()}

        return {
            "PCA": output,
            "PCA of patches": self.stats["input"],
            "uncentred PCA": of_all(bases.uncentred, "output"),
            "Fisher": {name: bases.fisher(one, gradient[name]) for name, one in output.items()},  # type: ignore[arg-type]
            "gradient-weighted": of_all(lambda one: bases.gradient(one, select="magnitude"), "matrix"),
            "greedy (signed)": of_all(lambda one: bases.gradient(one, select="signed"), "matrix"),
            "Hessian (local, KL)": {name: bases.hessian(one) for name, one in self.hessians.items()},
        }

    def _module(self, name: str) -> Any:
        return self.model.get_submodule(name)

    def _reestimated(self, model: nn.Module) -> nn.Module:
        reestimate_batch_norm(model, self.calibration)
        return model

    def _retrained(self, model: nn.Module, epochs: int) -> nn.Module:
        model = deepcopy(model)
        torch.manual_seed(self.seed)
        batches: Batches = loader(
            self.train, batch_size=128, shuffle=True, augment=True, seed=self.seed, device=self.device
        )
        trainer = Trainer(model, epochs * len(batches), learning_rate=LEARNING_RATE)
        for epoch in range(epochs):
            batches.set_epoch(epoch)
            trainer.epoch(track(batches, f"{self.name}, retraining, epoch {epoch + 1}"))
        return model

    def _row(self, model: nn.Module, what: str) -> Row:
        found = evaluate(model, track(self.test, f"{self.name}, {what}"))
        params = sum(parameter.numel() for parameter in model.parameters())
        return {"accuracy": found.accuracy, "correct": found.correct, "params": params}


def table(results: Results) -> Table:
    """Accuracy of every method at every budget."""
    columns, times = [], []
    for name, network in results.items():
        for budget in network["budgets"]:
            columns.append(
                (f"{name.replace('resnet', 'ResNet-')}, {budget['share_of_macs']:.0%} of MACs", network, budget)
            )
        half = network["budgets"][0]["seconds_for_64"]
        times.append(f"{name.replace('resnet', 'ResNet-')} {half[BY_LOSSES] / half['original']:.0%}")
    methods = dict.fromkeys(method for _, _, budget in columns for method in budget["rows"])
    rows = [["original", *(f"{network['original']['accuracy']:.2%}" for _, network, _ in columns)]]
    for method in methods:
        cells = [budget["rows"].get(method) for _, _, budget in columns]
        rows.append([method, *("" if cell is None else f"{cell['accuracy']:.2%}" for cell in cells)])
    notes = [f"time of a batch of 64 at the lowest budget, fitted, in % of the original's: {', '.join(times)}"]
    return Table(["", *(title for title, _, _ in columns)], rows, notes)
