"""Accuracy of a classifier."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pcafast.errors import ArgumentError
from pcafast.loop.batches import Batch, class_scores
from pcafast.modes import evaluating


class Evaluation(NamedTuple):
    """How a classifier did on a number of images; the loss is the mean cross-entropy."""

    correct: int
    images: int
    loss: float

    @property
    def accuracy(self) -> float:
        """The share of images whose label has the highest score."""
        return self.correct / self.images


def evaluate(model: nn.Module, batches: Iterable[Batch]) -> Evaluation:
    """Run the model over labelled images, in evaluation mode; its modes are as before afterwards.

    Raises:
        ArgumentError: there is no batch, or a label has no class score.
        PcafastError: the model does not take such batches.
    """
    correct, images, loss = 0, 0, 0.0
    with evaluating(model), torch.inference_mode():
        for inputs, labels in batches:
            scores, labels = class_scores(model, inputs, labels)
            correct += int((scores.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(scores.float(), labels, reduction="sum"))
            images += len(labels)
    if images == 0:
        raise ArgumentError("batches: expected at least one batch to evaluate on, got none")
    return Evaluation(correct, images, loss / images)
