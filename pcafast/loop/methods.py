"""The ways to make a model smaller, by name."""

from collections.abc import Mapping

from pcafast.errors import ArgumentError
from pcafast.loop.factorisation import DIRECTIONS, Directions, Factorisation
from pcafast.loop.method import Method
from pcafast.loop.pruning import CRITERIA, Criterion, Pruning
from pcafast.plan.rank_rules import Losses
from pcafast.plan.removal import Rules


def find_method(
    method: str | Criterion | Directions,
    rules: Rules,
    *,
    compensate_means: bool,
    refit: bool,
    by_ratio: bool,
    losses: Losses | None,
) -> Method:
    """The method of that name, or by that criterion or rule.

    Raises:
        ArgumentError: there is none, or it has no such options.
    """
    found = {**CRITERIA, **DIRECTIONS}.get(method) if isinstance(method, str) else method
    if isinstance(found, Directions):
        if rules != Rules() or compensate_means:
            raise ArgumentError(
                "compensate_means, scope, min_width and round_to: expected only with pruning, got them with method "
                f"{found.name!r}."
            )
        if losses is not None and by_ratio:
            raise ArgumentError("losses: expected only with a budget, within which they choose the ranks, got a ratio.")
        plain = isinstance(losses, Mapping) and all(
            isinstance(of, Mapping) and all(isinstance(loss, int | float) for loss in of.values())
            for of in losses.values()
        )
        if losses is not None and not plain:
            raise ArgumentError(
                f"losses: expected {{layer: {{rank: loss}}}}, as of pcafast.rank_losses, got {losses!r}."
            )
        return Factorisation(found, refit, losses)
    if not isinstance(found, Criterion):
        raise ArgumentError(
            f"method: expected one of {', '.join([*DIRECTIONS, *CRITERIA])}, a pcafast.Criterion or "
            f"pcafast.Directions, got {method!r}."
        )
    if refit or by_ratio or losses is not None:
        raise ArgumentError(
            f"refit, ratio and losses: expected only with low-rank layers, got them with method {found.name!r}."
        )
    return Pruning(found, rules, compensate_means)
