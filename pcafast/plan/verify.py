"""A plan of removals is tried out before anyone gets it: the graph it was made from may have been misread."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pcafast.errors import ArgumentError
from pcafast.modes import evaluating
from pcafast.plan.actions import Prune
from pcafast.plan.plan import Plan
from pcafast.plan.slices import groups_of, inputs_of, is_mixing, is_transposed, loses_whole_groups, outputs_of

TOLERANCE = 1e-3
"""Relative to the largest output; rounding through a deep network in float32 stays far below it."""


def verify(model: nn.Module, plan: Plan, inputs: tuple[Any, ...]) -> nn.Module:
    """The pruned model, which does on the inputs what the model does when nothing reads the removed channels.

    Where channels are normalised over each other, removing some changes the others; then both are compared with norms
    that do not normalise.

    Raises:
        ArgumentError: it does not run, or does something else.
    """
    pruned = plan.apply_structure(model)
    actions = {action.layer: action for action in plan.actions if isinstance(action, Prune)}
    masked = deepcopy(model)
    for name, action in actions.items():
        if action.inputs is not None:
            _ignore_inputs(masked.get_submodule(name), action.inputs)
    inputs = tuple(_telling(one) for one in inputs)
    try:
        outputs = _outputs(pruned, inputs)
    except Exception as error:
        raise ArgumentError(_advice(f"does not run ({type(error).__name__}: {error})")) from error
    with _WithoutNorms() if _mixes_removed(model, actions) else nullcontext() as mode:
        if mode:
            outputs = _outputs(pruned, inputs)
        expected = _outputs(masked, inputs)
        if [one.shape for one in outputs] != [one.shape for one in expected]:
            raise ArgumentError(_advice("gives outputs of another shape"))
        if not _all_close(outputs, expected):
            if not _all_close(_outputs(masked, inputs), expected):
                raise ArgumentError(
                    "model: its outputs differ each time even in evaluation mode, as with an F.dropout that is not "
                    "told training=self.training, so that the pruned model cannot be compared with it."
                )
            layer = _first_difference(pruned, masked, actions, inputs)
            raise ArgumentError(_advice(f"computes something else, from layer {layer!r} on"))
    return pruned


class _WithoutNorms(TorchFunctionMode):
    """Norms over several channels bound each number by itself, then scale and shift as always."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in ("layer_norm", "group_norm"):
            return func(*args, **kwargs)
        x, weight, bias = (
            kwargs.get(key, dict(enumerate(args)).get(place))
            for place, key in ((0, "input"), (2, "weight"), (3, "bias"))
        )
        x = F.softsign(x.contiguous())
        last = (..., *[None] * (x.ndim - 2)) if name == "group_norm" else ...
        x = x if weight is None else x * weight[last]
        return x if bias is None else x + bias[last]


def _advice(what: str) -> str:
    return (
        f"model: pruned, it {what}, so its graph of layers was misread, as happens where channels are viewed, split or "
        "permuted in the forward. Nothing was changed. Give scores only for layers elsewhere, or use plan_low_rank, "
        "which needs no graph."
    )


def _ignore_inputs(module: nn.Module, kept: list[int]) -> None:
    """Zero the weights of the other inputs."""
    assert is_mixing(module)
    groups = groups_of(module)
    width = inputs_of(module) // groups
    outputs = outputs_of(module) // groups
    with torch.no_grad():
        for index in sorted(set(range(inputs_of(module))) - set(kept)):
            if is_transposed(module):
                module.weight[index] = 0
            else:
                group = index // width
                module.weight[group * outputs : (group + 1) * outputs, index % width] = 0


def _telling(example: Any) -> Any:
    """Noise in the place of activations that are the same everywhere: of zeros, many models make nothing but zeros."""
    if not isinstance(example, Tensor) or not example.is_floating_point() or example.ndim < 2 or example.is_meta:
        return example
    if (example != example.flatten()[:1]).any():
        return example
    return torch.randn(example.shape, generator=torch.Generator().manual_seed(0)).to(example)


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    # Of copies, since some models work on their inputs in place.
    copies = [one.clone() if isinstance(one, Tensor) else one for one in inputs]
    with evaluating(model), torch.no_grad():
        return [leaf for leaf in tree_leaves(model(*copies)) if isinstance(leaf, Tensor)]


def _all_close(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(_close(*pair) for pair in zip(ones, others, strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    if not other.is_floating_point() or other.is_meta:
        return True  # rounding may change which number is the largest
    finite = torch.isfinite(other)
    if not torch.equal(torch.isfinite(one), finite):
        return False
    one, other = one[finite], other[finite]
    tolerance = max(TOLERANCE, 16 * torch.finfo(other.dtype).eps)
    return not other.numel() or bool((one - other).abs().max() <= tolerance * other.abs().max())


def _mixes_removed(model: nn.Module, actions: Mapping[str, Prune]) -> bool:
    modules = [module for name, module in model.named_modules() if name in actions]
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
            weight = masked.get_parameter(f"{name}.weight")
            dim = -1 if weight.ndim == 2 else expected.ndim - weight.ndim + 1
            expected = expected.index_select(dim, torch.tensor(kept, device=expected.device))
        if output.shape != expected.shape or not _close(output, expected):
            return name
    return "its output"
