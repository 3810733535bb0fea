"""Collecting statistics inside a training or evaluation loop."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch import Tensor, nn

from pcafast.collect.hooks import Hooks
from pcafast.collect.layers import LayerChoice, channel_dim, choose_layers
from pcafast.errors import ArgumentError, PcafastWarning
from pcafast.statistics import Statistic, save_statistics

LayerStatistics = dict[str, Statistic]


class Collection(Mapping[str, LayerStatistics]):
    """Statistics by their names and by layer, filled while the ``with`` block is open."""

    def __init__(self, model: nn.Module, layers: LayerChoice | None, templates: Mapping[str, Statistic]) -> None:
        chosen = choose_layers(model, layers)
        self._statistics = {name: _for_layers(name, template, chosen) for name, template in templates.items()}
        watched = {layer: [each[layer] for each in self.values() if layer in each] for layer in chosen}
        self._hooks = Hooks(model, watched)

    def __getitem__(self, name: str) -> LayerStatistics:
        """The statistic of every layer, by the layer's name."""
        return self._statistics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    @property
    def mask(self) -> Tensor | None:
        """Boolean mask or weights (N, T) over the positions of activations (N, T, C), as for padded sequences.

        Covariances leave out or weigh positions by it, in all forward passes until it is changed; other statistics
        do not.
        """
        return self._hooks.mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._hooks.mask = mask

    def save(self, path: str | Path) -> None:
        """Write all statistics to one .safetensors file, which ``pcafast.load_statistics`` reads."""
        save_statistics(self, path)

    def merge(self, other: Mapping[str, LayerStatistics]) -> None:
        """Take in what another collection of the same statistics and layers has seen."""
        mine, theirs = ({(name, layer) for name, layers in many.items() for layer in layers} for many in (self, other))
        if mine != theirs:
            name, layer = min(mine ^ theirs)
            raise ArgumentError(
                f"other: expected the same statistics of the same layers, but {name!r} of layer {layer!r} is only in "
                f"{'this' if (name, layer) in mine else 'the other'} collection"
            )
        for name, layers in self.items():
            for layer, statistic in layers.items():
                statistic.merge(other[name][layer])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the statistics of all processes into each of them. All must call it, once, at the end."""
        for layers in self.values():
            for statistic in layers.values():
                statistic.all_reduce(group)

    def __enter__(self) -> "Collection":
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        if error is None:
            self._report()

    def _report(self) -> None:
        for name, layers in self.items():
            skipped = [f"{layer} ({one.skipped})" for layer, one in layers.items() if one.skipped]
            if skipped:
                _warn(f"{name}: NaN or infinities were left out, in layers (times): {', '.join(skipped)}")
            if all(one.is_empty for one in layers.values()):
                passed = "no gradient reached" if next(iter(layers.values())).needs_gradient else "no forward called"
                _warn(f"{name}: {passed} any of its layers while the block was open, so it is empty")


def collect(model: nn.Module, *, layers: LayerChoice | None = None, **statistics: Statistic) -> Collection:
    """Collect statistics of a model's layers while it trains or runs.

    ::

        with pcafast.collect(model, covariance=pcafast.Covariance(), taylor=pcafast.Taylor()) as stats:
            for images, labels in loader:
                criterion(model(images), labels).backward()
        stats["covariance"]["layer1.0.conv1"].compute()

    Nothing of the model is changed, and after the block nothing is left behind. A layer that is called twice counts
    twice; a forward recomputed for the backward (activation checkpointing) counts once. Statistics of gradients take
    one backward pass for each forward pass.

    Args:
        model: the eager module. torch.compile leaves hooks out, so call the eager one inside the block. Of a
            distributed wrapper take the wrapper or the module inside.
        layers: which layers, see ``pcafast.collect.layers.choose_layers``: None for all convolutions and linear
            layers, a type, a name pattern such as ``"layer1.*.conv?"``, several of those, or a function of name
            and module.
        statistics: any number, under names of your choice.

    Returns:
        A context manager and mapping ``stats[name][layer]`` of statistics.

    Raises:
        ArgumentError: no statistic is given, or no layer matches.
    """
    if not statistics:
        raise ArgumentError("statistics: expected at least one, such as covariance=pcafast.Covariance(), got none")
    return Collection(model, layers, statistics)


def _for_layers(name: str, template: Statistic, layers: Mapping[str, nn.Module]) -> LayerStatistics:
    """An empty copy of a statistic for each layer that can have it, told how the layer lays out its channels."""
    if not isinstance(template, Statistic):
        raise ArgumentError(f"{name}: expected a statistic such as pcafast.Covariance(), got {template!r}")
    statistics = {}
    for layer, module in layers.items():
        if not template.fits(module):
            continue
        settings = {"channel_dim": channel_dim(module, template.channel_dim), **template.settings_for(module)}
        statistics[layer] = dataclasses.replace(template, **settings)
        statistics[layer].layer = layer
    if not statistics:
        raise ArgumentError(
            f"{name}: none of the chosen layers ({', '.join(layers)}) can have a {type(template).__name__}. "
            "Choose other layers, or leave this statistic out."
        )
    return statistics


def _warn(message: str) -> None:
    warnings.warn(message, PcafastWarning, stacklevel=4)
