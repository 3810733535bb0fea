"""How far outputs are from the original ones, example by example: what leaving out a direction costs."""

from collections.abc import Callable

from torch import Tensor

from pcafast.errors import ArgumentError

Loss = Callable[[Tensor, Tensor], Tensor]


def mean_squared_error(original: Tensor, outputs: Tensor) -> Tensor:
    """(N,): the mean over all other dimensions."""
    return (original - outputs).square().flatten(1).mean(1)


def symmetric_kl(original: Tensor, outputs: Tensor) -> Tensor:
    """(N,): KL(p, q) + KL(q, p) of the softmax over dimension 1, the mean over positions, if there are any."""
    log_p, log_q = original.log_softmax(1), outputs.log_softmax(1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(1).view(len(outputs), -1).mean(1)


LOSSES: dict[str, Loss] = {"mse": mean_squared_error, "kl": symmetric_kl}


def example_losses(measure: Loss, original: Tensor, outputs: Tensor) -> Tensor:
    """A loss for each example, (N,).

    Raises:
        ArgumentError: the measure gives something else.
    """
    losses = measure(original, outputs)
    if not isinstance(losses, Tensor) or losses.shape != (len(outputs),):
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ArgumentError(
            f"loss: expected a loss for each example, a tensor of shape (N,) = ({len(outputs)},), got {found}. Average "
            "over all dimensions but the first."
        )
    return losses
