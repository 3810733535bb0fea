"""Mean, variance, mean absolute value and share of zeros of channels, streamed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pcafast.functional import channel_count
from pcafast.native import operators
from pcafast.statistics.centred import combine_centred
from pcafast.statistics.statistic import Side, State, Statistic, Total


class Moments(NamedTuple):
    """Per channel (C,), float64."""

    mean: Tensor
    variance: Tensor
    mean_absolute: Tensor
    zero_share: Tensor


@dataclasses.dataclass(kw_only=True)
class ChannelMoments(Statistic):
    """Mean, variance (divided by the count), mean absolute value and share of zeros of every channel.

    Attributes:
        side: whether ``collect`` gives it the layer's output or its input, for which there is only one tap.
    """

    states: ClassVar[dict[str, State]] = {
        "count": State(),
        "mean": State(("channels",)),
        "centred_squares": State(("channels",)),
        "absolute": State(("channels",)),
        "zeros": State(("channels",)),
        "skipped": State(dtype=torch.int64),
    }

    side: Side = "output"

    def update(self, x: Tensor) -> None:
        """Take in one batch of activations (N, C, *)."""
        state = self._ready(x.device, {"channels": channel_count(x, self.channel_dim)})
        with self._noticing_nonfinite():
            operators.channel_moments_update_(x, self.channel_dim, *(state[name] for name in self.states))

    def compute(self) -> Moments:
        """The moments of all that was seen."""
        self._require_data()
        state, count = self._state, self._state["count"]
        return Moments(
            state["mean"].clone(),
            state["centred_squares"] / count,
            state["absolute"] / count,
            state["zeros"] / count,
        )

    def _has_data(self) -> bool:
        return bool(self._state["count"] > 0)

    def _combined(self, parts: Sequence[Mapping[str, Tensor]], total: Total) -> dict[str, Tensor]:
        additive = {name: total([part[name] for part in parts]) for name in ("absolute", "zeros", "skipped")}
        return {**combine_centred(parts, total, "centred_squares", torch.square), **additive}
