"""What a way to make a model smaller is, and what it is asked for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from pcafast.bases import Basis
from pcafast.loop.batches import Batch
from pcafast.plan import Budget, Plan
from pcafast.plan.layers import channels, groups, is_factorisable
from pcafast.plan.rank_rules import nearest_rank
from pcafast.statistics import Statistic

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
