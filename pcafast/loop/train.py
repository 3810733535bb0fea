"""The built-in trainer: enough to train a small network, and to retrain a compressed one."""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from pcafast.errors import ArgumentError, PcafastError
from pcafast.loop.batches import Batch, class_scores
from pcafast.modes import device_of, evaluating


class DivergenceError(PcafastError):
    """The loss is no longer finite."""


WARM_UP = 0.1
"""The share of all steps in which the learning rate rises."""


class Trainer:
    """SGD with Nesterov momentum 0.9 on the cross-entropy; the learning rate rises linearly, then falls as a cosine.

    On CUDA the forward runs in bfloat16 where autocast finds that safe; the weights stay as they are.

    Args:
        model: trained in place.
        steps: how many batches there are going to be, over all epochs.
        learning_rate: the highest.
        weight_decay: of weights; biases and the scales of norms, all of one dimension, have none.
        label_smoothing: in [0, 1), the share of each label that is spread over all classes.

    Raises:
        ArgumentError: there are no steps, no parameter to train, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        learning_rate: float = 0.1,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.0,
    ) -> None:
        check_settings(learning_rate, weight_decay, label_smoothing)
        if steps < 1:
            raise ArgumentError(f"steps: expected at least one batch to train on, got {steps}")
        self._trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        if not self._trained:
            raise ArgumentError("model: expected parameters to train, but none requires a gradient")
        self._model, self._steps, self._done = model, steps, 0
        self._learning_rate, self._label_smoothing = learning_rate, label_smoothing
        flat = [one for one in self._trained.values() if one.ndim <= 1]
        others = [one for one in self._trained.values() if one.ndim > 1]
        groups = [{"params": others, "weight_decay": weight_decay}, {"params": flat, "weight_decay": 0.0}]
        self._optimizer = SGD(groups, learning_rate, momentum=0.9, nesterov=True)

    def epoch(self, batches: Iterable[Batch]) -> float:
        """Train on each batch once and return the mean loss; the model's modes are as before afterwards.

        Raises:
            ArgumentError: there is no batch, or a label has no class score.
            PcafastError: the model does not take such batches.
            DivergenceError: the loss is no longer finite.
        """
        loss_sum, count = 0.0, 0
        with evaluating(self._model):  # for the modes afterwards
            self._model.train()
            for inputs, labels in batches:
                loss_sum, count = loss_sum + self._step(inputs, labels), count + 1
        if count == 0:
            raise ArgumentError("batches: expected at least one batch to train on, got none")
        return loss_sum / count

    def _step(self, inputs: Tensor, labels: Tensor) -> float:
        on_cuda = device_of(self._model).type == "cuda"
        with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
            scores, labels = class_scores(self._model, inputs, labels)
            loss = F.cross_entropy(scores, labels, label_smoothing=self._label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise DivergenceError(
                f"The training loss became {value} after {self._done} steps at a learning rate of up to "
                f"{self._learning_rate:g}. Train with a lower learning rate."
            )
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate * _share(self._done, self._steps)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._done += 1
        return value

    def state_dict(self) -> dict[str, Tensor]:
        """What training can go on from, with the model's own state: the steps done, and each parameter's momentum."""
        state = {"steps": torch.tensor(self._done)}
        for name, parameter in self._trained.items():
            momentum = self._optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                state[f"momentum.{name}"] = momentum
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` returned for the same model."""
        self._done = int(state["steps"])
        for name, parameter in self._trained.items():
            if f"momentum.{name}" in state:
                momentum = torch.empty_like(parameter).copy_(state[f"momentum.{name}"])
                self._optimizer.state[parameter]["momentum_buffer"] = momentum


def check_settings(learning_rate: float, weight_decay: float, label_smoothing: float) -> None:
    """See that the trainer's numbers are in range.

    Raises:
        ArgumentError: one is not.
    """
    if not 0 < learning_rate < math.inf:
        raise ArgumentError(f"learning_rate: expected a positive number, got {learning_rate!r}.")
    if not 0 <= weight_decay < math.inf:
        raise ArgumentError(f"weight_decay: expected a number from 0 on, got {weight_decay!r}.")
    if not 0 <= label_smoothing < 1:
        raise ArgumentError(f"label_smoothing: expected a share in [0, 1), got {label_smoothing!r}.")


def _share(step: int, steps: int) -> float:
    """The learning rate of a step, as a share of the highest."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising + 1) / (steps - rising + 1))))
