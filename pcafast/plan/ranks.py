"""The global choice: one option for every layer, with the least loss that a budget allows."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """One way to treat a layer."""

    cost: int
    loss: float


def choose(layers: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Pick an option for each layer so that the summed loss is small and the summed cost within the budget.

    From the cheapest options it goes up the lower convex hull of each layer's (cost, loss) points, always by the
    step with the most loss saved per cost: these are the optima of the Lagrangian, so each state passed is the best
    for its own cost. Where the next step no longer fits, single larger steps fill the rest of the budget. The result
    is at most the last step's saving away from the optimum. Ties go to the earlier layer.

    Args:
        layers: each layer's options, the cost rising and the loss not rising.
        budget: what the summed cost must not exceed.

    Returns:
        The index of each layer's option, or None if even the cheapest exceed the budget.
    """
    chosen = [0] * len(layers)
    slack = budget - sum(options[0].cost for options in layers)
    if slack < 0:
        return None
    steps = [
        (-_saving_per_cost(options[a], options[b]), layer, b)
        for layer, options in enumerate(layers)
        for a, b in pairwise(lower_hull(options))
    ]
    # Within a layer the savings per cost fall along the hull, so sorting keeps its steps in order.
    for _, layer, option in sorted(steps):
        cost = layers[layer][option].cost - layers[layer][chosen[layer]].cost
        if cost > slack:
            break
        chosen[layer] = option
        slack -= cost
    _fill(layers, chosen, slack)
    return chosen


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull; the first and the last are always on it."""
    hull: list[int] = []
    for index, option in enumerate(options):
        while len(hull) > 1:
            before, last = options[hull[-2]], options[hull[-1]]
            if _saving_per_cost(before, last) > _saving_per_cost(last, option):
                break
            hull.pop()
        hull.append(index)
    return hull


def _fill(layers: Sequence[Sequence[Option]], chosen: list[int], slack: int) -> None:
    """Raise single layers, the largest saving first, until nothing more fits."""
    costs = [[option.cost for option in options] for options in layers]
    while True:
        best: tuple[float, int, int] | None = None
        for layer, options in enumerate(layers):
            now = chosen[layer]
            affordable = bisect_right(costs[layer], costs[layer][now] + slack) - 1
            saving = options[now].loss - options[affordable].loss
            if affordable > now and (best is None or saving > best[0]):
                best = (saving, layer, affordable)
        if best is None:
            return
        _, layer, option = best
        slack -= costs[layer][option] - costs[layer][chosen[layer]]
        chosen[layer] = option


def _saving_per_cost(cheaper: Option, dearer: Option) -> float:
    return (cheaper.loss - dearer.loss) / (dearer.cost - cheaper.cost)
