"""What a compressed model may cost."""

from dataclasses import dataclass
from typing import Literal

from pcafast.errors import ArgumentError

Quantity = Literal["macs", "params"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A share of the whole model's MACs or parameters, in (0, 1], that is never exceeded. Exactly one is given."""

    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        if (self.macs is None) == (self.params is None):
            raise ArgumentError(f"budget: expected exactly one of macs and params, got {self!r}.")
        if not isinstance(self.share, int | float):
            raise ArgumentError(f"budget: expected a number for {self.quantity}, got {self.share!r}.")
        if not 0 < self.share <= 1:
            raise ArgumentError(f"budget: expected a share in (0, 1] of the model's {self.quantity}, got {self}.")

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """A budget from its text form, such as ``macs=0.5``."""
        quantity, _, share = text.partition("=")
        if quantity not in ("macs", "params"):
            raise ArgumentError(f"budget: expected macs=SHARE or params=SHARE, such as macs=0.5, got {text!r}.")
        try:
            return cls(**{quantity: float(share)})
        except ValueError as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError(f"budget: expected a number after {quantity}=, got {text!r}.") from error

    @property
    def quantity(self) -> Quantity:
        """What is counted."""
        return "params" if self.macs is None else "macs"

    @property
    def share(self) -> float:
        """The largest allowed share."""
        return next(share for share in (self.macs, self.params) if share is not None)

    def __str__(self) -> str:
        return f"{self.quantity}={self.share:g}"

    def allowance(self, whole: int) -> int:
        """The largest count whose share of ``whole`` is within the budget."""
        count = round(self.share * whole)
        while count / whole > self.share:
            count -= 1
        return count
