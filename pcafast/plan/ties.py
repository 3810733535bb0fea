"""Which channels cannot be removed without each other, pair by pair, along torch-pruning's graph of layers.

The graph says which layers and operations follow each other. Through most operations channel i stays channel i; those
that put channels side by side or flatten them are followed by number. Where no channel of a layer can be what reaches
it, or an operation cuts channels at fixed numbers, everything around it is tied to a place of its own and stays.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn

from pcafast.plan.slices import groups_of, inputs_of, is_channelwise, is_mixing, loses_whole_groups, outputs_of
from pcafast.plan.stand_ins import ChannelPad, Surrounded

Side = Literal["output", "input"]
SIDES: tuple[Side, Side] = ("output", "input")


class Place(NamedTuple):
    """One side of a module; modules that do not mix channels, and parameters of no known module, have outputs only."""

    name: str
    side: Side


Channel = tuple[Place, int]

# Names of what is not in the model start with a "#", which no name of a module does.
END, PAD_IN_CODE, LOST, OPERATION = "#end", "#pad", "#lost", "#operation"


class Names:
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
            self._seen[id(layer), "input"] = f"{END} {id(layer)}", 0
        for layer in surrounded.stems.modules():
            self._seen[id(layer), "output"] = f"{END} {id(layer)}", 0
        for number, pad in enumerate(surrounded.pads):
            assert isinstance(pad, ChannelPad)
            first = 0
            for layer in pad.added.values():
                self._seen[id(layer), "output"] = pad.owner or f"{PAD_IN_CODE} {number}", first
                first += outputs_of(layer)

    def place(self, node: Any, side: Side) -> tuple[Place, int]:
        """What a side of the node is called, and the number that its first channel has there."""
        thing = id(node.module)
        if (thing, side) in self._seen:
            name, first = self._seen[thing, side]
            return Place(name, "output"), first
        one_slope = isinstance(node.module, nn.PReLU) and not is_channelwise(node.module)
        name = f"{OPERATION} {thing}" if one_slope else self.of.get(thing, f"{OPERATION} {thing}")
        return Place(name, side if is_mixing(node.module) else "output"), 0


class _Edge(NamedTuple):
    """From one node to another.

    Attributes:
        side: of the node that it starts from.
        target: the other node.
        target_side: its side.
        shift: what is added to the number of a channel on the way.
        here: the numbers that go this way, if not all do: those of one input of a concatenation.
        there: the numbers that they can have there, if not any.
    """

    side: Side
    target: Any
    target_side: Side
    shift: int
    here: range | None
    there: range | None


def ties(nodes: Sequence[Any], names: Names) -> Iterator[tuple[Channel, Channel]]:
    """Pairs of channels of which none can be removed without the other."""
    edges = _edges(nodes)
    grouping = {node: _grouping(node) for node in nodes}
    lost: set[tuple[Any, Side]] = {(node, "output") for node in nodes if _cuts(node)}
    widest = max((width for node in nodes for side in SIDES if (width := _width(node, side))), default=0)
    seen: dict[tuple[Any, Side], set[int]] = defaultdict(set)
    waiting: list[tuple[Any, Side, list[int]]] = []

    def reach(node: Any, side: Side, indices: Iterable[int]) -> None:
        side = side if is_mixing(node.module) else "output"
        if new := sorted(set(indices) - seen[node, side]):
            seen[node, side].update(new)
            waiting.append((node, side, new))

    for node in nodes:
        if is_mixing(node.module) or is_channelwise(node.module):
            reach(node, "output", range(_width(node, "output") or 0))
            reach(node, "input", range(_width(node, "input") or 0))
            yield from _tied_by_groups(node, names)
    while waiting:
        node, side, indices = waiting.pop()
        for edge in edges[node]:
            if (node, side) in lost or (is_mixing(node.module) and edge.side != side):
                continue
            pairs = _followed(indices, edge, grouping[node][edge.side], grouping[edge.target][edge.target_side])
            width = _width(edge.target, edge.target_side)
            possible = edge.there or range(widest if width is None else width)
            inside = [pair for pair in pairs if pair[1] in possible]
            if len(inside) < len(pairs):
                lost.add((node, side))
            (here, first), (there, first_there) = names.place(node, side), names.place(edge.target, edge.target_side)
            for index, other in inside:
                yield (here, first + index), (there, first_there + other)
            reach(edge.target, edge.target_side, (other for _, other in inside))
    for node, side in lost:
        here, first = names.place(node, side)
        for index in seen[node, side]:
            yield (here, first + index), (Place(f"{LOST} {node.grad_fn.name()}", "output"), 0)


def _edges(nodes: Sequence[Any]) -> Mapping[Any, list[_Edge]]:
    """The edges from each node, to its inputs and to its outputs."""
    edges: dict[Any, list[_Edge]] = defaultdict(list)
    for node in nodes:
        first = 0
        for source, size in zip(node.inputs, _concatenated(node), strict=True):
            numbers = None if size is None else range(first, first + size)
            edges[source].append(_Edge("output", node, "input", first, here=None, there=numbers))
            edges[node].append(_Edge("input", source, "output", -first, here=numbers, there=None))
            first += size or 0
    return edges


def _concatenated(node: Any) -> Sequence[int | None]:
    """The channels of each input, if the node puts them side by side."""
    sizes = getattr(node.module, "concat_sizes", None)
    if sizes and None not in sizes:
        shape, dim = node.grad_fn._input_metadata[0].shape, node.grad_fn._saved_dim
        if sum(sizes) == shape[dim if dim < len(shape) else dim - 2**64]:  # saved without a sign
            return list(sizes)
    return [None] * len(node.inputs)


def _width(node: Any, side: Side) -> int | None:
    """The channels that there are; None for operations."""
    module = node.module
    if isinstance(module, nn.Parameter):
        return int(module.shape[node.pruning_dim])
    if is_mixing(module):
        return outputs_of(module) if side == "output" else inputs_of(module)
    return outputs_of(module) if is_channelwise(module) else None


def _followed(indices: Iterable[int], edge: _Edge, group: int, group_there: int) -> list[tuple[int, int]]:
    """The channels that go this way, each with the numbers that it has at the other end."""
    numbers = [(index, index // group + edge.shift) for index in indices if edge.here is None or index in edge.here]
    return [
        (index, other) for index, number in numbers for other in range(number * group_there, (number + 1) * group_there)
    ]


def _grouping(node: Any) -> Mapping[Side, int]:
    """Of a reshape that makes one dimension of channels and positions, or parts it: how many of these are a channel."""
    old, new = _reshaped(node)
    groups: dict[Side, int] = {"input": 1, "output": 1}
    if old[:1] == new[:1] and len(new) == 2 < len(old) and old[1] > 1:
        groups["input"] = math.prod(old[2:])
    if old[:1] == new[:1] and len(old) == 2 < len(new) and new[1] > 1:
        groups["output"] = math.prod(new[2:])
    return groups


def _reshaped(node: Any) -> tuple[list[int], list[int]]:
    """The shapes before and after; empty if it is not a reshape."""
    from torch_pruning.ops import OPTYPE

    if node.type != OPTYPE.RESHAPE or not hasattr(node.grad_fn, "_saved_self_sym_sizes"):
        return [], []
    return list(node.grad_fn._saved_self_sym_sizes), list(node.grad_fn._input_metadata[0].shape)


def _cuts(node: Any) -> bool:
    """Whether channels are split, sliced or repeated there, which the model's code does at fixed numbers."""
    from torch_pruning.dependency.index_mapping import _GQAIndexMapping, _SliceIndexMapping, _SplitIndexMapping
    from torch_pruning.ops import OPTYPE

    cutting = _SplitIndexMapping | _SliceIndexMapping | _GQAIndexMapping
    return node.type in (OPTYPE.SPLIT, OPTYPE.SLICE, OPTYPE.UNBIND, OPTYPE.EXPAND) and any(
        isinstance(mapping, cutting) for one in node.dependencies for mapping in one.index_mapping
    )


def _tied_by_groups(node: Any, names: Names) -> Iterator[tuple[Channel, Channel]]:
    groups = groups_of(node.module)
    if groups == 1:
        return
    outputs, _ = names.place(node, "output")
    for side in SIDES:
        place, _ = names.place(node, side)
        width = (_width(node, side) or 0) // groups
        for index in range(groups * width):
            if loses_whole_groups(node.module):
                yield (outputs, index // width * (outputs_of(node.module) // groups)), (place, index)
            else:
                yield (place, index % width), (place, index)
