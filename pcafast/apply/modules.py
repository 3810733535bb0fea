"""Finding, replacing and rebuilding the modules of a model."""

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from pcafast.errors import ArgumentError
from pcafast.plan.layers import Factorisable

_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


def find(model: nn.Module, name: str) -> nn.Module:
    """The module of that name.

    Raises:
        ArgumentError: there is none.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=3, cutoff=0)
        raise ArgumentError(
            f"model: expected a layer {name!r}, as in the model that the plan was made for, and found none. "
            f"The nearest names are {', '.join(map(repr, close))}."
        )
    return modules[name]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put the module in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def rebuilt(layer: Factorisable, weight: Tensor, bias: Tensor, *, pointwise: bool = False) -> Factorisable:
    """A layer of the same type, groups, dtype, device, memory format, mode and trainability with other weights.

    Args:
        layer: the one to follow.
        weight: (outputs, inputs per group * kernel size).
        bias: (outputs,).
        pointwise: with a kernel of size 1, stride 1 and no padding, instead of the layer's.
    """
    # On the meta device nothing is initialised, so that no random numbers are drawn.
    if isinstance(layer, nn.Linear):
        new: Factorisable = nn.Linear(weight.shape[1], len(weight), device="meta")
    else:
        geometry: dict[str, Any] = {key: getattr(layer, key) for key in _GEOMETRY}
        if pointwise:
            geometry = {"kernel_size": [1] * len(layer.kernel_size)}
        weight = weight.reshape(len(weight), -1, *geometry["kernel_size"])
        inputs = weight.shape[1] * layer.groups
        new = type(layer)(inputs, len(weight), groups=layer.groups, device="meta", **geometry)
    trains_bias = layer.weight.requires_grad if layer.bias is None else layer.bias.requires_grad
    new.weight = nn.Parameter(stored_like(layer.weight, weight), layer.weight.requires_grad)
    new.bias = nn.Parameter(stored_like(layer.weight, bias), trains_bias)
    return new.train(layer.training)


def stored_like(old: Tensor, new: Tensor) -> Tensor:
    """The new values with the device, dtype and memory format of the old."""
    new = new.to(old.device, old.dtype)
    for dimensions, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        # A 1x1 kernel is contiguous in both formats, and only its strides tell which is meant.
        last = new.ndim == dimensions and old.is_contiguous(memory_format=memory_format) and old.stride(-1) != 1
        if last:
            return new.contiguous(memory_format=memory_format)
    return new.contiguous()
