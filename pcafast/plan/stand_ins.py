"""The model as the dependency graph is to see it: its inputs, outputs and paddings of channels told by layers.

A graph of layers knows nothing of where the model ends, and takes a padding of channels for an element-wise operation.
So layers are put beside every input and after every output, and a padding becomes the concatenation that it is, with
two layers in the place of the zeros. As all of these layers are zero, the model computes what it always does.
"""

from collections.abc import Iterator, Sequence
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
_PADDINGS = {"pad": ("input", "pad", "mode", "value"), "constant_pad_nd": ("input", "pad", "value")}


class Surrounded(nn.Module):
    """A model between stand-ins.

    Attributes:
        stems: for each input, the layers whose outputs are added to it.
        heads: for each output, the layers that it goes into.
        pads: the paddings of channels, in the order of their calls.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        self.stems = nn.ModuleList(_layers_on(one, same_width=True) for one in inputs)
        watch = _ChannelPads(self.model)
        with evaluating(model), torch.no_grad(), watch.named(), watch:
            outputs = model(*inputs)
        self.pads = nn.ModuleList(watch.pads)
        self.heads = nn.ModuleList(_layers_on(leaf, same_width=False) for leaf in _tensors(outputs))

    def forward(self, *inputs: Any) -> list[Tensor]:
        """What the heads make of the model's outputs."""
        inputs = tuple(sum((layer(x) for layer in stem), x) for stem, x in _pairs(self.stems, inputs))
        with _Replaced(self.pads):
            outputs = _tensors(self.model(*inputs))
        if not outputs or not all(output.requires_grad for output in outputs):
            raise ArgumentError(
                "model: expected an output that autograd can follow back to the parameters, since the graph is read "
                "off it; some output is detached, or made outside of torch. plan_low_rank needs no graph."
            )
        return [out for head, x in _pairs(self.heads, outputs) for out in [layer(x) for layer in head] or [x]]


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


class _Pads(TorchFunctionMode):
    """Sees every padding with constants that adds channels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = _PADDINGS.get(getattr(func, "__name__", ""))
        if names is None:
            return func(*args, **kwargs)
        rest = {**dict(zip(names, args, strict=False)), **kwargs}
        x, pad = rest.pop("input"), list(rest.pop("pad"))
        place = 2 * x.ndim - 4
        added = pad[place : place + 2]
        constant = rest.get("mode", "constant") == "constant"
        if x.ndim not in _CONVOLUTIONS or not constant or len(added) < 2 or min(added) < 0:
            return func(*args, **kwargs)
        pad[place : place + 2] = [0, 0]
        return self.padded(func(x, pad, **rest), *added)

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


def _pairs(layers: nn.ModuleList, tensors: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(layers, tensors, strict=True)


def _layers_on(x: Any, *, same_width: bool) -> nn.ModuleList:
    """Layers over the channels of such a tensor, if it has any: of three dimensions, either of two may be theirs."""
    layers = nn.ModuleList()
    if isinstance(x, Tensor) and x.is_floating_point():
        if x.ndim in _CONVOLUTIONS:
            layers.append(_convolution(x, x.shape[1] if same_width else 1))
        if 0 < x.ndim < 4:
            layers.append(_zero(nn.Linear, x.shape[-1], x.shape[-1] if same_width else 1, like=x))
    return layers


def _convolution(x: Tensor, width: int) -> nn.Module:
    return _zero(_CONVOLUTIONS[x.ndim], x.shape[1], width, 1, like=x)


def _zero(kind: type[nn.Module], *sizes: int, like: Tensor) -> nn.Module:
    # Without the initialisation, which would draw random numbers.
    layer: nn.Module = nn.utils.skip_init(kind, *sizes, device=like.device, dtype=like.dtype)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
