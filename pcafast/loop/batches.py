"""Batches, labelled or not, and one of them through a model, with what can be wrong said clearly."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pcafast.errors import ArgumentError, PcafastError
from pcafast.modes import device_of

Batch = tuple[Tensor, Tensor]
Batches = Iterable[Tensor | Sequence[Tensor]]
"""Inputs, or sequences that start with the inputs."""


def model_inputs(model: nn.Module, batches: Batches) -> Iterator[Tensor]:
    """The inputs of each batch that has any, on the model's device.

    Raises:
        ArgumentError: a batch is neither a tensor nor a sequence that starts with one.
    """
    device = device_of(model)
    for batch in batches:
        inputs = batch[0] if isinstance(batch, Sequence) and batch else batch
        if not isinstance(inputs, Tensor):
            raise ArgumentError(f"batches: expected tensors, or sequences that start with one, got {type(batch)}")
        if len(inputs):
            yield inputs.to(device, non_blocking=True)


def require_many_passes(batches: Batches) -> None:
    """See that the batches can be gone through again.

    Raises:
        ArgumentError: they cannot.
    """
    if isinstance(batches, Iterator):
        raise ArgumentError(
            "batches: expected some that can be gone through many times, such as a DataLoader or a list, got a "
            f"{type(batches).__name__}"
        )


def class_scores(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The model's scores (N, classes) for a batch, and the labels, on the model's device.

    Raises:
        PcafastError: the model's forward does not take such a batch.
        ArgumentError: the scores are no class scores, or a label has no score.
    """
    device = device_of(model)
    try:
        scores = model(inputs.to(device, non_blocking=True))
    except (PcafastError, torch.OutOfMemoryError):
        raise
    except (TypeError, RuntimeError, ValueError, AssertionError, LookupError) as error:
        raise PcafastError(
            f"The model cannot take a batch of images of shape {tuple(inputs.shape)}: {error}. Expected a model whose "
            "forward takes one batch of images; a model that needs more can be wrapped in a module that fills it in."
        ) from error
    if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(labels):
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ArgumentError(f"model: expected class scores of shape ({len(labels)}, classes), got {found}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise ArgumentError(
            f"labels: expected 0 to {scores.shape[1] - 1}, as the model has {scores.shape[1]} outputs, "
            f"got {low if low < 0 else high}. Is it the data set that the model was made for?"
        )
    return scores, labels.to(device, non_blocking=True)
