"""Removing channels from modules, in place: they stay the same objects, with smaller weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.padding import _ConstantPadNd

from pcafast.apply.modules import find, stored_like
from pcafast.errors import ArgumentError
from pcafast.plan import Prune, register_applier
from pcafast.plan.slices import (
    Mixing,
    groups_at,
    groups_of,
    inputs_of,
    is_channelwise,
    is_mixing,
    is_transposed,
    loses_whole_groups,
    outputs_of,
    shape_of,
)


@register_applier(Prune.kind)
def apply_pruning(model: nn.Module, actions: Sequence[Prune], tensors: Mapping[str, Tensor] | None) -> None:
    """Keep the channels that the actions name.

    Parameters are made anew with the dtype, device, memory format and trainability of the old. Means go into biases and
    running means last, when everything has its new width; without tensors the biases they need are there, but zero.
    """
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules(remove_duplicate=False))
    means: list[tuple[str, Tensor | None]] = []
    for action in actions:
        if action.layer in parameters and action.layer not in modules:
            _prune_parameter(model, action, parameters[action.layer])
            continue
        module = _module(model, action)
        if action.means_into is not None:
            _check_means_into(model, module, action)
            means.append((action.means_into, _lost_means(module, action, tensors)))
        _prune_module(module, action)
    for name, lost in means:
        _take_in(find(model, name), lost)


def _prune_module(module: nn.Module, action: Prune) -> None:
    if isinstance(module, _ConstantPadNd):
        _prune_pad(module, action)
    elif is_mixing(module):
        _prune_mixing(module, action)
    else:
        _prune_channelwise(module, action)


def _prune_mixing(module: Mixing, action: Prune) -> None:
    outputs = _or_all(action.outputs, outputs_of(module))
    inputs = _or_all(action.inputs, inputs_of(module))
    groups = groups_of(module)
    _check_groups(module, action, outputs, inputs)
    module.weight = _kept(module.weight, inputs if is_transposed(module) else outputs, 0)
    if not loses_whole_groups(module):
        width = module.weight.shape[1]
        columns = outputs if is_transposed(module) else inputs
        module.weight = _kept(module.weight, [index for index in columns if index < width], 1)
    if module.bias is not None:
        module.bias = _kept(module.bias, outputs, 0)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = len(outputs), len(inputs)
    else:
        module.groups = groups_at(module, len(outputs)) if loses_whole_groups(module) else groups
        module.out_channels, module.in_channels = len(outputs), len(inputs)


def _check_groups(module: Mixing, action: Prune, outputs: list[int], inputs: list[int]) -> None:
    groups = groups_of(module)
    if groups == 1:
        return
    widths = (outputs_of(module) // groups, inputs_of(module) // groups)
    by_group = [
        tuple(
            {index % width for index in kept if index // width == group}
            for kept, width in zip((outputs, inputs), widths, strict=True)
        )
        for group in range(groups)
    ]
    whole = tuple(set(range(width)) for width in widths)
    if loses_whole_groups(module):
        fits = all(one in (whole, (set(), set())) for one in by_group)
    else:
        fits = all(one == by_group[0] for one in by_group)
    if not fits:
        rule = "whole groups" if loses_whole_groups(module) else "the same channels of every group"
        raise ArgumentError(
            f"plan: of layer {action.layer!r}, a convolution of {groups} groups, expected {rule} to be kept, "
            f"got outputs {outputs} and inputs {inputs}."
        )


def _prune_channelwise(module: nn.Module, action: Prune) -> None:
    width = outputs_of(module)
    kept = _or_all(action.outputs, width)
    groups = groups_at(module, len(kept))
    for name, parameter in list(module.named_parameters(recurse=False)):
        setattr(module, name, _kept(parameter, kept, 0))
    for name, buffer in list(module.named_buffers(recurse=False)):
        if buffer.ndim:
            setattr(module, name, _selected(buffer, kept, 0))
    if isinstance(module, nn.GroupNorm):
        module.num_channels, module.num_groups = len(kept), groups
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (len(kept),)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(kept)
    else:
        module.num_features = len(kept)  # type: ignore[assignment]


def _prune_pad(module: _ConstantPadNd, action: Prune) -> None:
    *others, before, after = module.padding
    kept = _or_all(action.outputs, before + after)
    left = sum(index < before for index in kept)
    module.padding = (*others, left, len(kept) - left)


def _prune_parameter(model: nn.Module, action: Prune, parameter: nn.Parameter) -> None:
    _check_shape(action, list(parameter.shape), "parameter")
    _check_range(action, "outputs", dict(enumerate(parameter.shape)).get(action.dim, 0))
    parent, _, name = action.layer.rpartition(".")
    kept = _or_all(action.outputs, parameter.shape[action.dim])
    setattr(model.get_submodule(parent), name, _kept(parameter, kept, action.dim))


def _lost_means(module: nn.Module, action: Prune, tensors: Mapping[str, Tensor] | None) -> Tensor | None:
    """What the removed inputs add to each kept output, on average; None if that is not known."""
    assert is_mixing(module)
    if tensors is None:
        return None
    try:
        mean = tensors[f"{action.layer}.input_mean"].double().clone()
    except KeyError as error:
        raise ArgumentError(f"plan: expected a tensor {error} for layer {action.layer!r}, and found none.") from error
    mean[_or_all(action.inputs, len(mean))] = 0
    groups = groups_of(module)
    weight = module.weight.detach().to("cpu", torch.float64)
    weight = weight.reshape(*weight.shape[:2], -1).sum(2)
    weight = weight.view(groups, -1, weight.shape[1])
    lost = (weight @ mean.view(groups, -1, 1)).flatten()
    return lost[_or_all(action.outputs, len(lost))]


def _take_in(module: nn.Module, lost: Tensor | None) -> None:
    """Add to the bias, or take from the running mean, what the layer before lost."""
    if lost is not None and len(lost) != outputs_of(module):
        raise ArgumentError(
            f"plan: expected the means of {outputs_of(module)} channels for a {type(module).__name__}, got {len(lost)}."
        )
    if isinstance(module, _BatchNorm):
        if lost is not None and module.running_mean is not None:
            module.running_mean -= lost.to(module.running_mean)
        return
    assert is_mixing(module)
    if module.bias is None:
        module.bias = nn.Parameter(module.weight.new_zeros(outputs_of(module)), module.weight.requires_grad)
    if lost is not None:
        with torch.no_grad():
            module.bias += lost.to(module.bias)


def _module(model: nn.Module, action: Prune) -> nn.Module:
    module = find(model, action.layer)
    if not (is_mixing(module) or is_channelwise(module) or isinstance(module, _ConstantPadNd)):
        raise ArgumentError(f"model: {action.layer!r} is a {type(module).__name__}, which has no channels to remove.")
    _check_shape(action, shape_of(module), type(module).__name__)
    _check_range(action, "outputs", outputs_of(module), may_vanish=isinstance(module, _ConstantPadNd))
    _check_range(action, "inputs", inputs_of(module) if is_mixing(module) else 0)
    return module


def _check_range(action: Prune, side: str, width: int, *, may_vanish: bool = False) -> None:
    kept = getattr(action, side)
    if kept is not None and (kept[-1:] >= [width] or not (kept or may_vanish)):
        there = f"some of its channels 0 to {width - 1}" if width else "null, as it has none"
        raise ArgumentError(f"plan: {side} of layer {action.layer!r}: expected {there}, got {kept}.")


def _check_means_into(model: nn.Module, module: nn.Module, action: Prune) -> None:
    taker = find(model, str(action.means_into))
    if not is_mixing(module) or not (taker is module or isinstance(taker, _BatchNorm)):
        raise ArgumentError(
            f"plan: means_into of layer {action.layer!r}: expected null, the layer itself or the batch norm after it, "
            f"got {action.means_into!r}, a {type(taker).__name__}."
        )


def _check_shape(action: Prune, shape: list[int], what: str) -> None:
    if shape != action.weight_shape:
        raise ArgumentError(
            f"model: {action.layer!r} is not the one that the plan was made for: expected a weight of shape "
            f"{tuple(action.weight_shape)}, found a {what} with {tuple(shape)}."
        )


def _or_all(kept: list[int] | None, width: int) -> list[int]:
    return list(range(width)) if kept is None else kept


def _kept(parameter: Tensor, kept: list[int], dim: int) -> nn.Parameter:
    return nn.Parameter(_selected(parameter, kept, dim), parameter.requires_grad)


def _selected(tensor: Tensor, kept: list[int], dim: int) -> Tensor:
    return stored_like(tensor, tensor.detach().index_select(dim, torch.tensor(kept, device=tensor.device)))
