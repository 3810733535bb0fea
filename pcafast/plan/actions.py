"""The kinds of things that a plan can ask for, as plain data."""

from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

from pcafast.errors import ArgumentError
from pcafast.plan.layers import Side


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
        side: whether the kept directions are those of the layer's output or of its input.
        rank: directions kept, per group; may be lowered by hand, but not raised.
        fuse_into: the layer that takes in the second factor, which then adds no layer of its own.
        kept: the share of the variance that the directions hold.
        params: parameters of the layer, with those of the layer it is fused into.
        macs: their multiply-adds over the whole example input, where one was given.
    """

    kind: ClassVar[str] = "low_rank"

    layer: str
    weight_shape: list[int]
    side: Side
    rank: int
    fuse_into: str | None
    kept: float
    params: Change
    macs: Change | None

    def __post_init__(self) -> None:
        self._expect("layer", "a layer's name", isinstance(self.layer, str))
        self._expect("weight_shape", "a list of sizes", _are_sizes(self.weight_shape))
        self._expect("side", "'output' or 'input'", self.side in ("output", "input"))
        self._expect("rank", "a positive integer", _are_sizes([self.rank]))
        self._expect("fuse_into", "a layer's name or null", isinstance(self.fuse_into, str | None))

    def _expect(self, field: str, expected: str, holds: bool) -> None:
        if not holds:
            raise ArgumentError(
                f"{field} of the {self.kind} action on {self.layer!r}: expected {expected}, "
                f"got {getattr(self, field)!r}."
            )


Action = LowRank

KINDS: dict[str, type[Action]] = {LowRank.kind: LowRank}


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value > 0 for value in values)
