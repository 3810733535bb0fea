"""One pass over calibration data, collecting statistics."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from pcafast.collect import Collection, collect
from pcafast.collect.layers import LayerChoice
from pcafast.errors import ArgumentError
from pcafast.loop.batches import Batch, class_scores
from pcafast.modes import evaluating
from pcafast.statistics import Statistic

LABEL_SMOOTHING = 0.1
"""Of images that a trained network is certain of, as of most that it was trained on, the plain cross-entropy has almost
no gradient, and Taylor scores would come from a few odd ones."""


def calibrate(
    model: nn.Module, batches: Iterable[Batch], *, layers: LayerChoice | None = None, **statistics: Statistic
) -> Collection:
    """Collect statistics of a classifier over labelled images, in evaluation mode.

    There is a backward pass, of the cross-entropy with a little label smoothing, only if a statistic needs one; the
    gradients of the parameters stay as they are. Arguments are those of ``pcafast.collect``.

    Raises:
        ArgumentError: there is no batch, or a label has no class score.
        PcafastError: the model does not take such batches.
    """
    needs_gradient = any(statistic.needs_gradient for statistic in statistics.values())
    if needs_gradient and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ArgumentError("model: no parameter requires a gradient, so there is no backward pass to take it from")
    seen = False
    stats = collect(model, layers=layers, **statistics)
    with evaluating(model), _gradients_kept(model), torch.set_grad_enabled(needs_gradient), stats:
        for inputs, labels in batches:
            scores, labels = class_scores(model, inputs, labels)
            if needs_gradient:
                F.cross_entropy(scores, labels, label_smoothing=LABEL_SMOOTHING).backward()
            seen = True
    if not seen:
        raise ArgumentError("batches: expected at least one batch to collect statistics on, got none")
    return stats


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
