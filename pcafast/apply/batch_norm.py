"""Statistics of batch norms, measured again after the layers before them have changed."""

from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pcafast.errors import ArgumentError, PcafastError
from pcafast.modes import device_of, evaluating


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]], *, new_share: float = 0.5
) -> None:
    """Move the running mean and variance of every batch norm, in place, towards the averages over the given batches.

    Each batch counts once, whatever its size, and sees its own statistics, as in training; one of a single example,
    which has none, is left out. Everything else runs as in evaluation. Training flags, momenta and counts of batches
    are as before afterwards; so are the statistics of a batch norm that no batch reached, and all of them if a forward
    fails.

    After a low-rank factorisation, halfway keeps more accuracy than either the old statistics, which overrate what is
    left of the signal, or the new ones, which raise its errors to the size that the signal had.

    Args:
        model: its parameters stay as they are.
        batches: inputs, or sequences that start with the inputs, as a loader of labelled images yields.
        new_share: how far to go, in (0, 1]; 1 forgets the old statistics.

    Raises:
        ArgumentError: there is no batch of two examples or more, or the share is out of range.
        PcafastError: the batches hold NaN or infinities, or the model makes some of them.
    """
    if not 0 < new_share <= 1:
        raise ArgumentError(f"new_share: expected a number in (0, 1], got {new_share}.")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    old = [deepcopy(norm.state_dict()) for norm in norms]
    done = False
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.train()
            if _run(model, batches) == 0:
                raise ArgumentError(
                    "batches: expected at least one, of two examples or more, to measure the batch norms on, got none."
                )
        if not all(buffer.isfinite().all() for norm in norms for buffer in norm.buffers()):
            raise PcafastError("Batch norms see NaN or infinities in these batches, so they are left as they were.")
        done = True
    finally:
        for norm, momentum, state in zip(norms, momenta, old, strict=True):
            norm.momentum = momentum
            if not done or norm.num_batches_tracked == 0:
                norm.load_state_dict(state)
            else:
                for name, new in norm.named_buffers():
                    counts = name == "num_batches_tracked"
                    new.copy_(state[name] if counts else torch.lerp(state[name], new, new_share))


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> int:
    """How many batches the model was run on."""
    device, count = device_of(model), 0
    for batch in batches:
        inputs = batch[0] if isinstance(batch, Sequence) and batch else batch
        if not isinstance(inputs, Tensor):
            raise ArgumentError(f"batches: expected tensors, or sequences that start with one, got {type(batch)}.")
        if len(inputs) > 1:
            model(inputs.to(device))
            count += 1
    return count
