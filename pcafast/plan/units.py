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
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from pcafast.errors import ArgumentError
from pcafast.modes import evaluating
from pcafast.plan.slices import groups_of, inputs_of, is_channelwise, is_mixing, loses_whole_groups, outputs_of
from pcafast.plan.stand_ins import ChannelPad, Surrounded

Side = Literal["output", "input"]
SIDES: tuple[Side, Side] = ("output", "input")


class Place(NamedTuple):
    """One side of a module; modules that do not mix channels, and parameters of no known module, have outputs only."""

    name: str
    side: Side


Channel = tuple[Place, int]
Unit = Mapping[Place, list[int]]

# Names of what is not in the model start with a "#", which no name of a module does.
_END, _PAD_IN_CODE, _OPERATION = "#end", "#pad", "#operation"
_REASONS = {
    _END: "its channels are those of the model's output or input",
    _PAD_IN_CODE: "its channels lie where the model's code pads by a fixed number; an nn.ZeroPad3d could change",
}


@dataclass(frozen=True)
class Units:
    """What can be removed.

    Attributes:
        units: the channels of each unit, by place; in the order of the model.
        obstacles: for layers some of whose outputs must stay: why.
        parameter_dims: for parameters of no known module, the dimension of their channels.
        reached: the modules that the graph contains.
    """

    units: list[Unit]
    obstacles: dict[str, str]
    parameter_dims: dict[str, int]
    reached: frozenset[str]


def find_units(model: nn.Module, inputs: tuple[Any, ...]) -> Units:
    """Trace a copy of the model on the inputs and find its units.

    Raises:
        ArgumentError: the model cannot be traced.
    """
    surrounded = Surrounded(_trainable_copy(model), inputs)
    graph = _traced(surrounded, inputs)
    names = _Names(surrounded)
    sets = _Sets()
    for channel, other in _ties(list(graph.module2node.values()), names):
        sets.join(channel, other)
    unfit = _unfit_modules(model)
    units: list[Unit] = []
    obstacles: dict[str, str] = {}
    for channels in sets:
        unit: dict[Place, list[int]] = defaultdict(list)
        for place, index in sorted(channels):
            if not place.name.startswith("#"):
                unit[place].append(index)
        places = sorted({place for place, _ in channels})
        reasons = [why for kind, why in _REASONS.items() if any(place.name.startswith(kind) for place in places)]
        reasons += [unfit[place.name] for place in places if place.name in unfit]
        if reasons:
            obstacles |= {place.name: reasons[0] for place in unit if place.side == "output"}
        elif any(place.side == "output" for place in unit):
            units.append(dict(unit))
    order = {name: number for number, name in enumerate(names.real)}
    units.sort(key=lambda unit: min((order[place.name], place.side, indices[0]) for place, indices in unit.items()))
    dims = {
        names.of[id(node.module)]: node.pruning_dim
        for node in graph.module2node.values()
        if isinstance(node.module, nn.Parameter)
    }
    reached = frozenset(names.of[id(module)] for module in graph.module2node if id(module) in names.of)
    return Units(units, obstacles, dims, reached)


def _trainable_copy(model: nn.Module) -> nn.Module:
    # The graph is read off autograd, which leaves frozen parameters out.
    copy = deepcopy(model)
    for parameter in copy.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()
    return copy


def _traced(surrounded: Surrounded, inputs: tuple[Any, ...]) -> Any:
    from torch_pruning import DependencyGraph  # takes a second to import

    def forward(model: nn.Module, given: Any) -> Any:
        with evaluating(model):
            return model(*given)

    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return DependencyGraph().build_dependency(surrounded, inputs, forward_fn=forward, verbose=False)
    except ArgumentError:
        raise
    except Exception as error:
        raise ArgumentError(
            f"model: its graph of layers cannot be traced on the example input ({type(error).__name__}: {error}). "
            "plan_low_rank needs no graph."
        ) from error


class _Names:
    """What the nodes of the graph are called.

    Attributes:
        real: the names of modules and parameters of the model, in its order.
        of: the same by the identity of the module or parameter.
    """

    def __init__(self, surrounded: Surrounded) -> None:
        things = [*surrounded.model.named_modules(), *surrounded.model.named_parameters()]
        self.real = [name for name, _ in things if name]
        self.of = {id(thing): name for name, thing in things if name}
        # Of a stand-in, the side that the model sees: its name and the number of its first channel.
        self._seen: dict[tuple[int, Side], tuple[str, int]] = {}
        for layer in surrounded.heads.modules():
            self._seen[id(layer), "input"] = f"{_END} {id(layer)}", 0
        for layer in surrounded.stems.modules():
            self._seen[id(layer), "output"] = f"{_END} {id(layer)}", 0
        for number, pad in enumerate(surrounded.pads):
            assert isinstance(pad, ChannelPad)
            first = 0
            for layer in pad.added.values():
                self._seen[id(layer), "output"] = pad.owner or f"{_PAD_IN_CODE} {number}", first
                first += outputs_of(layer)

    def channel(self, node: Any, side: Side, index: int) -> Channel:
        """The channel of that number on a side of the node."""
        thing = id(node.module)
        if (thing, side) in self._seen:
            name, first = self._seen[thing, side]
            return Place(name, "output"), first + index
        name = self.of.get(thing, f"{_OPERATION} {thing}")
        return Place(name, side if is_mixing(node.module) else "output"), index


def _ties(nodes: list[Any], names: _Names) -> Iterator[tuple[Channel, Channel]]:
    """Pairs of channels of which none can be removed without the other."""
    from torch_pruning._helpers import _HybridIndex

    waiting: list[tuple[Any, Side, list[int]]] = []
    seen: dict[tuple[Any, Side], set[int]] = defaultdict(set)

    def reach(node: Any, side: Side, indices: list[int]) -> None:
        side = side if is_mixing(node.module) else "output"
        new = [index for index in indices if index not in seen[node, side]]
        if new:
            seen[node, side].update(new)
            waiting.append((node, side, new))

    for node in nodes:
        if is_mixing(node.module):
            reach(node, "output", list(range(outputs_of(node.module))))
            reach(node, "input", list(range(inputs_of(node.module))))
            yield from _tied_by_groups(node, names)
        elif is_channelwise(node.module):
            reach(node, "output", list(range(outputs_of(node.module))))
            yield from _tied_by_groups(node, names)
    while waiting:
        node, side, indices = waiting.pop()
        for dependency, from_side, to_side in _edges(node):
            if is_mixing(node.module) and from_side != side:
                continue
            mapped = [_HybridIndex(idx=index, root_idx=index) for index in indices]
            for mapping in dependency.index_mapping:
                mapped = mapped if mapping is None else mapping(mapped)
            for one in mapped:
                yield names.channel(node, side, one.root_idx), names.channel(dependency.target, to_side, one.idx)
            reach(dependency.target, to_side, [one.idx for one in mapped])


def _edges(node: Any) -> Iterator[tuple[Any, Side, Side]]:
    """The node's dependencies, with the side of the node and that of the other end: first the inputs, as built."""
    for number, dependency in enumerate(node.dependencies):
        if number < len(node.inputs):
            yield dependency, "input", "output"
        else:
            yield dependency, "output", "input"


def _tied_by_groups(node: Any, names: _Names) -> Iterator[tuple[Channel, Channel]]:
    module = node.module
    groups = groups_of(module)
    if groups == 1:
        return
    sides: dict[Side, int] = {"output": outputs_of(module)}
    if is_mixing(module):
        sides["input"] = inputs_of(module)
    for side, channels in sides.items():
        width = channels // groups
        for index in range(channels):
            if loses_whole_groups(module):
                yield (
                    names.channel(node, "output", index // width * (sides["output"] // groups)),
                    names.channel(node, side, index),
                )
            else:
                yield names.channel(node, side, index % width), names.channel(node, side, index)


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
    """Modules that channels cannot be cut out of, and why."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {name: reason for name, module in model.named_modules() if (reason := _unfit(module, owners))}


def _unfit(module: nn.Module, owners: Counter[int]) -> str | None:
    own = dict(module.named_parameters(recurse=False))
    if not is_mixing(module) and not is_channelwise(module):
        listed = isinstance(module, nn.MultiheadAttention | nn.RNNBase | nn.Embedding)
        return f"channels of a {type(module).__name__} cannot be removed" if listed else None
    if any(owners[id(parameter)] > 1 for parameter in own.values()):
        return "it shares its weight or bias with another layer"
    if is_mixing(module) and "weight" not in own:
        return "its weight is computed from other parameters"
    if any(type(parameter) is not nn.Parameter or not parameter.is_floating_point() for parameter in own.values()):
        return "its parameters are not plain tensors of floats"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return "it normalises over positions and channels at once"
    return None
