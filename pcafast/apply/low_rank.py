"""Low-rank factorisation of Linear and convolution layers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcafast.apply.modules import find, rebuilt, replace
from pcafast.errors import ArgumentError
from pcafast.plan import LowRank, register_applier
from pcafast.plan.layers import Factorisable, can_absorb, channels, groups, is_factorisable


class Factors(NamedTuple):
    """Layer y = second (first x + first_bias) + second_bias, in float64; g groups, N outputs, rank r per group.

    Shapes: first (g, r, inputs of one output), first_bias (g * r,), second (g, N/g, r), second_bias (N,).
    """

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor


@register_applier(LowRank.kind)
def apply_low_rank(model: nn.Module, actions: Sequence[LowRank], tensors: Mapping[str, Tensor] | None) -> None:
    """Factorise layers of the model, in place.

    A layer becomes ``nn.Sequential(first, second)`` under its old name. The first factor keeps stride, padding,
    dilation and groups; the second is pointwise. To fuse, the next layer is multiplied by the second factor, and the
    first stands alone.
    """
    for action in actions:
        layer = _layer(model, action)
        factors = factorise(layer, action, *_basis_and_mean(layer, action, tensors))
        first = rebuilt(layer, factors.first.flatten(0, 1), factors.first_bias)
        if action.fuse_into is None:
            second = rebuilt(layer, factors.second.flatten(0, 1), factors.second_bias, pointwise=True)
            replace(model, action.layer, nn.Sequential(first, second).train(layer.training))
        else:
            consumer = _consumer(model, action, layer)
            replace(model, action.layer, first)
            replace(model, action.fuse_into, absorb(consumer, factors))


def factorise(layer: Factorisable, action: LowRank, basis: Tensor, mean: Tensor) -> Factors:
    """Factors of the layer from an orthonormal basis (g, r, C/g) of its output or input, and the mean (C,) there.

    With basis B and mean m, the output side projects y = W x + b to B'B (y - m) + m, and the input side x likewise.
    """
    weight = layer.weight.detach().to("cpu", torch.float64)
    weight = weight.reshape(groups(layer), len(weight) // groups(layer), -1)
    bias = mean.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach().to(mean)
    if action.side == "output":
        return Factors(basis @ weight, _per_group(basis, bias - mean), basis.mT, mean)
    return Factors(basis, -_per_group(basis, mean), weight @ basis.mT, _per_group(weight, mean) + bias)


def absorb(consumer: Factorisable, factors: Factors) -> Factorisable:
    """The consumer of the layer's output, multiplied by the layer's second factor."""
    weight = consumer.weight.detach().to("cpu", torch.float64)
    blocks = groups(consumer)
    bias = _per_group(weight.reshape(blocks, len(weight) // blocks, -1), factors.second_bias)
    if consumer.bias is not None:
        bias = bias + consumer.bias.detach().to(bias)
    # The groups of the layer, k of them to each group h of the consumer.
    g, width, rank = factors.second.shape
    by_group = weight.reshape(blocks, -1, g // blocks, width)
    second = factors.second.reshape(blocks, g // blocks, width, rank)
    product = torch.einsum("hnkc,hkcr->hnkr", by_group, second)
    return rebuilt(consumer, product.reshape(len(weight), -1), bias)


def _per_group(matrices: Tensor, vector: Tensor) -> Tensor:
    """Matrices (g, n, c) times the vector (g * c,) cut into groups: (g * n,)."""
    return (matrices @ vector.view(len(matrices), -1, 1)).flatten()


def _basis_and_mean(
    layer: Factorisable, action: LowRank, tensors: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor]:
    width, g = channels(layer, action.side), groups(layer)
    if tensors is None:
        nothing = torch.zeros(g, action.rank, width // g, dtype=torch.float64)
        return nothing, torch.zeros(width, dtype=torch.float64)
    try:
        basis, mean = tensors[f"{action.layer}.basis"], tensors[f"{action.layer}.mean"]
    except KeyError as error:
        raise ArgumentError(f"plan: expected a tensor {error} for layer {action.layer!r}, and found none.") from error
    if (len(basis), basis.shape[-1], len(mean)) != (g, width // g, width):
        raise ArgumentError(
            f"plan: expected a basis of shape ({g}, rank, {width // g}) and a mean of shape ({width},) for layer "
            f"{action.layer!r}, got {tuple(basis.shape)} and {tuple(mean.shape)}."
        )
    if action.rank > basis.shape[1]:
        raise ArgumentError(
            f"rank of layer {action.layer!r}: expected at most {basis.shape[1]}, the directions stored with the plan, "
            f"got {action.rank}. A rank can be lowered by hand; for a higher one make a new plan."
        )
    return basis[:, : action.rank], mean


def _layer(model: nn.Module, action: LowRank) -> Factorisable:
    module = find(model, action.layer)
    if not is_factorisable(module) or list(module.weight.shape) != action.weight_shape:
        raise ArgumentError(
            f"model: layer {action.layer!r} is not the one that the plan was made for: expected a weight of shape "
            f"{tuple(action.weight_shape)}, found {_described(module)}."
        )
    return module


def _consumer(model: nn.Module, action: LowRank, layer: Factorisable) -> Factorisable:
    module = find(model, action.fuse_into or "")
    outputs = channels(layer, "output")
    if is_factorisable(module) and can_absorb(module, layer) and channels(module, "input") == outputs:
        return module
    raise ArgumentError(
        f"model: layer {action.layer!r} cannot be fused into {action.fuse_into!r}: expected a "
        f"{type(layer).__name__} of {outputs} channels that is pointwise, of stride 1 and without padding, "
        f"found {_described(module)}."
    )


def _described(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    shape = f" with a weight of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
    return f"a {type(module).__name__}{shape}"
