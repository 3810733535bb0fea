"""The model as the dependency graph is to see it: its inputs, outputs and paddings of channels told by layers.

A graph of layers knows nothing of where the model ends, and takes a padding of channels for an element-wise operation.
So a layer is put before every input and after every output, and a padding becomes the concatenation that it is,
with two layers in the place of the zeros.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.padding import _ConstantPadNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pcafast.errors import ArgumentError
from pcafast.modes import evaluating

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    3: nn.Conv1d,
    4: nn.Conv2d,
    5: nn.Conv3d,
}


class Surrounded(nn.Module):
    """A model between stand-ins.

    Attributes:
        stems: layers before the inputs.
        heads: layers after the outputs.
        pads: the paddings of channels, in the order of their calls.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        self.stems = nn.ModuleList(_layer_on(one, same_width=True) for one in inputs)
        watch = _ChannelPads(self.model)
        with evaluating(model), torch.no_grad(), watch.named(), watch:
            outputs = model(*inputs)
        self.pads = nn.ModuleList(watch.pads)
        self.heads = nn.ModuleList(_layer_on(leaf, same_width=False) for leaf in _tensors(outputs))

    def forward(self, *inputs: Any) -> list[Tensor]:
        """What the heads make of the model's outputs."""
        inputs = tuple(stem(one) for stem, one in zip(self.stems, inputs, strict=True))
        with _Replaced(self.pads):
            outputs = _tensors(self.model(*inputs))
        if not outputs or not all(output.requires_grad for output in outputs):
            raise ArgumentError(
                "model: expected an output that autograd can follow back to the parameters, since the graph is read "
                "off it; some output is detached, or made outside of torch. plan_low_rank needs no graph."
            )
        return [head(output) for head, output in zip(self.heads, outputs, strict=True)]


class ChannelPad(nn.Module):
    """Channels put before and after those of the input, as a padding does with zeros.

    Attributes:
        owner: the name of the padding module, or "" for a call in some forward.
    """

    def __init__(self, owner: str, x: Tensor, before: int, after: int) -> None:
        super().__init__()
        self.owner = owner
        widths = {"before": before, "after": after}
        self.added = nn.ModuleDict({name: _convolution(x, width) for name, width in widths.items() if width})

    def forward(self, x: Tensor) -> Tensor:
        """The input with channels on both sides."""
        parts = {"before": None, "middle": x, "after": None} | {name: layer(x) for name, layer in self.added.items()}
        return torch.cat([part for part in parts.values() if part is not None], 1)


class _Sum(nn.Module):
    """Layers side by side: of three dimensions, either of two may be that of the channels."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        """The sum of what they make of the input."""
        return sum(part(x) for part in self.parts)


class _Pads(TorchFunctionMode):
    """Sees every padding with constants that adds channels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ("pad", "constant_pad_nd"):
            return func(*args, **kwargs)
        named = {**dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **kwargs}
        x, pad = named["input"], list(named["pad"])
        if len(pad) < 2 * (x.ndim - 1) or x.ndim not in _CONVOLUTIONS or min(pad[2 * x.ndim - 4 :][:2]) < 0:
            return func(*args, **kwargs)
        place = 2 * x.ndim - 4
        before, after = pad[place : place + 2]
        pad[place : place + 2] = [0, 0]
        rest = {key: value for key, value in named.items() if key not in ("input", "pad")}
        spatial = func(x, pad, **rest)
        return self.padded(spatial, before, after)

    def padded(self, x: Tensor, before: int, after: int) -> Tensor:
        raise NotImplementedError


class _ChannelPads(_Pads):
    """Notes the paddings, and the modules they belong to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pads: list[ChannelPad] = []
        self._model = model
        self._running = ""

    @contextmanager
    def named(self) -> Iterator[None]:
        """While it is open, calls are known to come from the padding modules of the model."""
        handles = []
        for name, module in self._model.named_modules():
            if isinstance(module, _ConstantPadNd):
                handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
                handles.append(module.register_forward_hook(lambda *_: self._enter("")))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> None:
        self._running = name

    def padded(self, x: Tensor, before: int, after: int) -> Tensor:
        self.pads.append(ChannelPad(self._running, x, before, after))
        out: Tensor = self.pads[-1](x)
        return out


class _Replaced(_Pads):
    """Lets the stand-ins do what the paddings do."""

    def __init__(self, pads: nn.ModuleList) -> None:
        super().__init__()
        self._pads = iter(pads)

    def padded(self, x: Tensor, before: int, after: int) -> Tensor:
        out: Tensor = next(self._pads)(x)
        return out


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _layer_on(x: Any, *, same_width: bool) -> nn.Module:
    """A layer over the channels of such a tensor; nothing where there are none."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or x.ndim > 5:
        return nn.Identity()
    parts = []
    if x.ndim > 2:
        parts.append(_convolution(x, x.shape[1] if same_width else 1))
    if x.ndim < 4:
        parts.append(nn.Linear(x.shape[-1], x.shape[-1] if same_width else 1, device=x.device, dtype=x.dtype))
    return _Sum(parts)


def _convolution(x: Tensor, width: int) -> nn.Module:
    return _CONVOLUTIONS[x.ndim](x.shape[1], width, 1, device=x.device, dtype=x.dtype)
