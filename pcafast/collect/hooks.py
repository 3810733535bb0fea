"""The hooks: handing every watched layer's input, output and gradient to its statistics."""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pcafast.collect.kept import KeptActivation
from pcafast.collect.layers import CONVOLUTIONS
from pcafast.collect.taps import CopyBeforeOverwriting, FollowValues, ReachTap, SwapForRelu
from pcafast.errors import ArgumentError, PcafastError
from pcafast.statistics import ActivationGradient, Covariance, GradientCovariance, Statistic, Taylor


class Hooks:
    """Hooks on a model, there while the ``with`` block is open.

    Attributes:
        mask: weights over positions, or None; see ``Collection``.
    """

    def __init__(self, model: nn.Module, watched: Mapping[str, list[Statistic]]) -> None:
        self._model = model
        self._watched = watched
        self._values = FollowValues()
        self._open: ExitStack | None = None
        self._depth = 0
        self._batch_size: int | None = None
        self.mask: Tensor | None = None

    def __enter__(self) -> None:
        if self._open is not None:
            raise PcafastError("This collection is already open.")
        _refuse_compiled(self._model)
        with ExitStack() as hooks:
            for layer, statistics in self._watched.items():
                self._watch(hooks, self._model.get_submodule(layer), statistics)
            # Not of the model alone, since a loop may call parts of it only.
            for name in {ancestor for layer in self._watched for ancestor in _ancestors(layer)}:
                module = self._model.get_submodule(name)
                before, after = _Hook(self._before_forward), _Hook(self._after_forward)
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(after, always_call=True).remove)
            if any(_follows_values(one) for many in self._watched.values() for one in many):
                hooks.enter_context(self._values)
            self._depth = 0
            self._open = hooks.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._open is not None
        hooks, self._open = self._open, None
        try:
            if error is None:
                with torch._C.DisableTorchFunction():
                    self._values.end()
        finally:
            self._values.clear()
            hooks.close()

    def _watch(self, hooks: ExitStack, module: nn.Module, statistics: list[Statistic]) -> None:
        for statistic in statistics:
            if statistic.side == "output":
                hooks.callback(module.register_forward_hook(_Hook(self._after_layer, statistic)).remove)
            elif isinstance(statistic, ActivationGradient):
                hook = _Hook(self._around_layer, statistic)
                hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            else:
                hook = _Hook(self._before_layer, statistic)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._depth == 0 and not _in_backward():
            sizes = [leaf.shape[0] for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
            self._batch_size = sizes[0] if sizes else None
        self._depth += 1

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            failed = output is None and sys.exc_info()[0] is not None
            with torch._C.DisableTorchFunction():
                self._values.clear() if failed else self._values.end()

    def _before_layer(self, statistic: Statistic, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not _in_backward():
            with torch._C.DisableTorchFunction():
                self._update(statistic, module, _tensor(statistic, "input", *args, *kwargs.values()))

    def _after_layer(self, statistic: Statistic, module: nn.Module, args: Any, output: Any) -> None:
        with torch._C.DisableTorchFunction():  # what is done here is no use of the value
            self._send(statistic, module, _tensor(statistic, "output", output))

    def _around_layer(
        self, statistic: ActivationGradient, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        with torch._C.DisableTorchFunction():
            x = _tensor(statistic, "input", *args, *kwargs.values())
            output = _tensor(statistic, "output", output)
            if output.requires_grad:
                _check_layout(statistic, module, x)
                kept = KeptActivation(statistic.layer, x, "input")
                batch_size = self._batch_size if self._depth else None
                self._on_gradient(statistic, output, partial(_update_input, statistic, module, kept, batch_size))

    def _send(self, statistic: Statistic, module: nn.Module, value: Tensor) -> None:
        reached: Callable[[Tensor], None]
        if statistic.needs_gradient:
            if not value.requires_grad:
                return
            reached = partial(self._await_gradient, statistic, module)
        elif _in_backward():
            return  # recomputed, as by activation checkpointing, and counted before
        else:
            reached = partial(self._update, statistic, module)
        if statistic.tap == "layer":
            reached(value)
        else:
            self._values.add(ReachTap(value, statistic.layer, statistic.tap, reached))

    def _await_gradient(self, statistic: Statistic, module: nn.Module, activation: Tensor) -> None:
        _check_layout(statistic, module, activation)
        batch_size = self._batch_size if self._depth else None
        take: Callable[[Tensor], None]
        if isinstance(statistic, GradientCovariance):
            weight = self._weight(statistic, activation)
            take = partial(statistic.update, weight=weight, batch_size=batch_size)
        else:
            assert isinstance(statistic, Taylor | ActivationGradient)
            kept = KeptActivation(statistic.layer, activation)
            swaps = isinstance(statistic, Taylor)
            self._values.add(
                SwapForRelu(activation, kept, self._values) if swaps else CopyBeforeOverwriting(activation, kept)
            )
            take = partial(_update_output, statistic, kept, batch_size)
        self._on_gradient(statistic, activation, take)

    def _on_gradient(self, statistic: Statistic, output: Tensor, take: Callable[[Tensor], None]) -> None:
        """Give the gradient of the output to ``take`` when it comes."""
        came = False

        def on_gradient(gradient: Tensor) -> None:
            nonlocal came
            if self._open is None:
                return
            if came:
                raise PcafastError(
                    f"A second backward pass reached layer {statistic.layer!r} after one forward pass, and "
                    f"{type(statistic).__name__} takes one. Add up the losses and call backward once, or leave the "
                    "extra pass (retain_graph, create_graph) out of the collect block."
                )
            came = True
            with torch.no_grad(), torch._C.DisableTorchFunction():
                take(gradient.detach())

        # A hook of the tensor and not of the module: module hooks do not bear an in-place operation next.
        output.register_hook(on_gradient)

    def _update(self, statistic: Any, module: nn.Module, x: Tensor) -> None:
        _check_layout(statistic, module, x)
        if isinstance(statistic, Covariance):
            statistic.update(x.detach(), weight=self._weight(statistic, x))
        else:
            statistic.update(x.detach())

    def _weight(self, statistic: Statistic, x: Tensor) -> Tensor | None:
        """The mask, if the activation has as many dimensions of positions as the mask."""
        if self.mask is None or statistic.channel_dim != -1 or x.ndim != self.mask.ndim + 1:
            return None
        if x.shape[:-1] != self.mask.shape:
            raise ArgumentError(
                f"mask: expected the positions {tuple(x.shape[:-1])} of the activation, got {tuple(self.mask.shape)}"
            )
        return self.mask


class _Hook(partial[Any]):
    """A hook that copies of the model, made or saved while the block is open, do not have."""

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any, **__: Any) -> None: ...


def _ancestors(layer: str) -> list[str]:
    """The names of the modules around a layer, the model itself ("") included."""
    parts = layer.split(".") if layer else []
    return [".".join(parts[:count]) for count in range(max(len(parts), 1))]


def _follows_values(statistic: Statistic) -> bool:
    by_activation = isinstance(statistic, Taylor | ActivationGradient)
    return statistic.side == "output" and (statistic.tap != "layer" or by_activation)


def _update_output(
    statistic: Taylor | ActivationGradient, kept: KeptActivation, batch_size: int | None, gradient: Tensor
) -> None:
    statistic.update(kept.take(), gradient, batch_size=batch_size)


def _update_input(
    statistic: ActivationGradient, module: Any, kept: KeptActivation, batch_size: int | None, gradient: Tensor
) -> None:
    statistic.update(kept.take(), gradient, layer_weight=module.weight, batch_size=batch_size)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensor(statistic: Statistic, what: str, *values: Any) -> Tensor:
    if not values or not isinstance(values[0], Tensor):
        found = type(values[0]).__name__ if values else "nothing"
        raise ArgumentError(f"layers: the {what} of layer {statistic.layer!r} is expected to be a tensor, got {found}")
    return values[0]


def _check_layout(statistic: Statistic, module: nn.Module, x: Tensor) -> None:
    spatial = CONVOLUTIONS.get(type(module))
    if spatial is not None and x.ndim != spatial + 2:
        raise ArgumentError(
            f"layer {statistic.layer!r}: expected a batch of {spatial + 2} dimensions, got shape {tuple(x.shape)}"
        )


def _refuse_compiled(model: nn.Module) -> None:
    if any(getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in model.modules()):
        raise ArgumentError(
            "model: torch.compile leaves hooks out, so expected the eager module (the one given to torch.compile, or "
            "compiled._orig_mod), and that one to be called inside the block"
        )
