"""Deciding the ranks of a low-rank factorisation."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from pcafast.bases import Basis
from pcafast.errors import ArgumentError
from pcafast.plan.actions import Change, LowRank
from pcafast.plan.budget import Budget
from pcafast.plan.candidates import Candidate, find_candidates
from pcafast.plan.plan import Plan
from pcafast.plan.rank_rules import as_listed, by_energy, uniform, within_budget
from pcafast.plan.trace import ExampleInput, trace
from pcafast.statistics import Statistic
from pcafast.statistics.statistic import Side


def plan_low_rank(
    model: nn.Module,
    statistics: Mapping[str, Statistic | Basis],
    *,
    side: Side | None = None,
    budget: Budget | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    ranks: Mapping[str, int] | None = None,
    losses: Mapping[str, Mapping[int, float]] | None = None,
    example_input: ExampleInput | None = None,
) -> Plan:
    """Choose which layers to factorise, and at which rank, from directions of their outputs or inputs.

    Exactly one of budget, ratio, energy and ranks is given. A factorisation that would not be cheaper in MACs and in
    parameters is never chosen; ``Plan.skipped`` says why a layer is left alone.

    Args:
        model: it is run once, in evaluation mode, if there is an example input, and stays as it is.
        statistics: for each layer to consider, its ``Covariance``, or the ``PatchCovariance`` of its input, which stand
            for their principal components; or a ``pcafast.bases.Basis`` of any other kind.
        side: "output" or "input", if all statistics are to be of that side; else each layer is factorised on the side
            that its statistic is of.
        budget: a share of the whole model's MACs or parameters. The ranks are those that maximise the product over
            all layers of the kept share of variance, or of what else the directions are worth.
        ratio: keep this share of every layer's channels, rounded to nearest, at least one.
        energy: in every layer keep the fewest directions that hold this share of the variance.
        ranks: of each layer to factorise, by name; per group where it has groups.
        losses: with a budget, what the model's loss rises by when a layer alone is given a rank, {layer: {rank: loss}},
            as ``pcafast.rank_losses`` measures it: the ranks are then those of the least sum of these, straight lines
            in between, and none below the smallest that was measured.
        example_input: needed for a budget in MACs, and for fusing into the next layer, since only a forward shows
            what follows what.

    Raises:
        ArgumentError: an argument is wrong, the statistics are of another model, or the budget cannot be met.
    """
    for name, given in (("ranks", ranks), ("losses", losses), ("statistics", statistics)):
        if not isinstance(given, Mapping | None) or (given is None and name == "statistics"):
            raise ArgumentError(f"{name}: expected a mapping by the names of layers, got {given!r}.")
    asked = _asked(budget, ratio, energy, ranks)
    if side not in (None, *get_args(Side)):
        raise ArgumentError(f"side: expected 'output' or 'input', got {side!r}.")
    if budget is not None and budget.macs is not None and example_input is None:
        raise ArgumentError("example_input: expected an input to count the MACs of a budget on, got None.")
    if budget is not None and budget.channels is not None:
        raise ArgumentError(f"budget: expected a share of macs or params, since no channels are removed, got {budget}.")
    if budget is None and losses is not None:
        raise ArgumentError("losses: expected only with a budget, for which they choose the ranks.")
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
        choice = within_budget(budget, whole[budget.quantity], candidates, losses)
    elif ranks is not None:
        choice = as_listed(ranks, statistics.keys(), candidates)
    elif ratio is not None:
        choice = uniform(ratio, candidates)
    else:
        choice = by_energy(asked["energy"], candidates)
    chosen = []
    for candidate, rank in zip(candidates, choice, strict=True):
        name, best = candidate.layer.name, candidate.max_rank
        if rank is None:
            skipped[name] = "the budget allows to leave it whole" if ranks is None else "no rank was given for it"
        elif rank > best:
            skipped[name] = f"rank {rank} of {candidate.layer.channels} costs no less than the layer; {best} would"
        else:
            chosen.append((candidate, rank))
    actions = [_action(candidate, rank) for candidate, rank in chosen]
    skipped = {name: skipped[name] for name in statistics if name in skipped}
    return Plan(actions, asked, _reached(whole, actions), skipped, _tensors(chosen))


def _asked(
    budget: Budget | None, ratio: float | None, energy: float | None, ranks: Mapping[str, int] | None
) -> dict[str, Any]:
    if budget is not None and not isinstance(budget, Budget):
        raise ArgumentError(f"budget: expected a pcafast.Budget such as Budget(macs=0.5), got {budget!r}.")
    shares = {"ratio": ratio, "energy": energy}
    if budget is not None:
        shares[budget.quantity] = budget.share
    shares = {name: value for name, value in shares.items() if value is not None}
    given: dict[str, Any] = {**shares, **({} if ranks is None else {"ranks": dict(ranks)})}
    if len(given) != 1:
        raise ArgumentError(
            f"expected exactly one of budget, ratio, energy and ranks, got {', '.join(given) or 'none'}."
        )
    for name, value in shares.items():
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise ArgumentError(f"{name}: expected a share in (0, 1], got {value!r}.")
    return {"method": "low_rank", **given}


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
        kept=1 - candidate.basis.left_out[rank].item(),
        params=Change(before=before.params, after=after.params),
        macs=macs if layer.positions else None,
    )


def _tensors(chosen: Sequence[tuple[Candidate, int]]) -> dict[str, Tensor]:
    tensors = {}
    for candidate, rank in chosen:
        name, basis = candidate.layer.name, candidate.basis
        tensors[f"{name}.encoder"] = basis.encoder[:, :rank].clone()
        tensors[f"{name}.decoder"] = basis.decoder[:, :, :rank].contiguous().clone()
        tensors[f"{name}.mean"] = basis.mean.clone()
        tensors[f"{name}.offset"] = basis.mean.clone()
    return tensors


def _reached(whole: Mapping[str, int], actions: Sequence[LowRank]) -> dict[str, Any]:
    reached = {}
    for quantity, before in whole.items():
        changes = [getattr(action, quantity) for action in actions]
        after = before - sum(change["before"] - change["after"] for change in changes)
        reached[quantity] = {"before": before, "after": after, "share": after / before}
    return reached
