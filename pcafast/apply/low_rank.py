"""Low-rank factorisation of Linear and convolution layers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pcafast.apply.modules import find, rebuilt, replace
from pcafast.errors import ArgumentError
from pcafast.plan import LowRank, register_applier
from pcafast.plan.layers import Factorisable, FactorSide, can_absorb, channels, groups, is_factorisable


class Factors(NamedTuple):
    """Layer y = second (first x + first_bias) + second_bias, in float64; g groups, N outputs, rank r per group.

    Shapes: first (g, r, inputs of one output), first_bias (g * r,), second (g, N/g, r), second_bias (N,).
    """

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor


class Coding(NamedTuple):
    """``decoder @ encoder @ (x - mean) + offset`` stands for x, or for the output of the layer that takes x in.

    Shapes, with g groups and the rank r: encoder (g, r, C), decoder (g, C', r), mean (g * C,), offset (g * C',).
    """

    encoder: Tensor
    decoder: Tensor
    mean: Tensor
    offset: Tensor


@register_applier(LowRank.kind)
def apply_low_rank(model: nn.Module, actions: Sequence[LowRank], tensors: Mapping[str, Tensor] | None) -> None:
    """Factorise layers of the model, in place.

    A layer becomes ``nn.Sequential(first, second)`` under its old name. The first factor keeps stride, padding,
    dilation and groups; the second is pointwise. To fuse, the next layer is multiplied by the second factor, and the
    first stands alone.
    """
    for action in actions:
        layer = _layer(model, action)
        factors = factorise(layer, action.side, _coding(layer, action, tensors))
        first = rebuilt(layer, factors.first.flatten(0, 1), factors.first_bias)
        if action.fuse_into is None:
            second = rebuilt(layer, factors.second.flatten(0, 1), factors.second_bias, pointwise=True)
            replace(model, action.layer, nn.Sequential(first, second).train(layer.training))
        else:
            consumer = _consumer(model, action, layer)
            replace(model, action.layer, first)
            replace(model, action.fuse_into, absorb(consumer, factors))


def factorise(layer: Factorisable, side: FactorSide, coding: Coding) -> Factors:
    """Factors of a layer y = W x + b, from how its output or input is coded; with "both", x directly to y."""
    bias = coding.offset.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach().to(coding.offset)
    weight = layer.weight.detach().to("cpu", torch.float64)
    weight = weight.reshape(groups(layer), len(weight) // groups(layer), -1)
    encoder, decoder, mean, offset = coding
    if side == "output":
        return Factors(encoder @ weight, _per_group(encoder, bias - mean), decoder, offset)
    first_bias = -_per_group(encoder, mean)
    if side == "input":
        return Factors(encoder, first_bias, weight @ decoder, _per_group(weight, offset) + bias)
    return Factors(encoder, first_bias, decoder, offset)


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


def _coding(layer: Factorisable, action: LowRank, tensors: Mapping[str, Tensor] | None) -> Coding:
    """That of the action, cut to its rank; zeros without tensors."""
    g = groups(layer)
    to_code = channels(layer, "output" if action.side == "output" else "input")
    coded = channels(layer, "input" if action.side == "input" else "output")
    shapes = [(g, action.rank, to_code // g), (g, coded // g, action.rank), (to_code,), (coded,)]
    if tensors is None:
        return Coding(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
    try:
        found = Coding(*(tensors[f"{action.layer}.{name}"] for name in Coding._fields))
    except KeyError as error:
        raise ArgumentError(f"plan: expected a tensor {error} for layer {action.layer!r}, and found none.") from error
    stored = found.encoder.shape[1] if found.encoder.ndim == 3 else 0
    if action.rank > stored:
        raise ArgumentError(
            f"rank of layer {action.layer!r}: expected at most {stored}, the directions stored with the plan, "
            f"got {action.rank}. A rank can be lowered by hand; for a higher one make a new plan."
        )
    cut = found._replace(encoder=found.encoder[:, : action.rank], decoder=found.decoder[..., : action.rank])
    for name, tensor, shape in zip(Coding._fields, cut, shapes, strict=True):
        if tensor.shape != shape:
            raise ArgumentError(
                f"plan: expected tensor '{action.layer}.{name}' to be of shape {shape} at rank {action.rank}, "
                f"got {tuple(tensor.shape)}."
            )
    return cut


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
