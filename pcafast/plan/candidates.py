"""The layers that a plan can factorise, each with its principal components."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pcafast.bases import left_out_shares, principal_components
from pcafast.errors import ArgumentError, PcafastError
from pcafast.functional import MeanCovariance
from pcafast.plan.layers import (
    Factorisable,
    Layer,
    Side,
    can_absorb,
    channels,
    groups,
    is_factorisable,
    is_pointwise,
    obstacles,
)
from pcafast.plan.trace import Trace
from pcafast.progress import track
from pcafast.statistics import Covariance, PatchCovariance, Statistic

AnyCovariance = Covariance | PatchCovariance


@dataclass(frozen=True)
class Candidate:
    """A layer that can be factorised.

    Attributes:
        mean: (C,), of its output, or of the patches it takes in.
        basis: (groups, C/groups, C/groups), rows from the most to the least variance.
        left_out: share of the variance left out at rank 0..C/groups per group.
        max_rank: the largest rank per group that costs less than the layer; at least 1.
    """

    layer: Layer
    mean: Tensor
    basis: Tensor
    left_out: list[float]
    max_rank: int


def find_candidates(
    model: nn.Module, statistics: Mapping[str, Statistic], side: Side | None, traced: Trace | None
) -> tuple[list[Candidate], dict[str, str]]:
    """The layers with statistics that can be factorised, in the model's order, and why others cannot.

    Raises:
        ArgumentError: the statistics are not covariances, or not of this model or side.
        PcafastError: none of the statistics has seen any data.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    covariances = _checked(statistics, side, modules)
    layers = {name: module for name, module in modules.items() if is_factorisable(module)}
    skipped = ({} if traced is None else _seen_obstacles(layers, traced)) | obstacles(model)
    moments = _moments({name: covariances[name] for name in layers if name in covariances}, skipped)
    consumers = {} if traced is None else _consumers(layers, moments.keys(), skipped, traced)
    for name, consumer in consumers.items():
        skipped[consumer] = f"it takes in the second factor of {name!r}, if that gets one"
    found = []
    for name in track([name for name in moments if name not in skipped], "principal components"):
        layer = Layer(
            name,
            layers[name],
            covariances[name].side,
            positions=traced.positions[name] if traced else 0,
            consumer=(consumers[name], layers[consumers[name]]) if name in consumers else None,
        )
        _check_fit(layer, covariances[name], moments[name])
        max_rank = layer.largest_cheaper_rank()
        if max_rank:
            found.append(_candidate(layer, moments[name], max_rank))
        else:
            skipped[name] = "no rank is cheaper than the layer itself"
    return found, skipped


def _checked(
    statistics: Mapping[str, Statistic], side: Side | None, modules: Mapping[str, nn.Module]
) -> dict[str, AnyCovariance]:
    if not statistics:
        raise ArgumentError("statistics: expected the covariance of at least one layer, got none.")
    covariances: dict[str, AnyCovariance] = {}
    for name, statistic in statistics.items():
        if name not in modules:
            raise ArgumentError(
                f"statistics: {name!r} is not a layer of the model, which has {', '.join(modules) or 'none'}."
            )
        if not isinstance(statistic, AnyCovariance):
            raise ArgumentError(
                f"statistics: expected the Covariance or PatchCovariance of layer {name!r}, got a "
                f"{type(statistic).__name__}."
            )
        if side is not None and statistic.side != side:
            wanted = "PatchCovariance()" if side == "input" else "Covariance()"
            raise ArgumentError(
                f"side: expected statistics of the {side} of every layer, but that of layer {name!r} is of its "
                f"{statistic.side}. Collect {wanted}."
            )
        if statistic.tap != "layer":
            raise ArgumentError(
                f"statistics: expected the covariance right at layer {name!r}, which is what is factorised, got "
                f"that after its {statistic.tap}. Collect it with tap='layer'."
            )
        covariances[name] = statistic
    return covariances


def _seen_obstacles(layers: Mapping[str, Factorisable], traced: Trace) -> dict[str, str]:
    idle = layers.keys() - traced.positions.keys()
    return {name: "the forward of the example input does not reach it" for name in idle} | {
        name: "its weight is also used outside of its own forward" for name in traced.borrowed
    }


def _moments(covariances: Mapping[str, AnyCovariance], skipped: dict[str, str]) -> dict[str, MeanCovariance]:
    """The computed statistics of layers not skipped; those without any data are noted as skipped."""
    moments: dict[str, MeanCovariance] = {}
    error = None
    for name in [name for name in covariances if name not in skipped]:
        try:
            moments[name] = covariances[name].compute()
        except PcafastError as no_data:
            error = no_data
            skipped[name] = str(no_data)
    if error is not None and not moments:
        raise error
    return moments


def _consumers(
    layers: Mapping[str, Factorisable], measured: Set[str], skipped: Mapping[str, str], traced: Trace
) -> dict[str, str]:
    """For layers whose output goes straight into another linear one: the name of that, which is then left whole.

    The two are one linear map, and the rank is chosen where they meet; of a longer row, every second one is a consumer.
    """
    consumers: dict[str, str] = {}
    for name, consumer in traced.consumers.items():
        free = name in measured and name not in consumers.values() and consumer not in skipped
        if free and can_absorb(layers[consumer], layers[name]):
            consumers[name] = consumer
    return consumers


def _check_fit(layer: Layer, statistic: AnyCovariance, moments: MeanCovariance) -> None:
    of_pixels = isinstance(statistic, Covariance)
    if layer.side == "input" and of_pixels and not is_pointwise(layer.module):
        raise ArgumentError(
            f"statistics: the input side of layer {layer.name!r}, a convolution over patches, cannot be factorised by "
            "the covariance of single pixels. Collect PatchCovariance(), or the covariance of its output."
        )
    if isinstance(statistic, PatchCovariance) and not statistic.is_of(layer.module):
        raise ArgumentError(
            f"statistics: the patches of layer {layer.name!r} are cut otherwise: expected {layer.module}, got "
            f"{statistic}. Collect them from this model."
        )
    total, g = channels(layer.module, layer.side), groups(layer.module)
    square = (total, total) if g == 1 else (g, total // g, total // g)
    if moments.mean.shape != (total,) or moments.covariance.shape != square:
        raise ArgumentError(
            f"statistics: expected an {layer.side} mean of shape ({total},) and a covariance of shape {square} for "
            f"layer {layer.name!r}, got {tuple(moments.mean.shape)} and {tuple(moments.covariance.shape)}."
        )


def _candidate(layer: Layer, moments: MeanCovariance, max_rank: int) -> Candidate:
    try:
        variances, basis = principal_components(moments.covariance)
    except ArgumentError as error:
        raise ArgumentError(f"statistics of layer {layer.name!r}: {error}") from error
    mean = moments.mean.detach().to("cpu", torch.float64)
    left_out = left_out_shares(variances).tolist()
    return Candidate(layer, mean, basis.reshape(-1, layer.channels, layer.channels), left_out, max_rank)
