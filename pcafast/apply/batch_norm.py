"""Statistics of batch norms, measured again after the layers before them have changed."""

from collections.abc import Iterable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pcafast.errors import ArgumentError
from pcafast.modes import evaluating


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]], *, new_share: float = 0.5
) -> None:
    """Move the running mean and variance of every batch norm, in place, towards the averages over the given batches.

    Each batch counts once, whatever its size, and sees its own statistics, as in training; everything else runs as in
    evaluation. Training flags and momenta are as before afterwards; so are the statistics of a batch norm that no
    batch reached, and all of them if a forward fails.

    After a low-rank factorisation, halfway keeps more accuracy than either the old statistics, which overrate what is
    left of the signal, or the new ones, which raise its errors to the size that the signal had.

    Args:
        model: its parameters stay as they are.
        batches: inputs, or sequences that start with the inputs, as a loader of labelled images yields.
        new_share: how far to go, in (0, 1]; 1 forgets the old statistics.

    Raises:
        ArgumentError: there is no batch, or the share is out of range.
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
                raise ArgumentError("batches: expected at least one to measure the batch norms on, got none.")
        done = True
    finally:
        for norm, momentum, state in zip(norms, momenta, old, strict=True):
            norm.momentum = momentum
            if not done or norm.num_batches_tracked == 0:
                norm.load_state_dict(state)
            else:
                for name in ("running_mean", "running_var"):
                    new = getattr(norm, name)
                    new.copy_(torch.lerp(state[name], new, new_share))


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> int:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    count = 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        model(inputs.to(device))
    return count
