"""A plan of removals is tried out before anyone gets it: the graph it was made from may have been misread."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pcafast.errors import ArgumentError
from pcafast.modes import evaluating
from pcafast.plan.actions import Prune
from pcafast.plan.plan import Plan
from pcafast.plan.slices import groups_of, inputs_of, is_mixing, is_transposed, loses_whole_groups

TOLERANCE = 1e-3
"""Relative to the largest output; rounding through a deep network in float32 stays far below it."""


def verify(model: nn.Module, plan: Plan, inputs: tuple[Any, ...]) -> nn.Module:
    """The pruned model, which does on the inputs what the model does when nothing reads the removed channels.

    Where channels are normalised over each other, removing some changes the others; then only the shapes and the
    finiteness of the outputs are looked at.

    Raises:
        ArgumentError: it does not run, or does something else.
    """
    pruned = plan.apply_structure(model)
    actions = {action.layer: action for action in plan.actions if isinstance(action, Prune)}
    masked = deepcopy(model)
    for name, action in actions.items():
        if action.inputs is not None:
            _ignore_inputs(masked.get_submodule(name), action.inputs)
    try:
        outputs = _outputs(pruned, inputs)
    except Exception as error:
        raise ArgumentError(_advice(f"does not run ({type(error).__name__}: {error})")) from error
    expected = _outputs(masked, inputs)
    if [one.shape for one in outputs] != [one.shape for one in expected]:
        raise ArgumentError(_advice("gives outputs of another shape"))
    if not all(_close(*pair) for pair in zip(outputs, expected, strict=True)) and not _mixes_removed(model, actions):
        layer = _first_difference(pruned, masked, actions, inputs)
        raise ArgumentError(_advice(f"computes something else, from layer {layer!r} on"))
    return pruned


def _advice(what: str) -> str:
    return (
        f"model: pruned, it {what}, so its graph of layers was misread, as happens where channels are viewed, split or "
        "permuted in the forward. Nothing was changed. Give scores only for layers elsewhere, or use plan_low_rank, "
        "which needs no graph."
    )


def _ignore_inputs(module: nn.Module, kept: list[int]) -> None:
    """Zero the weights of the other inputs."""
    assert is_mixing(module)
    width = inputs_of(module) // groups_of(module)
    gone = sorted(set(range(inputs_of(module))) - set(kept))
    with torch.no_grad():
        weight = module.weight.transpose(0, 1) if is_transposed(module) else module.weight
        outputs = len(weight) // groups_of(module)
        for index in gone:
            group = index // width
            weight[group * outputs : (group + 1) * outputs, index % width] = 0


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def _close(one: Tensor, other: Tensor) -> bool:
    if not other.is_floating_point():
        return torch.equal(one, other)
    error = (one - other).abs().max().item() if one.numel() else 0.0
    scale = other.abs().max().item() if one.numel() else 0.0
    tolerance = max(TOLERANCE, 16 * torch.finfo(other.dtype).eps)
    return error <= tolerance * scale or not torch.isfinite(other).all()


def _mixes_removed(model: nn.Module, actions: Mapping[str, Prune]) -> bool:
    modules = [model.get_submodule(name) for name in actions if name in dict(model.named_modules())]
    return any(
        isinstance(module, nn.LayerNorm) or (isinstance(module, nn.GroupNorm) and not loses_whole_groups(module))
        for module in modules
    )


def _first_difference(
    pruned: nn.Module, masked: nn.Module, actions: Mapping[str, Prune], inputs: tuple[Any, ...]
) -> str:
    seen: list[dict[str, Tensor]] = []
    for model in (pruned, masked):
        outputs: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda *given, name=name, outputs=outputs: outputs.setdefault(name, given[-1]))
            for name, module in model.named_modules()
            if is_mixing(module)
        ]
        try:
            _outputs(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        seen.append(outputs)
    for name, output in seen[0].items():
        expected = seen[1][name]
        kept = actions[name].outputs if name in actions else None
        if kept is not None:
            expected = expected.index_select(
                -1 if isinstance(masked.get_submodule(name), nn.Linear) else 1,
                torch.tensor(kept, device=expected.device),
            )
        if output.shape != expected.shape or not _close(output, expected):
            return name
    return "its output"
