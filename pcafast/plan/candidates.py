"""The layers that a plan can factorise, each with its basis."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from torch import nn

from pcafast.bases import Basis, pca
from pcafast.errors import ArgumentError, PcafastError
from pcafast.plan.layers import (
    Factorisable,
    Layer,
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
from pcafast.statistics.statistic import Side

Source = Covariance | PatchCovariance | Basis


@dataclass(frozen=True)
class Candidate:
    """A layer that can be factorised.

    Attributes:
        max_rank: the largest rank per group that costs less than the layer; at least 1.
    """

    layer: Layer
    basis: Basis
    max_rank: int


def find_candidates(
    model: nn.Module, sources: Mapping[str, Statistic | Basis], side: Side | None, traced: Trace | None
) -> tuple[list[Candidate], dict[str, str]]:
    """The layers with a basis, or statistics for one, that can be factorised, in the model's order; why others cannot.

    Raises:
        ArgumentError: the statistics are not covariances, or not of this model or side.
        PcafastError: none of the statistics has seen any data.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    checked = _checked(sources, side, modules)
    layers = {name: module for name, module in modules.items() if is_factorisable(module)}
    skipped = ({} if traced is None else _seen_obstacles(layers, traced)) | obstacles(model)
    usable = _with_data(checked, [name for name in layers if name in checked and name not in skipped], skipped)
    consumers = {} if traced is None else _consumers(layers, set(usable), skipped, traced)
    for name, consumer in consumers.items():
        skipped[consumer] = f"it takes in the second factor of {name!r}, if that gets one"
    found = []
    for name in track([name for name in usable if name not in skipped], "bases"):
        layer = Layer(
            name,
            layers[name],
            checked[name].side,
            positions=traced.positions[name] if traced else 0,
            consumer=(consumers[name], layers[consumers[name]]) if name in consumers else None,
        )
        _check_cut(layer, checked[name])
        max_rank = layer.largest_cheaper_rank()
        if max_rank:
            found.append(Candidate(layer, _basis(layer, checked[name]), max_rank))
        else:
            skipped[name] = "no rank is cheaper than the layer itself"
    return found, skipped


def _checked(
    sources: Mapping[str, Statistic | Basis], side: Side | None, modules: Mapping[str, nn.Module]
) -> dict[str, Source]:
    if not sources:
        raise ArgumentError("statistics: expected the covariance of at least one layer, got none.")
    checked: dict[str, Source] = {}
    for name, source in sources.items():
        if name not in modules:
            raise ArgumentError(
                f"statistics: {name!r} is not a layer of the model, which has {', '.join(modules) or 'none'}."
            )
        if not isinstance(source, Source):
            raise ArgumentError(
                f"statistics: expected the Covariance or PatchCovariance of layer {name!r}, or a basis that "
                f"pcafast.bases makes of other statistics, got a {type(source).__name__}."
            )
        if side is not None and source.side != side:
            wanted = "PatchCovariance()" if side == "input" else "Covariance()"
            raise ArgumentError(
                f"side: expected statistics of the {side} of every layer, but that of layer {name!r} is of its "
                f"{source.side}. Collect {wanted}."
            )
        if not isinstance(source, Basis) and source.tap != "layer":
            raise ArgumentError(
                f"statistics: expected the covariance right at layer {name!r}, which is what is factorised, got "
                f"that after its {source.tap}. Collect it with tap='layer'."
            )
        checked[name] = source
    return checked


def _seen_obstacles(layers: Mapping[str, Factorisable], traced: Trace) -> dict[str, str]:
    idle = layers.keys() - traced.positions.keys()
    return {name: "the forward of the example input does not reach it" for name in idle} | {
        name: "its weight is also used outside of its own forward" for name in traced.borrowed
    }


def _with_data(sources: Mapping[str, Source], names: Sequence[str], skipped: dict[str, str]) -> list[str]:
    """The names of those that there is a basis for, or data to make one; others are noted as skipped.

    Raises:
        PcafastError: none has seen any data.
    """
    error = None
    found = []
    for name in names:
        source = sources[name]
        if isinstance(source, Basis) or source.has_data:
            found.append(name)
            continue
        try:
            source.compute()
        except PcafastError as no_data:
            error, skipped[name] = no_data, str(no_data)
    if error is not None and not found:
        raise error
    return found


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


def _check_cut(layer: Layer, source: Source) -> None:
    of_pixels = isinstance(source, Covariance)
    if layer.side == "input" and of_pixels and not is_pointwise(layer.module):
        raise ArgumentError(
            f"statistics: the input side of layer {layer.name!r}, a convolution over patches, cannot be factorised by "
            "the covariance of single pixels. Collect PatchCovariance(), or the covariance of its output."
        )
    if isinstance(source, PatchCovariance) and not source.is_of(layer.module):
        raise ArgumentError(
            f"statistics: the patches of layer {layer.name!r} are cut otherwise: expected {layer.module}, got "
            f"{source}. Collect them from this model."
        )


def _basis(layer: Layer, source: Source) -> Basis:
    try:
        basis = source if isinstance(source, Basis) else pca(source)
    except ArgumentError as error:
        raise ArgumentError(f"statistics of layer {layer.name!r}: {error}") from error
    total, g = channels(layer.module, layer.side), groups(layer.module)
    blocks = (g, total // g, total // g)
    if basis.mean.shape != (total,) or basis.encoder.shape != blocks:
        raise ArgumentError(
            f"statistics: expected an {layer.side} mean of shape ({total},) and directions of shape {blocks} for "
            f"layer {layer.name!r}, got {tuple(basis.mean.shape)} and {tuple(basis.encoder.shape)}."
        )
    return basis
