"""The smallest sets of channels that can be removed: channels that depend on each other go together.

The dependencies between layers are those of torch-pruning's DependencyGraph (Fang et al. 2023, arXiv 2301.12900). They
are followed channel by channel, so that a channel that meets others in one place only, as where channels are
concatenated or padded, is tied to those and to no others.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pcafast.errors import ArgumentError
from pcafast.modes import evaluating
from pcafast.plan.slices import is_channelwise, is_mixing
from pcafast.plan.stand_ins import Surrounded
from pcafast.plan.ties import END, LOST, PAD_IN_CODE, Channel, Names, Place, ties

Unit = Mapping[Place, list[int]]

_REASONS = {
    END: "its channels are those of the model's output or input",
    PAD_IN_CODE: "its channels lie where the model's code pads by a fixed number; an nn.ZeroPad3d could change",
}


@dataclass(frozen=True)
class Units:
    """What can be removed.

    Attributes:
        units: the channels of each unit, by place; in the order of the model.
        obstacles: for layers some of whose outputs must stay: why.
        parameter_dims: for parameters of no known module, the dimension of their channels.
        norms: for layers whose output goes into a batch norm with running statistics and nowhere else: its name.
        reached: the modules that the graph contains.
    """

    units: list[Unit]
    obstacles: dict[str, str]
    parameter_dims: dict[str, int]
    norms: dict[str, str]
    reached: frozenset[str]


def find_units(model: nn.Module, inputs: tuple[Any, ...]) -> Units:
    """Trace a copy of the model on the inputs and find its units.

    Raises:
        ArgumentError: the model cannot be traced.
    """
    surrounded, nodes = _traced(model, inputs)
    names = Names(surrounded)
    sets = _Sets()
    for channel, other in ties(nodes, names):
        sets.join(channel, other)
    unfit = _unfit_modules(model)
    units: list[Unit] = []
    obstacles: dict[str, str] = {}
    for channels in sets:
        unit: dict[Place, list[int]] = defaultdict(list)
        for place, index in sorted(channels):
            if not place.name.startswith("#"):
                unit[place].append(index)
        if reason := _obstacle(sorted({place.name for place, _ in channels}), unfit):
            obstacles |= {place.name: reason for place in unit if place.side == "output"}
        elif any(place.side == "output" for place in unit):
            units.append(dict(unit))
    order = {name: number for number, name in enumerate(names.real)}
    units.sort(key=lambda unit: min((order[place.name], place.side, indices[0]) for place, indices in unit.items()))
    named = {names.of[id(node.module)]: node for node in nodes if id(node.module) in names.of}
    return Units(
        units,
        obstacles,
        {name: node.pruning_dim for name, node in named.items() if isinstance(node.module, nn.Parameter)},
        {name: names.of[id(norm.module)] for name, node in named.items() if (norm := _norm_after(node))},
        frozenset(named),
    )


def _norm_after(node: Any) -> Any:
    """The batch norm with running statistics that is alone in taking in what the layer puts out, and takes no other."""
    if not is_mixing(node.module) or len(node.outputs) != 1:
        return None
    after = node.outputs[0]
    tracks = isinstance(after.module, _BatchNorm) and after.module.running_mean is not None
    return after if tracks and after.inputs == [node] else None


def _obstacle(names: list[str], unfit: Mapping[str, str]) -> str | None:
    """Why channels that lie in these places must stay, if they must."""
    reasons = [why for kind, why in _REASONS.items() if any(name.startswith(kind) for name in names)]
    reasons += [unfit[name] for name in names if name in unfit]
    reasons += [
        f"its channels cannot be followed through {name.removeprefix(LOST).strip()}"
        for name in names
        if name.startswith(LOST)
    ]
    return next(iter(reasons), None)


def _readable_copy(model: nn.Module) -> nn.Module:
    """A copy of the model whose graph can be read off autograd."""
    copy = deepcopy(model)
    for parameter in copy.parameters():
        if parameter.is_floating_point():
            # Frozen ones would be left out. Single numbers have no channels, and torch-pruning stumbles over them.
            parameter.requires_grad_(parameter.numel() > 1)
    for module in copy.modules():
        if is_mixing(module) or is_channelwise(module):
            # What an operation in place changes can no longer be told by its origin, if that is a view.
            module.register_forward_hook(lambda _module, _args, output: output.clone() if output._is_view() else output)
    return copy


def _traced(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Surrounded, list[Any]]:
    """A copy of the model with its stand-ins, and the nodes of its graph."""
    from torch_pruning import DependencyGraph  # takes a second to import

    def forward(model: nn.Module, given: Any) -> Any:
        with evaluating(model):
            return model(*given)

    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            surrounded = Surrounded(_readable_copy(model), inputs)
            graph = DependencyGraph().build_dependency(surrounded, inputs, forward_fn=forward, verbose=False)
    except ArgumentError:
        raise
    except Exception as error:
        raise ArgumentError(
            f"model: its graph of layers cannot be traced on the example input ({type(error).__name__}: {error}). "
            "plan_low_rank needs no graph."
        ) from error
    return surrounded, list(graph.module2node.values())


class _Sets:
    """Disjoint sets of channels, joined pair by pair."""

    def __init__(self) -> None:
        self._parent: dict[Channel, Channel] = {}

    def join(self, one: Channel, other: Channel) -> None:
        """Put the sets of both into one."""
        self._parent[self._root(one)] = self._root(other)

    def _root(self, channel: Channel) -> Channel:
        root = channel
        while (parent := self._parent.setdefault(root, root)) != root:
            root = parent
        while (parent := self._parent[channel]) != root:
            self._parent[channel], channel = root, parent
        return root

    def __iter__(self) -> Iterator[list[Channel]]:
        members: dict[Channel, list[Channel]] = defaultdict(list)
        for channel in self._parent:
            members[self._root(channel)].append(channel)
        return iter(members.values())


def _unfit_modules(model: nn.Module) -> dict[str, str]:
    """Modules that channels cannot be cut out of, and their parameters, and why."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    unfit: dict[str, str] = {}
    for name, module in model.named_modules():
        if reason := _unfit(module, owners):
            parameters = (full for full, _ in module.named_parameters(name, recurse=False))
            unfit |= dict.fromkeys((name, *parameters), reason)
    return unfit


def _unfit(module: nn.Module, owners: Counter[int]) -> str | None:
    own = dict(module.named_parameters(recurse=False))
    if not is_mixing(module) and not is_channelwise(module):
        listed = isinstance(module, nn.MultiheadAttention | nn.RNNBase | nn.Embedding | nn.RMSNorm)
        return f"channels of nn.{type(module).__name__} cannot be removed" if listed else None
    if any(owners[id(parameter)] > 1 for parameter in own.values()):
        return "it shares its weight or bias with another layer"
    if is_mixing(module) and "weight" not in own:
        return "its weight is computed from other parameters"
    if any(type(parameter) is not nn.Parameter or not parameter.is_floating_point() for parameter in own.values()):
        return "its parameters are not plain tensors of floats"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return "it normalises over positions and channels at once"
    return None
