"""What a compressed model may cost."""

from dataclasses import dataclass
from typing import Literal, get_args

from pcafast.errors import ArgumentError

Quantity = Literal["macs", "params", "channels"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A share, in (0, 1], that is never exceeded. Exactly one is given.

    Attributes:
        macs: of the whole model's multiply-adds.
        params: of the whole model's parameters.
        channels: of the output channels of all layers that have scores; for pruning only.
    """

    macs: float | None = None
    params: float | None = None
    channels: float | None = None

    def __post_init__(self) -> None:
        if len(self._given()) != 1:
            raise ArgumentError(f"budget: expected exactly one of {', '.join(get_args(Quantity))}, got {self!r}.")
        if not isinstance(self.share, int | float):
            raise ArgumentError(f"budget: expected a number for {self.quantity}, got {self.share!r}.")
        if not 0 < self.share <= 1:
            raise ArgumentError(f"budget: expected a share in (0, 1] of the model's {self.quantity}, got {self}.")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """A budget from its text form, such as ``macs=0.5``."""
        quantity, _, share = text.partition("=")
        if quantity not in get_args(Quantity):
            kinds = " or ".join(f"{kind}=SHARE" for kind in get_args(Quantity))
            raise ArgumentError(f"budget: expected {kinds}, such as macs=0.5, got {text!r}.")
        try:
            return cls(**{quantity: float(share)})
        except ValueError as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError(f"budget: expected a number after {quantity}=, got {text!r}.") from error

    @property
    def quantity(self) -> Quantity:
        """What is counted."""
        return next(iter(self._given()))

    @property
    def share(self) -> float:
        """The largest allowed share."""
        return next(iter(self._given().values()))

    def _given(self) -> dict[Quantity, float]:
        shares: dict[Quantity, float | None] = {"macs": self.macs, "params": self.params, "channels": self.channels}
        return {quantity: share for quantity, share in shares.items() if share is not None}

    def __str__(self) -> str:
        return f"{self.quantity}={self.share:g}"

    def allowance(self, whole: int) -> int:
        """The largest count whose share of ``whole`` is within the budget."""
        count = round(self.share * whole)
        while count / whole > self.share:
            count -= 1
        return count
