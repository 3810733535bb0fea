"""The rules by which ranks are asked for. Each gives the rank of every candidate, None to leave it whole."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from pcafast.errors import ArgumentError
from pcafast.plan.budget import Budget, Quantity
from pcafast.plan.candidates import Candidate
from pcafast.plan.layers import Cost, Layer
from pcafast.plan.ranks import Option, choose

Losses = Mapping[str, Mapping[int, float]]
Ranks = list[int | None]


def uniform(ratio: float, candidates: Sequence[Candidate]) -> Ranks:
    """A share of every layer's channels."""
    return [nearest_rank(ratio, candidate.layer.channels) for candidate in candidates]


def nearest_rank(ratio: float, full: int) -> int:
    """A share of the full rank, rounded to nearest, at least one."""
    return max(1, math.floor(ratio * full + 0.5))


def by_energy(energy: float, candidates: Sequence[Candidate]) -> Ranks:
    """The fewest directions that hold a share of all that they are worth."""
    shares = [candidate.basis.left_out.tolist() for candidate in candidates]
    return [next(rank for rank in range(1, len(left_out)) if 1 - left_out[rank] >= energy) for left_out in shares]


def as_listed(ranks: Mapping[str, int], names: Collection[str], candidates: Sequence[Candidate]) -> Ranks:
    """Those of a list, by the names of the layers; ``names`` are those that may be in it.

    Raises:
        ArgumentError: there is no such layer, or it has no such rank.
    """
    unknown = [name for name in ranks if name not in names]
    if unknown:
        raise ArgumentError(
            f"ranks: expected layers that there are statistics of ({', '.join(names)}), got {unknown[0]!r}."
        )
    for layer in (candidate.layer for candidate in candidates if candidate.layer.name in ranks):
        rank = ranks[layer.name]
        if type(rank) is not int or not 1 <= rank <= layer.channels:
            raise ArgumentError(
                f"ranks: expected a whole number from 1 to {layer.channels} for layer {layer.name!r}, got {rank!r}."
            )
    return [ranks.get(candidate.layer.name) for candidate in candidates]


def within_budget(budget: Budget, whole: int, candidates: Sequence[Candidate], losses: Losses | None) -> Ranks:
    """Those of the least summed loss: of variance left out, or of losses that were measured.

    Raises:
        ArgumentError: the budget cannot be met, or the losses are none.
    """
    now = [_amount(candidate.layer, candidate.layer.whole(), budget.quantity) for candidate in candidates]
    rest = whole - sum(now)
    curves = [_of_left_out(one) if losses is None else _of_measured(one, losses) for one in candidates]
    options = [_options(one.layer, curve, budget.quantity) for one, curve in zip(candidates, curves, strict=True)]
    choice = choose(options, budget.allowance(whole) - rest)
    if choice is None:
        least = (rest + sum(layer[0].cost for layer in options)) / whole
        nearest = math.ceil(least * 10_000) / 10_000
        lowest = "rank 1" if losses is None else "the lowest rank that was measured"
        raise ArgumentError(
            f"budget: {budget} cannot be met by factorising these layers: with each of them at {lowest}, "
            f"{least:.2%} of the model's {budget.quantity} remain. The nearest that can be met is "
            f"{budget.quantity}={nearest:g}."
        )
    ranks: list[list[int | None]] = [[*curve, None] for curve in curves]
    return [layer[index] for layer, index in zip(ranks, choice, strict=True)]


def _options(layer: Layer, curve: Mapping[int, float], quantity: Quantity) -> list[Option]:
    """The ranks of the curve, rising, and the layer whole."""
    ranks = [Option(_amount(layer, layer.factorised(rank), quantity), loss) for rank, loss in curve.items()]
    return [*ranks, Option(_amount(layer, layer.whole(), quantity), 0.0)]


def _of_left_out(candidate: Candidate) -> dict[int, float]:
    """Rank 1, rank 2, ..., the largest that is cheaper than the layer."""
    left_out = candidate.basis.left_out.tolist()
    # Their sum over layers is minus the logarithm of the product of the kept shares.
    return {rank: -math.log1p(-left_out[rank]) for rank in range(1, candidate.max_rank + 1)}


def _of_measured(candidate: Candidate, losses: Losses) -> dict[int, float]:
    """From the lowest rank that was measured up, along straight lines, to none at the full rank; never rising."""
    layer = candidate.layer
    measured = losses.get(layer.name, {})
    if not isinstance(measured, Mapping):
        raise ArgumentError(f"losses: expected {{rank: loss}} for layer {layer.name!r}, got {measured!r}.")
    if not all(type(rank) is int and 1 <= rank <= layer.channels for rank in measured) or not measured:
        raise ArgumentError(
            f"losses: expected those of layer {layer.name!r} at some ranks from 1 to {layer.channels}, got "
            f"{dict(measured)}."
        )
    if not all(isinstance(loss, int | float) and math.isfinite(loss) for loss in measured.values()):
        raise ArgumentError(f"losses: expected finite numbers for layer {layer.name!r}, got {dict(measured)}.")
    descending = sorted({**measured, layer.channels: 0.0}.items(), reverse=True)
    highest = itertools.accumulate((loss for _, loss in descending), max)
    knots = [(rank, loss) for (rank, _), loss in zip(descending, highest, strict=True)]
    curve = {
        rank: here + (there - here) * (above - rank) / (above - below)
        for (above, here), (below, there) in itertools.pairwise(knots)
        for rank in range(above, below - 1, -1)
    }
    rising = {rank: curve[rank] for rank in sorted(curve) if rank <= candidate.max_rank}
    if not rising:
        raise ArgumentError(
            f"losses: expected one at a rank that is cheaper than layer {layer.name!r}, which is up to "
            f"{candidate.max_rank}, got {dict(measured)}."
        )
    return rising


def _amount(layer: Layer, cost: Cost, quantity: Quantity) -> int:
    return cost.params if quantity == "params" else cost.weights * layer.positions
