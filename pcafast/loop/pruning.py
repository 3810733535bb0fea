"""Removal of channels as a way to make a model smaller: the criteria, and what is done with their scores."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from pcafast import scores
from pcafast.loop.batches import Batch
from pcafast.loop.calibrate import calibrate
from pcafast.loop.method import Chosen, Collected, Decision, Method, Target
from pcafast.plan import Budget, plan_pruning
from pcafast.plan.removal import Rules
from pcafast.progress import track
from pcafast.statistics import ChannelMoments, FeatureMapRank, Statistic, Taylor

_MEANS = "input moments"


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
