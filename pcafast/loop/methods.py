"""The ways to make a model smaller: what each of them collects, and how it decides."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from pcafast import bases, scores
from pcafast.bases import Basis
from pcafast.errors import ArgumentError
from pcafast.loop.batches import Batch
from pcafast.loop.calibrate import calibrate
from pcafast.loop.refit import refit
from pcafast.plan import Budget, Plan, plan_low_rank, plan_pruning
from pcafast.plan.document import fingerprint
from pcafast.plan.layers import channels, groups, is_factorisable
from pcafast.plan.rank_rules import Losses, nearest_rank
from pcafast.plan.removal import Rules
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

_MEANS = "input moments"

Collected = Mapping[str, Mapping[str, Statistic]]
Chosen = Callable[[str, nn.Module], bool]


class Decision(NamedTuple):
    """A plan, and for each layer the numbers that it was decided on: eigenvalues, or a score for each channel."""

    plan: Plan
    figures: dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """A share of the outputs that every layer, or the layer of which it is a factor, has in the original."""

    share: float
    original: nn.Module

    def ranks(self, statistics: Mapping[str, Statistic | Basis]) -> dict[str, int]:
        """Of every layer that there are statistics of, by its name."""
        modules = dict(self.original.named_modules())
        ranks = {}
        for name, statistic in statistics.items():
            layer = modules.get(name, modules.get(name.rpartition(".")[0]))
            if layer is not None and is_factorisable(layer):
                outputs = channels(layer, "output")
                # Of patches, no more directions than outputs ever count.
                full = outputs if statistic.side == "output" else min(outputs, channels(layer, "input"))
                ranks[name] = nearest_rank(self.share, full // groups(layer))
        return ranks


Target = Budget | Ratio


class Method(ABC):
    """A way to make a model smaller.

    Attributes:
        figures: the section of the report that has the numbers it decides on.
    """

    figures: ClassVar[Literal["spectra", "scores"]]

    @property
    @abstractmethod
    def norm_share(self) -> float:
        """How far batch norms are moved afterwards: ``new_share`` of ``pcafast.reestimate_batch_norm``; 0 for not."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that tells it from others, as plain data."""

    @abstractmethod
    def decide(
        self, model: nn.Module, batches: Iterable[Batch], chosen: Chosen | None, target: Target, example: Tensor
    ) -> Decision:
        """Collect statistics of a model and plan for a share of its cost, with the chosen layers or all of them."""

    def fitted(self, plan: Plan, model: nn.Module, batches: Iterable[Batch]) -> Plan:
        """The plan with what takes long to compute."""
        return plan


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


def _collected(model: nn.Module, batches: Iterable[Batch], layers: Chosen | None, **statistics: Statistic) -> Collected:
    return calibrate(model, track(batches, "collecting"), layers=layers, **statistics)


def _pca(model: nn.Module, batches: Iterable[Batch], layers: Chosen | None) -> Mapping[str, Statistic]:
    return _collected(model, batches, layers, covariance=Covariance())["covariance"]


def _pca_input(model: nn.Module, batches: Iterable[Batch], layers: Chosen | None) -> Mapping[str, Statistic]:
    return _collected(model, batches, layers, patches=PatchCovariance())["patches"]


def _uncentred(model: nn.Module, batches: Iterable[Batch], layers: Chosen | None) -> Mapping[str, Basis]:
    found = _collected(model, batches, layers, covariance=Covariance())["covariance"]
    return {layer: bases.uncentred(one) for layer, one in found.items() if one.has_data}  # type: ignore[arg-type]


def _fisher(model: nn.Module, batches: Iterable[Batch], layers: Chosen | None) -> Mapping[str, Basis]:
    statistics = {"covariance": Covariance(), "gradient": GradientCovariance()}
    stats = _collected(model, batches, layers, **statistics)
    return {
        layer: bases.fisher(one, stats["gradient"][layer])  # type: ignore[arg-type]
        for layer, one in stats["covariance"].items()
        if one.has_data and stats["gradient"][layer].has_data
    }


def _gradient(
    select: bases.Select, model: nn.Module, batches: Iterable[Batch], layers: Chosen | None
) -> Mapping[str, Basis]:
    found = _collected(model, batches, layers, matrix=ActivationGradient())["matrix"]
    return {layer: bases.gradient(one, select=select) for layer, one in found.items() if one.has_data}  # type: ignore[arg-type]


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


@dataclass(frozen=True)
class Criterion:
    """A rule that says how much each channel matters.

    Attributes:
        name: what reports call it.
        scores: from the model and the collected statistics, ``stats[name][layer]``, to scores (C,) of the output
            channels of each layer that may be pruned; the higher, the more a channel matters.
        statistics: what to collect, by name.
    """

    name: str
    scores: Callable[[nn.Module, Collected], Mapping[str, Tensor]]
    statistics: Mapping[str, Statistic] = field(default_factory=dict)


CRITERIA = {
    one.name: one
    for one in (
        Criterion("taylor", lambda _, stats: scores.taylor(stats["taylor"]), {"taylor": Taylor(tap="activation")}),
        # Of unit length like Taylor scores: one rule removes channels from all layers, and these scores have no common
        # scale. Measured, that is better for both.
        Criterion("rank", lambda _, stats: scores.normalised(scores.rank(stats["rank"])), {"rank": FeatureMapRank()}),
        Criterion("l1", lambda model, _: scores.normalised(scores.filter_norm(model, p=1))),
    )
}


@dataclass(frozen=True)
class Pruning(Method):
    """Removal of the channels that matter least.

    Attributes:
        compensate_means: whether what the removed channels added on average goes into what follows them.
    """

    figures = "scores"
    norm_share = 1.0  # the signal that is left is exact

    criterion: Criterion
    rules: Rules
    compensate_means: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The name of the criterion, and the options."""
        return {"method": self.criterion.name, **asdict(self.rules), "compensate_means": self.compensate_means}

    def decide(
        self, model: nn.Module, batches: Iterable[Batch], chosen: Chosen | None, target: Target, example: Tensor
    ) -> Decision:
        """Plan from scores."""
        assert isinstance(target, Budget), "find_method refuses the other"
        # Of all layers, since those after a chosen one take in the means.
        moments = {_MEANS: ChannelMoments(side="input")} if self.compensate_means else {}
        statistics = {**self.criterion.statistics, **moments}
        stats: Collected = {}
        if statistics:
            stats = calibrate(model, track(batches, "collecting"), layers=None, **statistics)
        values = self.criterion.scores(model, stats)
        if chosen is not None:
            values = {name: one for name, one in values.items() if chosen(name, model.get_submodule(name))}
        plan = plan_pruning(
            model,
            values,
            budget=target,
            example_input=example,
            **asdict(self.rules),
            means=stats[_MEANS] if self.compensate_means else None,
        )
        return Decision(plan, {name: one.tolist() for name, one in values.items()})


def _spectrum(source: Statistic | Basis) -> list[float]:
    """Eigenvalues of a covariance; of another basis, what its directions are worth."""
    if isinstance(source, Basis):
        worth: list[float] = (-source.left_out.diff()).tolist()
        return worth
    variances = bases.principal_components(source.compute().covariance).variances
    values: list[float] = variances.flatten().sort(descending=True).values.tolist()
    return values


def find_method(
    method: str | Criterion | Directions,
    rules: Rules,
    *,
    compensate_means: bool,
    refit: bool,
    by_ratio: bool,
    losses: Losses | None,
) -> Method:
    """The method of that name, or by that criterion or rule.

    Raises:
        ArgumentError: there is none, or it has no such options.
    """
    found = {**CRITERIA, **DIRECTIONS}.get(method) if isinstance(method, str) else method
    if isinstance(found, Directions):
        if rules != Rules() or compensate_means:
            raise ArgumentError(
                "compensate_means, scope, min_width and round_to: expected only with pruning, got them with method "
                f"{found.name!r}."
            )
        if losses is not None and by_ratio:
            raise ArgumentError("losses: expected only with a budget, within which they choose the ranks, got a ratio.")
        plain = isinstance(losses, Mapping) and all(
            isinstance(of, Mapping) and all(isinstance(loss, int | float) for loss in of.values())
            for of in losses.values()
        )
        if losses is not None and not plain:
            raise ArgumentError(
                f"losses: expected {{layer: {{rank: loss}}}}, as of pcafast.rank_losses, got {losses!r}."
            )
        return Factorisation(found, refit, losses)
    if not isinstance(found, Criterion):
        raise ArgumentError(
            f"method: expected one of {', '.join([*DIRECTIONS, *CRITERIA])}, a pcafast.Criterion or "
            f"pcafast.Directions, got {method!r}."
        )
    if refit or by_ratio or losses is not None:
        raise ArgumentError(
            f"refit, ratio and losses: expected only with low-rank layers, got them with method {found.name!r}."
        )
    return Pruning(found, rules, compensate_means)
