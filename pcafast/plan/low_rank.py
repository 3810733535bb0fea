"""Deciding the ranks of a low-rank factorisation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from pcafast.errors import ArgumentError
from pcafast.plan.actions import Change, LowRank
from pcafast.plan.budget import Budget, Quantity
from pcafast.plan.candidates import Candidate, find_candidates
from pcafast.plan.layers import Cost, Layer, Side
from pcafast.plan.plan import Plan
from pcafast.plan.ranks import Option, choose
from pcafast.plan.trace import ExampleInput, trace
from pcafast.statistics import Statistic


def plan_low_rank(
    model: nn.Module,
    statistics: Mapping[str, Statistic],
    *,
    side: Side | None = None,
    budget: Budget | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    example_input: ExampleInput | None = None,
) -> Plan:
    """Choose which layers to factorise, and at which rank, from the covariance of their outputs or inputs.

    Exactly one of budget, ratio and energy is given. A factorisation that would not be cheaper in MACs and in
    parameters is never chosen; ``Plan.skipped`` says why a layer is left alone.

    Args:
        model: it is run once, in evaluation mode, if there is an example input, and stays as it is.
        statistics: for each layer to consider, its ``Covariance``, or the ``PatchCovariance`` of its input.
        side: "output" or "input", if all statistics are to be of that side; else each layer is factorised on the side
            that its statistic is of.
        budget: a share of the whole model's MACs or parameters. The ranks are those that maximise the product over
            all layers of the kept share of variance.
        ratio: keep this share of every layer's channels, rounded to nearest, at least one.
        energy: in every layer keep the fewest directions that hold this share of the variance.
        example_input: needed for a budget in MACs, and for fusing into the next layer, since only a forward shows
            what follows what.

    Raises:
        ArgumentError: an argument is wrong, the statistics are of another model, or the budget cannot be met.
    """
    asked = _asked(budget, ratio, energy)
    if side not in (None, *get_args(Side)):
        raise ArgumentError(f"side: expected 'output' or 'input', got {side!r}.")
    if budget is not None and budget.macs is not None and example_input is None:
        raise ArgumentError("example_input: expected an input to count the MACs of a budget on, got None.")
    if budget is not None and budget.channels is not None:
        raise ArgumentError(f"budget: expected a share of macs or params, since no channels are removed, got {budget}.")
    if all(isinstance(value, Mapping) for value in statistics.values()) and statistics:
        raise ArgumentError(
            "statistics: expected those of layers by name, such as stats['covariance'], got a whole collection of "
            f"{', '.join(map(repr, statistics))}."
        )
    traced = None if example_input is None else trace(model, example_input)
    candidates, skipped = find_candidates(model, statistics, side, traced)
    if budget is not None and budget.share < 1 and not candidates:
        reasons = "; ".join(f"{name}: {skipped[name]}" for name in list(statistics)[:10])
        raise ArgumentError(f"budget: {budget} cannot be met, since none of the layers can be factorised ({reasons}).")
    whole = {"params": sum(parameter.numel() for parameter in model.parameters())}
    if traced is not None:
        whole["macs"] = traced.macs
        if not traced.macs:
            raise ArgumentError("example_input: expected one that the model multiplies anything for, got an empty one.")
    if budget is not None:
        ranks = _ranks_within(budget, whole[budget.quantity], candidates)
    elif ratio is not None:
        ranks = [max(1, math.floor(ratio * candidate.layer.channels + 0.5)) for candidate in candidates]
    else:
        ranks = [_smallest_keeping(asked["energy"], candidate.left_out) for candidate in candidates]
    chosen = []
    for candidate, rank in zip(candidates, ranks, strict=True):
        name, best = candidate.layer.name, candidate.max_rank
        if rank is None:
            skipped[name] = "the budget allows to leave it whole"
        elif rank > best:
            skipped[name] = f"rank {rank} of {candidate.layer.channels} costs no less than the layer; {best} would"
        else:
            chosen.append((candidate, rank))
    actions = [_action(candidate, rank) for candidate, rank in chosen]
    skipped = {name: skipped[name] for name in statistics if name in skipped}
    return Plan(actions, asked, _reached(whole, actions), skipped, _tensors(chosen))


def _asked(budget: Budget | None, ratio: float | None, energy: float | None) -> dict[str, Any]:
    options = {"ratio": ratio, "energy": energy}
    if budget is not None and not isinstance(budget, Budget):
        raise ArgumentError(f"budget: expected a pcafast.Budget such as Budget(macs=0.5), got {budget!r}.")
    if budget is not None:
        options[budget.quantity] = budget.share
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        raise ArgumentError(f"expected exactly one of budget, ratio and energy, got {', '.join(given) or 'none'}.")
    for name, value in given.items():
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise ArgumentError(f"{name}: expected a share in (0, 1], got {value!r}.")
    return {"method": "low_rank", **given}


def _ranks_within(budget: Budget, whole: int, candidates: Sequence[Candidate]) -> list[int | None]:
    """The rank of each layer, None where it is left whole."""
    now = [_amount(candidate.layer, candidate.layer.whole(), budget.quantity) for candidate in candidates]
    rest = whole - sum(now)
    options = [_options(candidate, budget.quantity) for candidate in candidates]
    choice = choose(options, budget.allowance(whole) - rest)
    if choice is None:
        least = (rest + sum(layer[0].cost for layer in options)) / whole
        nearest = math.ceil(least * 10_000) / 10_000
        raise ArgumentError(
            f"budget: {budget} cannot be met by factorising these layers: with each of them at rank 1, "
            f"{least:.2%} of the model's {budget.quantity} remain. The nearest that can be met is "
            f"{budget.quantity}={nearest:g}."
        )
    return [
        index + 1 if index < candidate.max_rank else None for index, candidate in zip(choice, candidates, strict=True)
    ]


def _options(candidate: Candidate, quantity: Quantity) -> list[Option]:
    """Rank 1, rank 2, ..., the largest that is cheaper, and the layer whole."""
    layer = candidate.layer
    ranks = [
        # Their sum over layers is minus the logarithm of the product of the kept shares.
        Option(_amount(layer, layer.factorised(rank), quantity), -math.log1p(-candidate.left_out[rank]))
        for rank in range(1, candidate.max_rank + 1)
    ]
    return [*ranks, Option(_amount(layer, layer.whole(), quantity), 0.0)]


def _amount(layer: Layer, cost: Cost, quantity: Quantity) -> int:
    return cost.params if quantity == "params" else cost.weights * layer.positions


def _smallest_keeping(energy: float, left_out: Sequence[float]) -> int:
    return next(rank for rank in range(1, len(left_out)) if 1 - left_out[rank] >= energy)


def _action(candidate: Candidate, rank: int) -> LowRank:
    layer = candidate.layer
    before, after = layer.whole(), layer.factorised(rank)
    macs = Change(before=layer.positions * before.weights, after=layer.positions * after.weights)
    return LowRank(
        layer=layer.name,
        weight_shape=list(layer.module.weight.shape),
        side=layer.side,
        rank=rank,
        fuse_into=layer.consumer[0] if layer.consumer else None,
        kept=1 - candidate.left_out[rank],
        params=Change(before=before.params, after=after.params),
        macs=macs if layer.positions else None,
    )


def _tensors(chosen: Sequence[tuple[Candidate, int]]) -> dict[str, Tensor]:
    tensors = {}
    for candidate, rank in chosen:
        tensors[f"{candidate.layer.name}.basis"] = candidate.basis[:, :rank].clone()
        tensors[f"{candidate.layer.name}.mean"] = candidate.mean.clone()
    return tensors


def _reached(whole: Mapping[str, int], actions: Sequence[LowRank]) -> dict[str, Any]:
    reached = {}
    for quantity, before in whole.items():
        changes = [getattr(action, quantity) for action in actions]
        after = before - sum(change["before"] - change["after"] for change in changes)
        reached[quantity] = {"before": before, "after": after, "share": after / before}
    return reached
