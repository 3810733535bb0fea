"""What a run is asked to do, checked."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pcafast.errors import ArgumentError
from pcafast.loop.batches import Batch
from pcafast.loop.checkpoint import fingerprint, state_of
from pcafast.loop.evaluate import Evaluation
from pcafast.loop.method import Method, Target
from pcafast.loop.train import Trainer, check_settings

Train = Callable[[nn.Module, int], object]
Evaluate = Callable[[nn.Module], Evaluation | float]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The arguments of ``pcafast.compress``, the same from a run's beginning to its end.

    Attributes:
        calibration: those of train where none were given.
        layers: the names of the layers to compress; None for all.

    Raises:
        ArgumentError: one is wrong.
    """

    model: nn.Module
    method: Method
    target: Target
    test: Iterable[Batch] | Evaluate
    train: Iterable[Batch] | Train | None
    calibration: Iterable[Batch]
    layers: tuple[str, ...] | None
    steps: int
    retrain_epochs: int
    reestimate_batch_norm: bool
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.target, Target):
            raise ArgumentError(f"budget: expected a pcafast.Budget such as Budget(macs=0.5), got {self.target!r}.")
        for name, least in (("steps", 1), ("retrain_epochs", 0), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ArgumentError(f"{name}: expected a whole number from {least} on, got {value!r}.")
        if self.steps > 1 and getattr(self.method, "losses", None) is not None:
            raise ArgumentError(
                f"losses: expected steps=1 with them, since they are of the original, got {self.steps}."
            )
        check_settings(self.learning_rate, self.weight_decay, self.label_smoothing)
        self._check_batches()

    def _check_batches(self) -> None:
        if self.retrain_epochs and self.train is None:
            raise ArgumentError(
                f"train: expected batches, or a function, for retrain_epochs={self.retrain_epochs}, got None."
            )
        if self.calibration is None or callable(self.calibration):
            raise ArgumentError(
                "calibration: expected batches to collect statistics on, since train is "
                f"{'a function' if callable(self.train) else 'not given'}, got {self.calibration!r}."
            )
        for name in ("train", "test", "calibration"):
            value = getattr(self, name)
            if callable(value) or (name == "train" and value is None):
                continue
            if not isinstance(value, Iterable) or isinstance(value, Iterator):
                raise ArgumentError(
                    f"{name}: expected batches of inputs and labels that can be gone through many times, such as a "
                    f"DataLoader or a list, got a {type(value).__name__}."
                )
        if self.retrain_epochs and not callable(self.train) and not hasattr(self.train, "__len__"):
            raise ArgumentError(
                "train: expected batches whose number is known, for the schedule of the learning rate; a "
                f"{type(self.train).__name__} has no len(). A function for train can do without."
            )

    @property
    def loaders(self) -> tuple[object, ...]:
        """All that yields batches."""
        return tuple(one for one in (self.train, self.test, self.calibration) if not callable(one))

    @property
    def reestimates(self) -> bool:
        """Whether there are batch norms to re-estimate."""
        norms = (one for one in self.model.modules() if isinstance(one, _BatchNorm) and one.track_running_stats)
        return self.reestimate_batch_norm and self.method.norm_share > 0 and any(norms)

    @property
    def asked_share(self) -> dict[str, float]:
        """The share to keep, by what it is a share of."""
        return {getattr(self.target, "quantity", "ranks"): self.target.share}

    def new_trainer(self, model: nn.Module) -> Trainer:
        """The built-in trainer of one step."""
        return Trainer(
            model,
            self.retrain_epochs * len(self.train),  # type: ignore[arg-type]  # checked above
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
        )

    def asked(self) -> dict[str, Any]:
        """All that decides the result, as far as it can be told, as plain data."""
        plain = ("steps", "retrain_epochs", "reestimate_batch_norm", "seed")
        trainer = ("learning_rate", "weight_decay", "label_smoothing")
        built_in = self.retrain_epochs > 0 and not callable(self.train)
        return {
            **self.method.settings,
            "budget": self.asked_share,
            "layers": None if self.layers is None else list(self.layers),
            **{name: getattr(self, name) for name in (*plain, *(trainer if built_in else ()))},
            **{name: _described(getattr(self, name)) for name in ("train", "test", "calibration")},
            "original_sha256": fingerprint(state_of(self.model)),
        }


def _described(source: object) -> str | None:
    if source is None:
        return None
    if callable(source):
        return f"function {getattr(source, '__module__', '')}.{getattr(source, '__qualname__', type(source).__name__)}"
    return f"{len(source)} batches" if hasattr(source, "__len__") else "batches"


def plain(name: str, value: Any) -> Any:
    """The value as it comes back from JSON.

    Raises:
        ArgumentError: JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: expected what JSON can hold ({error}).") from error
