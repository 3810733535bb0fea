"""The ways to make a model smaller: what each of them collects, and how it decides."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from pcafast import scores
from pcafast.bases import principal_components
from pcafast.errors import ArgumentError
from pcafast.loop.batches import Batch
from pcafast.loop.calibrate import calibrate
from pcafast.plan import Budget, Plan, plan_low_rank, plan_pruning
from pcafast.plan.removal import Rules
from pcafast.progress import track
from pcafast.statistics import ChannelMoments, Covariance, FeatureMapRank, Statistic, Taylor

_MEANS = "input moments"

Collected = Mapping[str, Mapping[str, Statistic]]
Chosen = Callable[[str, nn.Module], bool]


class Decision(NamedTuple):
    """A plan, and for each layer the numbers that it was decided on: eigenvalues, or a score for each channel."""

    plan: Plan
    figures: dict[str, list[float]]


class Method(ABC):
    """A way to make a model smaller.

    Attributes:
        figures: the section of the report that has the numbers it decides on.
        norm_share: how far batch norms are moved afterwards, ``new_share`` of ``pcafast.reestimate_batch_norm``.
    """

    figures: ClassVar[Literal["spectra", "scores"]]
    norm_share: ClassVar[float]

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that tells it from others, as plain data."""

    @abstractmethod
    def decide(
        self, model: nn.Module, batches: Iterable[Batch], chosen: Chosen | None, budget: Budget, example: Tensor
    ) -> Decision:
        """Collect statistics of a model and plan for a share of its cost, with the chosen layers or all of them."""


class PCA(Method):
    """Low-rank layers from the covariance of their outputs."""

    figures = "spectra"
    norm_share = 0.5  # the errors of low-rank layers should not be raised to the size that the signal had

    @property
    def settings(self) -> dict[str, Any]:
        """Its name."""
        return {"method": "pca"}

    def decide(
        self, model: nn.Module, batches: Iterable[Batch], chosen: Chosen | None, budget: Budget, example: Tensor
    ) -> Decision:
        """Plan from covariances."""
        batches = track(batches, "collecting")
        covariances = calibrate(model, batches, layers=chosen, covariance=Covariance())["covariance"]
        plan = plan_low_rank(model, covariances, budget=budget, example_input=example)
        return Decision(plan, {name: _spectrum(one) for name, one in covariances.items() if not one.is_empty})


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
        self, model: nn.Module, batches: Iterable[Batch], chosen: Chosen | None, budget: Budget, example: Tensor
    ) -> Decision:
        """Plan from scores."""
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
            budget=budget,
            example_input=example,
            **asdict(self.rules),
            means=stats[_MEANS] if self.compensate_means else None,
        )
        return Decision(plan, {name: one.tolist() for name, one in values.items()})


def _spectrum(covariance: Statistic) -> list[float]:
    variances = principal_components(covariance.compute().covariance).variances
    values: list[float] = variances.flatten().sort(descending=True).values.tolist()
    return values


def find_method(method: str | Criterion, rules: Rules, compensate_means: bool) -> Method:
    """The method of that name, or by that criterion.

    Raises:
        ArgumentError: there is none, or it has no such options.
    """
    if method == "pca":
        if rules != Rules():
            raise ArgumentError(
                "scope, min_width and round_to: expected only with pruning, got them with method 'pca'."
            )
        return PCA()
    criterion = CRITERIA.get(method) if isinstance(method, str) else method
    if not isinstance(criterion, Criterion):
        raise ArgumentError(f"method: expected pca, {', '.join(CRITERIA)} or a pcafast.Criterion, got {method!r}.")
    return Pruning(criterion, rules, compensate_means)
