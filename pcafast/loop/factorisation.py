"""Low-rank layers as a way to make a model smaller: the rules for their directions, and what is done with them."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from pcafast import bases
from pcafast.bases import Basis
from pcafast.loop.batches import Batch
from pcafast.loop.calibrate import calibrate
from pcafast.loop.method import Chosen, Collected, Decision, Method, Target
from pcafast.loop.refit import refit
from pcafast.plan import Budget, Plan, plan_low_rank
from pcafast.plan.document import fingerprint
from pcafast.plan.rank_rules import Losses
from pcafast.progress import track
from pcafast.statistics import ActivationGradient, Covariance, GradientCovariance, PatchCovariance, Statistic

Kind = TypeVar("Kind", bound=Statistic)


@dataclass(frozen=True)
class Directions:
    """A rule that says which directions of a layer to keep.

    Attributes:
        name: what reports call it.
        bases: from the model, batches to collect statistics on, and the layers in question (None for all), to what
            ``plan_low_rank`` takes for each layer.
    """

    name: str
    bases: Callable[[nn.Module, Iterable[Batch], Chosen | None], Mapping[str, Statistic | Basis]]


def _pca(model: nn.Module, batches: Iterable[Batch], layers: Chosen | None) -> Mapping[str, Statistic]:
    return _collected(model, batches, layers, covariance=Covariance())["covariance"]


def _pca_input(model: nn.Module, batches: Iterable[Batch], layers: Chosen | None) -> Mapping[str, Statistic]:
    return _collected(model, batches, layers, patches=PatchCovariance())["patches"]


def _uncentred(model: nn.Module, batches: Iterable[Batch], layers: Chosen | None) -> Mapping[str, Basis]:
    found = _collected(model, batches, layers, covariance=Covariance())["covariance"]
    return {layer: bases.uncentred(one) for layer, one in _with_data(found, Covariance).items()}


def _fisher(model: nn.Module, batches: Iterable[Batch], layers: Chosen | None) -> Mapping[str, Basis]:
    stats = _collected(model, batches, layers, covariance=Covariance(), gradient=GradientCovariance())
    covariances = _with_data(stats["covariance"], Covariance)
    gradients = _with_data(stats["gradient"], GradientCovariance)
    return {layer: bases.fisher(one, gradients[layer]) for layer, one in covariances.items() if layer in gradients}


def _gradient(
    select: bases.Select, model: nn.Module, batches: Iterable[Batch], layers: Chosen | None
) -> Mapping[str, Basis]:
    found = _collected(model, batches, layers, matrix=ActivationGradient())["matrix"]
    matrices = _with_data(found, ActivationGradient)
    return {layer: bases.gradient(one, select=select) for layer, one in matrices.items()}


def _collected(model: nn.Module, batches: Iterable[Batch], layers: Chosen | None, **statistics: Statistic) -> Collected:
    return calibrate(model, track(batches, "collecting"), layers=layers, **statistics)


def _with_data(statistics: Mapping[str, Statistic], kind: type[Kind]) -> dict[str, Kind]:
    """Those of the kind that have seen any, by layer."""
    return {layer: one for layer, one in statistics.items() if isinstance(one, kind) and one.has_data}


DIRECTIONS = {
    one.name: one
    for one in (
        Directions("pca", _pca),
        Directions("pca-input", _pca_input),
        Directions("uncentred", _uncentred),
        Directions("fisher", _fisher),
        Directions("gradient", partial(_gradient, "magnitude")),
        Directions("greedy", partial(_gradient, "signed")),
    )
}


@dataclass(frozen=True)
class Factorisation(Method):
    """Low-rank layers.

    Attributes:
        refit: whether the factors are fitted front to back.
        losses: what each layer's rank costs, to choose ranks by; None for the shares that the directions are worth.
    """

    figures = "spectra"

    directions: Directions
    refit: bool
    losses: Losses | None

    @property
    def norm_share(self) -> float:
        """Halfway, since the errors of low-rank layers should not be raised to the size that the signal had."""
        return 0.0 if self.refit else 0.5

    @property
    def settings(self) -> dict[str, Any]:
        """The name of the rule, whether factors are fitted, and which losses choose the ranks."""
        known = None if self.losses is None else f"measured, {fingerprint(json.dumps(self.losses).encode())[:12]}"
        return {"method": self.directions.name, "refit": self.refit, "losses": known}

    def decide(
        self, model: nn.Module, batches: Iterable[Batch], chosen: Chosen | None, target: Target, example: Tensor
    ) -> Decision:
        """Plan from bases."""
        found = self.directions.bases(model, batches, chosen)
        if isinstance(target, Budget):
            plan = plan_low_rank(model, found, budget=target, losses=self.losses, example_input=example)
        else:
            plan = plan_low_rank(model, found, ranks=target.ranks(found), example_input=example)
        figures = {name: _spectrum(one) for name, one in found.items() if isinstance(one, Basis) or one.has_data}
        return Decision(plan, figures)

    def fitted(self, plan: Plan, model: nn.Module, batches: Iterable[Batch]) -> Plan:
        """Fit the factors, if they are to be."""
        return refit(model, plan, batches) if self.refit and plan.actions else plan


def _spectrum(source: Statistic | Basis) -> list[float]:
    """Eigenvalues of a covariance; of another basis, what its directions are worth."""
    if isinstance(source, Basis):
        worth: list[float] = (-source.left_out.diff()).tolist()
        return worth
    variances = bases.principal_components(source.compute().covariance).variances
    values: list[float] = variances.flatten().sort(descending=True).values.tolist()
    return values
