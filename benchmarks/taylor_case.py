"""Activation x gradient: the peers, and the truth."""

from collections.abc import Callable

import torch
from cases import Case, activations
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InvalidCxxCompiler

from pcafast import reference
from pcafast.functional import taylor_scores
from pcafast.native import operators

PEERS = ("pcafast", "operator", "expression", "torch.compile")


def taylor_case(shape: tuple[int, ...], dtype: str, layout: str, device: str = "cpu") -> Case:
    """The function, and the operator alone, against pytorch-pruning's expression, plain and compiled."""
    activation, gradient = (activations(shape, dtype, layout, seed=seed, device=device) for seed in (0, 1))
    state = empty_state(shape[1], device)

    def function() -> Tensor:
        return taylor_scores(activation, gradient, reduction="signed", loss_reduction="sum")

    def operator() -> None:
        operators.taylor_update_(activation, gradient, 1, 1.0, *state)

    calls = {"pcafast": function, "operator": operator, "expression": lambda: expression(activation, gradient)}
    absent = {}
    try:
        calls["torch.compile"] = compiled(activation, gradient)
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, InvalidCxxCompiler):
            raise
        absent["torch.compile"] = str(error.inner_exception)
    operator()
    check(activation, gradient, state)
    for name in calls.keys() - {"operator"}:
        check_scores(calls[name](), state, torch.finfo(activation.dtype).eps)
    return Case("taylor", {"shape": shape, "dtype": dtype, "layout": layout}, calls, absent)


def expression(activation: Tensor, gradient: Tensor) -> Tensor:
    """pytorch-pruning's score of a batch, before the absolute value that it takes at the end."""
    return (activation * gradient).mean(dim=(0, 2, 3))


def compiled(activation: Tensor, gradient: Tensor) -> Callable[[], Tensor]:
    """The expression compiled for this very input, and not one of the few that torch keeps before it gives up."""
    torch.compiler.reset()
    call = torch.compile(expression, dynamic=False, fullgraph=True)
    call(activation, gradient)
    return lambda: call(activation, gradient)


def empty_state(channels: int, device: str) -> list[Tensor]:
    """Examples, positions, sums (4, C) and skipped batches, as the operator takes them."""
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((), (), (4, channels))]
    return [*sums, torch.zeros((), dtype=torch.int64, device=device)]


def check(activation: Tensor, gradient: Tensor, state: list[Tensor]) -> None:
    """See that the sums of the four reductions are those of the reference, in float64, image by image."""
    exact = empty_state(activation.shape[1], str(activation.device))
    for a, g in zip(activation.split(1), gradient.split(1), strict=True):
        reference.taylor_update_(a, g, 1, 1.0, *exact)
    magnitude = exact[2].amax(1, keepdim=True)
    magnitude[2] = magnitude[3]  # signed sums cancel
    torch.testing.assert_close(state[2] / magnitude, exact[2] / magnitude, rtol=0, atol=1e-6)
    assert [int(one) for one in (state[0], state[1], state[3])] == [int(one) for one in (exact[0], exact[1], exact[3])]


def check_scores(scores: Tensor, state: list[Tensor], eps: float) -> None:
    """See that scores are the absolute signed means, but for rounding in the dtype of the input."""
    _, positions, sums, _ = state
    atol = max(eps, 1e-5) * float(sums[3].max() / positions)
    torch.testing.assert_close(scores.abs().double(), sums[2].abs() / positions, rtol=0, atol=atol)
