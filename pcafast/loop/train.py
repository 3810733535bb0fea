"""The built-in trainer: enough to train a small network, and to retrain a compressed one."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from pcafast.errors import ArgumentError
from pcafast.loop.batches import Batch, class_scores


class Trainer:
    """SGD with Nesterov momentum on the cross-entropy; the learning rate rises for a third of the way, then falls.

    Args:
        model: trained in place.
        steps: how many batches there are going to be, over all epochs.
        learning_rate: the highest.
        weight_decay: of all parameters.

    Raises:
        ArgumentError: there are no steps.
    """

    def __init__(self, model: nn.Module, steps: int, *, learning_rate: float = 0.1, weight_decay: float = 5e-4) -> None:
        if steps < 1:
            raise ArgumentError(f"steps: expected at least one batch to train on, got {steps}")
        self._model = model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = SGD(trained, learning_rate, momentum=0.9, nesterov=True, weight_decay=weight_decay)
        self._schedule = OneCycleLR(self._optimizer, learning_rate, total_steps=steps)

    def epoch(self, batches: Iterable[Batch]) -> float:
        """Train on each batch once and return the mean loss.

        Raises:
            ArgumentError: a label has no class score.
            PcafastError: the model does not take such batches.
        """
        self._model.train()
        loss_sum, count = 0.0, 0
        for inputs, labels in batches:
            scores, labels = class_scores(self._model, inputs, labels)
            loss = F.cross_entropy(scores, labels)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._schedule.step()
            loss_sum, count = loss_sum + loss.item(), count + 1
        return loss_sum / max(count, 1)
