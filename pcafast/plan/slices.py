"""Which modules can lose channels, and how many numbers they hold at a width."""

from typing import TypeGuard

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.padding import _ConstantPadNd

Mixing = nn.Linear | _ConvNd
"""Every output depends on all inputs (of its group), so outputs and inputs are removed apart."""

Channelwise = _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.LayerNorm | nn.PReLU
"""Output i belongs to input i, so both are removed together."""


def is_mixing(module: object) -> TypeGuard[Mixing]:
    """Whether it is a linear layer or a convolution."""
    return isinstance(module, nn.Linear | _ConvNd)


def is_channelwise(module: object) -> TypeGuard[Channelwise]:
    """Whether it holds numbers for each channel, without mixing channels."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    return isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm | nn.LayerNorm)


def outputs_of(module: nn.Module) -> int:
    """Its channels, those that go out; of a padding of channels, those that it adds."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, _ConvNd):
        return module.out_channels
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    if isinstance(module, _ConstantPadNd):
        return sum(module.padding[-2:])
    return int(module.num_features)  # type: ignore[arg-type]


def inputs_of(module: Mixing) -> int:
    """The channels that come in, over all groups."""
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def groups_of(module: nn.Module) -> int:
    """Groups of channels that are treated apart."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    return module.groups if isinstance(module, _ConvNd) else 1


def loses_whole_groups(module: nn.Module) -> bool:
    """Whether channels are removed by the group; otherwise the same ones of every group go.

    Whichever takes fewer channels at a time. Of a depthwise convolution, a channel is a group.
    """
    width = (inputs_of(module) if is_mixing(module) else outputs_of(module)) // groups_of(module)
    return groups_of(module) >= max(width, 2)


def groups_at(module: nn.Module, outputs: int) -> int:
    """Groups that are left when so many outputs are."""
    groups = groups_of(module)
    return groups * outputs // outputs_of(module) if loses_whole_groups(module) else groups


def weights_at(module: Mixing, outputs: int, inputs: int) -> int:
    """Numbers in the weight when so many outputs and inputs are left."""
    kernel = module.weight[0, 0].numel() if isinstance(module, _ConvNd) else 1
    return outputs * inputs * kernel // max(groups_at(module, outputs), 1)


def params_at(module: nn.Module, outputs: int, inputs: int) -> int:
    """Parameters when so many outputs and inputs are left."""
    if is_mixing(module):
        return weights_at(module, outputs, inputs) + (0 if module.bias is None else outputs)
    return sum(parameter.numel() for parameter in module.parameters()) * outputs // max(outputs_of(module), 1)


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight has the inputs first."""
    return isinstance(module, _ConvTransposeNd)


def shape_of(module: nn.Module) -> list[int]:
    """The shape of its weight, or what it would be; of a padding, how much it adds to every side."""
    if isinstance(module, _ConstantPadNd):
        return list(module.padding)
    weight = getattr(module, "weight", None)
    return [outputs_of(module)] if weight is None else list(weight.shape)
