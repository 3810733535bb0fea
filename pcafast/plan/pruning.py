"""Deciding which channels to remove."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from pcafast.errors import ArgumentError
from pcafast.plan.actions import Change, Prune
from pcafast.plan.budget import Budget, Quantity
from pcafast.plan.plan import Plan
from pcafast.plan.positions import positions
from pcafast.plan.removal import Rules, Scope, blocks_of, remove
from pcafast.plan.slices import inputs_of, is_mixing, is_transposed, outputs_of
from pcafast.plan.ties import SIDES, Place
from pcafast.plan.trace import ExampleInput, Trace, trace
from pcafast.plan.units import Unit, Units, find_units
from pcafast.plan.verify import verify
from pcafast.plan.widths import Sliced, Widths
from pcafast.statistics import ChannelMoments, Covariance, Statistic


def plan_pruning(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *,
    budget: Budget,
    example_input: ExampleInput,
    scope: Scope = "global",
    min_width: int = 1,
    round_to: int = 1,
    means: Mapping[str, Statistic] | None = None,
) -> Plan:
    """Choose which channels to remove, those with the lowest scores first, so that the model gets smaller.

    Channels that depend on each other, as through residual additions, depthwise and grouped convolutions, go together,
    and their score is the sum over those layers that have scores. Channels of the model's outputs stay.
    ``Plan.skipped`` says why a layer is left alone. Before it is returned, the plan is tried out on a copy.

    Args:
        model: it is traced on a copy, in evaluation mode, and stays as it is.
        scores: for each layer to consider, one number (C,) per output channel, the higher the more it matters: those of
            ``pcafast.scores``, or any others. Scores of different layers are compared with each other. With the global
            scope they are at least 0.
        budget: a share of the whole model's MACs or parameters, or of the channels of the layers with scores.
        example_input: a small batch, or a tuple of the arguments of forward.
        scope: "global" removes channels wherever they have the lowest score for what they save; "layer" removes the
            same share of channels everywhere.
        min_width: channels that every layer keeps at least.
        round_to: widths become multiples of it, where they shrink.
        means: of each layer's input its ``ChannelMoments`` or ``Covariance`` (side="input"). Then what the removed
            channels added to the next layers on average is put into their biases, or the batch norms after them. This
            is exact for constant channels except at zero-padded borders.

    Raises:
        ArgumentError: an argument is wrong, the budget cannot be met, or the model cannot be traced or pruned rightly.
    """
    if not isinstance(budget, Budget):
        raise ArgumentError(f"budget: expected a pcafast.Budget such as Budget(macs=0.5), got {budget!r}.")
    rules = Rules(scope, min_width, round_to)
    values = _checked_scores(model, scores, scope)
    mean_inputs = {} if means is None else _mean_inputs(model, means)
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    before = _costs(model, trace(model, inputs), scores)
    if not before["macs"]:
        raise ArgumentError(
            "example_input: expected one on which some layer multiplies, and the model's forward of it has no MACs."
        )
    found = find_units(model, inputs)
    sliced = Sliced(model, found, positions(model, inputs))
    widths_before = {name: outputs for name, (outputs, _) in sliced.widths().items() if name in sliced.mixing}
    blocks = blocks_of(found.units, [_score(unit, values) for unit in found.units], widths_before, round_to)
    costs = sliced.costs(budget.quantity, among=scores.keys())
    allowance = target = budget.allowance(before[budget.quantity])
    while True:
        widths = Widths(sliced.widths(), costs, before[budget.quantity])
        gone = remove(blocks, widths, target, sized=sliced.mixing, rules=rules)
        if gone is None:
            raise ArgumentError(_infeasible(budget, widths.cost / before[budget.quantity], rules, scores, found))
        actions = _actions([found.units[number] for number in gone], sliced, mean_inputs, found.norms)
        tensors = {f"{action.layer}.input_mean": mean_inputs[action.layer] for action in actions if action.means_into}
        pruned = verify(model, Plan(actions), inputs)
        after = _costs(pruned, trace(pruned, inputs), scores)
        if after[budget.quantity] <= allowance:
            break
        target -= after[budget.quantity] - allowance  # as for the biases that take in the means
    asked = {"method": "pruning", budget.quantity: budget.share, **asdict(rules), "means": means is not None}
    reached: dict[str, Any] = {
        quantity: {"before": whole, "after": after[quantity], "share": after[quantity] / whole}
        for quantity, whole in before.items()
    }
    losing = {action.layer for action in actions if action.outputs}
    skipped = {name: why for name, why in _skipped(scores, found).items() if name not in losing}
    return Plan(actions, asked, reached, skipped, tensors)


def _checked_scores(model: nn.Module, scores: Mapping[str, Tensor], scope: Scope) -> dict[str, list[float]]:
    if not scores:
        raise ArgumentError("scores: expected those of at least one layer, got none.")
    modules = {name: module for name, module in model.named_modules() if is_mixing(module)}
    for name, score in scores.items():
        if isinstance(score, Statistic | Mapping):
            raise ArgumentError(
                f"scores: expected a tensor of scores for {name!r}, got a {type(score).__name__}. Statistics become "
                "scores by pcafast.scores, such as pcafast.scores.taylor(stats['taylor'])."
            )
        if name not in modules:
            raise ArgumentError(
                f"scores: {name!r} is not a linear layer or convolution of the model, which has {', '.join(modules)}."
            )
        expected = outputs_of(modules[name])
        if not isinstance(score, Tensor) or score.shape != (expected,):
            got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ArgumentError(f"scores of layer {name!r}: expected shape ({expected},), one per channel, got {got}.")
        if not torch.isfinite(score).all():
            bad = int((~torch.isfinite(score)).sum())
            raise ArgumentError(f"scores of layer {name!r}: expected finite numbers, got {bad} NaN or infinities.")
        if scope == "global" and (score < 0).any():
            raise ArgumentError(
                f"scores of layer {name!r}: expected none below 0 with scope='global', which divides them by what "
                f"their channels save, got {score.min():g}. Subtract the lowest of all layers, or take scope='layer'."
            )
    return {name: score.detach().double().cpu().tolist() for name, score in scores.items()}


def _mean_inputs(model: nn.Module, means: Mapping[str, Statistic]) -> dict[str, Tensor]:
    """The mean input (C,) of each layer that can make up for it."""
    modules = {name: module for name, module in model.named_modules() if is_mixing(module)}
    computed = {}
    for name, statistic in means.items():
        if not isinstance(statistic, ChannelMoments | Covariance) or statistic.side != "input":
            raise ArgumentError(
                f"means: expected the ChannelMoments(side='input') of layer {name!r}, got {statistic!r}."
            )
        if name in modules and not is_transposed(modules[name]) and not statistic.is_empty:
            computed[name] = statistic.compute().mean.cpu()
            if len(computed[name]) != inputs_of(modules[name]):
                expected = inputs_of(modules[name])
                raise ArgumentError(f"means of layer {name!r}: expected {expected}, got {len(computed[name])}.")
    return computed


def _score(unit: Unit, scores: Mapping[str, list[float]]) -> float | None:
    """The sum over all its channels that have scores; None if none has."""
    of_channels = [
        scores[place.name][index]
        for place, indices in unit.items()
        if place.side == "output" and place.name in scores
        for index in indices
    ]
    return sum(of_channels) if of_channels else None


def _costs(model: nn.Module, traced: Trace, scores: Mapping[str, Tensor]) -> dict[Quantity, int]:
    return {
        "macs": traced.macs,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "channels": sum(outputs_of(model.get_submodule(name)) for name in scores),
    }


def _actions(
    gone: Sequence[Unit], sliced: Sliced, mean_inputs: Mapping[str, Tensor], norms: Mapping[str, str]
) -> list[Prune]:
    """What to do to every module that loses channels, in the model's order."""
    removed: dict[Place, set[int]] = defaultdict(set)
    for unit in gone:
        for place, indices in unit.items():
            removed[place].update(indices)
    macs, params = (sliced.costs(quantity) for quantity in ("macs", "params"))
    actions = []
    for name, widths in sliced.widths().items():
        kept = [_kept(width, removed[Place(name, side)]) for width, side in zip(widths, SIDES, strict=True)]
        if kept == [None, None]:
            continue
        left = [width if one is None else len(one) for width, one in zip(widths, kept, strict=True)]
        makes_up = name in mean_inputs and kept[1] is not None
        means_into = None
        if makes_up:
            means_into = name if sliced.has_bias(name) else norms.get(name, name)
        new_bias = left[0] if means_into == name and not sliced.has_bias(name) else 0
        actions.append(
            Prune(
                layer=name,
                weight_shape=sliced.shape(name),
                outputs=kept[0],
                inputs=kept[1],
                dim=sliced.dim(name),
                means_into=means_into,
                params=Change(before=params[name](*widths), after=params[name](*left) + new_bias),
                macs=Change(before=macs[name](*widths), after=macs[name](*left)) if name in macs else None,
            )
        )
    return actions


def _kept(width: int, removed: set[int]) -> list[int] | None:
    return [index for index in range(width) if index not in removed] if removed else None


def _infeasible(budget: Budget, least: float, rules: Rules, scores: Mapping[str, Tensor], found: Units) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(_skipped(scores, found).items())[:5])
    return (
        f"budget: {budget} cannot be met by removing channels of these layers: with a min_width of {rules.min_width} "
        f"and widths rounded to {rules.round_to}, {least:.2%} of the model's {budget.quantity} remain."
        + (f" Left alone are {reasons}." if reasons else "")
    )


def _skipped(scores: Mapping[str, Tensor], found: Units) -> dict[str, str]:
    why = "the forward of the example input does not reach it, or uses its weight without calling it"
    idle = {name: why for name in scores if name not in found.reached}
    return {name: found.obstacles[name] for name in scores if name in found.obstacles} | idle
