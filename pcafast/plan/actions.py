"""The kinds of things that a plan can ask for, as plain data."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypedDict, get_args

from pcafast.errors import ArgumentError
from pcafast.plan.layers import FactorSide


class Change(TypedDict):
    """A count before and after."""

    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Replace a layer by a first factor with ``rank`` outputs per group and a pointwise second factor.

    Attributes:
        layer: the name of the layer in the model.
        weight_shape: the shape of its weight, by which a model that does not fit is recognised.
        side: whether the kept directions are those of the layer's output or of its input; "both" if the factors go from
            its input to its output, whatever the layer's own weight.
        rank: directions kept, per group; may be lowered by hand, but not raised.
        fuse_into: the layer that takes in the second factor, which then adds no layer of its own.
        kept: the share that the directions hold of what all are worth, such as variance.
        params: parameters of the layer, with those of the layer it is fused into.
        macs: their multiply-adds over the whole example input, where one was given.
    """

    kind: ClassVar[str] = "low_rank"

    layer: str
    weight_shape: list[int]
    side: FactorSide
    rank: int
    fuse_into: str | None
    kept: float
    params: Change
    macs: Change | None

    def __post_init__(self) -> None:
        _expect(self, "layer", "a layer's name", isinstance(self.layer, str))
        _expect(self, "weight_shape", "a list of sizes", _are_sizes(self.weight_shape))
        _expect(self, "side", "'output', 'input' or 'both'", self.side in get_args(FactorSide))
        _expect(self, "rank", "a positive integer", _are_sizes([self.rank]))
        _expect(self, "fuse_into", "a layer's name or null", isinstance(self.fuse_into, str | None))


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Keep only some of the channels of a module.

    Attributes:
        layer: the name of the module, or of a parameter that belongs to no kind of module that pcafast knows.
        weight_shape: the shape of its weight (of a padding, how much it adds to every side), by which a model that does
            not fit is recognised.
        outputs: the output channels to keep, rising; null for all. Of a batch norm and its like, its channels; of a
            padding of channels, the added ones, counted through those before and those after.
        inputs: the input channels to keep, rising; null for all, and for what has only outputs.
        dim: the dimension of a bare parameter that holds the channels.
        means_into: what takes in the mean that the removed inputs added to each output: the layer itself for its bias,
            which it gets if it has none, or the batch norm that follows, for its running mean; null for nothing.
        params: its parameters.
        macs: its multiply-adds over the whole example input, if it is a linear layer or a convolution.
    """

    kind: ClassVar[str] = "prune"

    layer: str
    weight_shape: list[int]
    outputs: list[int] | None
    inputs: list[int] | None
    dim: int = 0
    means_into: str | None = None
    params: Change
    macs: Change | None

    def __post_init__(self) -> None:
        _expect(self, "layer", "a layer's name", isinstance(self.layer, str))
        sizes = isinstance(self.weight_shape, list) and all(type(size) is int for size in self.weight_shape)
        _expect(self, "weight_shape", "a list of sizes", sizes)
        for side in ("outputs", "inputs"):
            rising = "channels in rising order, or null"
            _expect(self, side, rising, getattr(self, side) is None or _are_rising(getattr(self, side)))
        _expect(self, "dim", "the number of a dimension", type(self.dim) is int and self.dim >= 0)
        _expect(self, "means_into", "a layer's name or null", isinstance(self.means_into, str | None))


Action = LowRank | Prune

KINDS: dict[str, type[LowRank] | type[Prune]] = {LowRank.kind: LowRank, Prune.kind: Prune}


def _expect(action: Action, field: str, expected: str, holds: bool) -> None:
    if not holds:
        raise ArgumentError(
            f"{field} of the {action.kind} action on {action.layer!r}: expected {expected}, "
            f"got {getattr(action, field)!r}."
        )


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value > 0 for value in values)


def _are_rising(values: Any) -> bool:
    whole = isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
    return whole and all(a < b for a, b in pairwise(values))
