"""The hooks: collecting statistics inside a training or evaluation loop."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pcafast.collect.kept import KeptActivation
from pcafast.collect.layers import CONVOLUTIONS, LayerChoice, channel_dim, choose_layers
from pcafast.collect.taps import FollowValues, ReachTap, SwapForRelu
from pcafast.errors import ArgumentError, PcafastError, PcafastWarning
from pcafast.statistics import Covariance, GradientCovariance, Statistic, Taylor, save_statistics

LayerStatistics = dict[str, Statistic]


class Collection(Mapping[str, LayerStatistics]):
    """Statistics by their names and by layer, filled while the ``with`` block is open.

    Attributes:
        mask: boolean mask or weights (N, T) over the positions of activations (N, T, C), as for padded sequences,
            which covariances leave out or weigh. It holds for all forward passes until changed.
    """

    def __init__(self, model: nn.Module, layers: LayerChoice | None, templates: Mapping[str, Statistic]) -> None:
        self._model = model
        self._layers = choose_layers(model, layers)
        self._statistics = {name: self._for_layers(name, template) for name, template in templates.items()}
        self._values = FollowValues()
        self._hooks: ExitStack | None = None
        self.mask: Tensor | None = None

    def _for_layers(self, name: str, template: Statistic) -> LayerStatistics:
        """An empty copy of a statistic for each layer that can have it, told how the layer lays out its channels."""
        if not isinstance(template, Statistic):
            raise ArgumentError(f"{name}: expected a statistic such as pcafast.Covariance(), got {template!r}")
        statistics = {}
        for layer, module in self._layers.items():
            if not template.fits(module):
                continue
            settings: dict[str, Any] = {"channel_dim": channel_dim(module)}
            if hasattr(template, "groups"):
                settings["groups"] = getattr(module, "groups", 1)
            statistics[layer] = dataclasses.replace(template, **settings)
            statistics[layer].layer = layer
        if not statistics:
            raise ArgumentError(
                f"{name}: none of the chosen layers ({', '.join(self._layers)}) can have a {type(template).__name__}"
            )
        return statistics

    def __getitem__(self, name: str) -> LayerStatistics:
        """The statistic of every layer, by the layer's name."""
        return self._statistics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)

    def save(self, path: str | Path) -> None:
        """Write all statistics to one .safetensors file, which ``pcafast.load_statistics`` reads."""
        save_statistics(self, path)

    def merge(self, other: Mapping[str, LayerStatistics]) -> None:
        """Take in what another collection of the same statistics has seen."""
        for name, layers in self.items():
            for layer, statistic in layers.items():
                statistic.merge(other[name][layer])

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the statistics of all processes into each of them. All must call it, once, at the end."""
        for layers in self.values():
            for statistic in layers.values():
                statistic.all_reduce(group)

    def __enter__(self) -> "Collection":
        if self._hooks is not None:
            raise PcafastError("This collection is already open.")
        _refuse_compiled(self._model)
        with ExitStack() as hooks:
            for layer, module in self._layers.items():
                watched = [layers[layer] for layers in self.values() if layer in layers]
                after = partial(self._after_layer, layer, watched)
                hooks.callback(module.register_forward_hook(after, with_kwargs=True).remove)
            hooks.callback(self._model.register_forward_pre_hook(self._before_forward).remove)
            hooks.callback(self._model.register_forward_hook(self._after_forward).remove)
            hooks.callback(self._values.clear)
            if self._needs_following():
                hooks.enter_context(self._values)
            self._hooks = hooks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hooks is not None
        hooks, self._hooks = self._hooks, None
        with hooks:
            if error is None:
                self._values.end()
        if error is None:
            self._report_skipped()

    def _needs_following(self) -> bool:
        return any(
            statistic.tap != "layer" or isinstance(statistic, Taylor)
            for layers in self.values()
            for statistic in layers.values()
        )

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if not _in_backward():
            self._values.clear()  # what an earlier forward that raised has left

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
        if not _in_backward():
            self._values.end()

    def _after_layer(
        self, layer: str, statistics: list[Statistic], module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        # A forward inside of a backward is a recomputed one, as of activation checkpointing, and was counted before.
        recomputed = _in_backward()
        for statistic in statistics:
            if isinstance(statistic, Covariance) and statistic.side == "input":
                if not recomputed:
                    self._update(statistic, module, _tensor(layer, "input", *args, *kwargs.values()))
                continue
            value = _tensor(layer, "output", output)
            reached: Callable[[Tensor], None]
            if statistic.needs_gradient:
                if not value.requires_grad:
                    continue
                reached = partial(self._await_gradient, statistic, module)
            elif recomputed:
                continue
            else:
                reached = partial(self._update, statistic, module)
            if statistic.tap == "layer":
                reached(value)
            else:
                self._values.add(ReachTap(value, layer, statistic.tap, reached))

    def _await_gradient(self, statistic: Statistic, module: nn.Module, activation: Tensor) -> None:
        # A hook of the tensor and not of the module: module hooks do not bear an in-place operation next.
        if isinstance(statistic, Taylor):
            kept = KeptActivation(statistic.layer, activation)
            self._values.add(SwapForRelu(activation, kept))

            def take(gradient: Tensor) -> None:
                statistic.update(kept.take(), gradient)

        else:
            weight = self._weight(module, activation)

            def take(gradient: Tensor) -> None:
                self._update(statistic, module, gradient, weight)

        def on_gradient(gradient: Tensor) -> None:
            if self._hooks is not None:
                with torch.no_grad():
                    take(gradient.detach())

        _check_layout(statistic.layer, module, activation)
        activation.register_hook(on_gradient)

    def _update(self, statistic: Statistic, module: nn.Module, x: Tensor, weight: Tensor | None = None) -> None:
        _check_layout(statistic.layer, module, x)
        if isinstance(statistic, Covariance | GradientCovariance):
            statistic.update(x.detach(), weight=self._weight(module, x) if weight is None else weight)
        else:
            statistic.update(x.detach())  # type: ignore[attr-defined]

    def _weight(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The mask, if the activation has as many dimensions of positions as the mask."""
        if self.mask is None or channel_dim(module) != -1 or x.ndim != self.mask.ndim + 1:
            return None
        if x.shape[:-1] != self.mask.shape:
            raise ArgumentError(
                f"mask: expected the positions {tuple(x.shape[:-1])} of the activation, got {tuple(self.mask.shape)}"
            )
        return self.mask

    def _report_skipped(self) -> None:
        for name, layers in self.items():
            skipped = [f"{layer} ({one.skipped})" for layer, one in layers.items() if one.skipped]
            if skipped:
                warnings.warn(
                    f"{name}: NaN or infinities were left out, in layers (times): {', '.join(skipped)}",
                    PcafastWarning,
                    stacklevel=3,
                )


def collect(model: nn.Module, *, layers: LayerChoice | None = None, **statistics: Statistic) -> Collection:
    """Collect statistics of a model's layers while it trains or runs.

    ::

        with pcafast.collect(model, covariance=pcafast.Covariance(), taylor=pcafast.Taylor()) as stats:
            for images, labels in loader:
                criterion(model(images), labels).backward()
        stats["covariance"]["layer1.0.conv1"].compute()

    Nothing of the model is changed, and after the block nothing is left behind. A layer that is called twice counts
    twice; a forward recomputed for the backward (activation checkpointing) counts once.

    Args:
        model: the eager module; with torch.compile or a distributed wrapper, the module inside of it.
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


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensor(layer: str, what: str, *values: Any) -> Tensor:
    if not values or not isinstance(values[0], Tensor):
        found = type(values[0]).__name__ if values else "nothing"
        raise ArgumentError(f"layers: the {what} of layer {layer!r} is expected to be a tensor, got {found}")
    return values[0]


def _check_layout(layer: str, module: nn.Module, x: Tensor) -> None:
    for kind, spatial in CONVOLUTIONS.items():
        if isinstance(module, kind) and x.ndim != spatial + 2:
            raise ArgumentError(
                f"layer {layer!r}: expected a batch of {spatial + 2} dimensions, got shape {tuple(x.shape)}"
            )


def _refuse_compiled(model: nn.Module) -> None:
    if any(getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in model.modules()):
        raise ArgumentError(
            "model: torch.compile leaves hooks out, so expected the eager module: the one given to torch.compile, "
            "or compiled._orig_mod"
        )
