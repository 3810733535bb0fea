"""One forward pass, watched: its MACs, where each layer ran, and which layers follow each other directly."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pcafast.errors import ArgumentError
from pcafast.modes import evaluating
from pcafast.plan.layers import Factorisable, channels, is_factorisable

ExampleInput = Tensor | tuple[Tensor, ...]

# Reading these from an activation tells nothing about its values or its size.
_HARMLESS = {getattr(Tensor, name).__get__ for name in ("device", "dtype", "requires_grad")}


@dataclass(frozen=True)
class Trace:
    """What one forward pass showed.

    Attributes:
        macs: multiply-adds of the whole forward.
        positions: for each layer that ran, the number of output pixels or tokens, over the batch and all its calls.
        consumers: for a layer whose output goes to one other watched layer and nowhere else, the name of that one.
        borrowed: layers whose weight or bias is used outside of their own forward.
    """

    macs: int
    positions: Mapping[str, int]
    consumers: Mapping[str, str]
    borrowed: frozenset[str]


def trace(model: nn.Module, example_input: ExampleInput) -> Trace:
    """Run the model once, in evaluation mode and without gradients, and watch its linear and convolution layers.

    Raises:
        ArgumentError: the forward fails on the example input.
    """
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    layers = {name: module for name, module in model.named_modules() if name and is_factorisable(module)}
    watch = _Watch(layers)
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # of fused attention on the CPU nothing is counted
        for name, layer in layers.items():
            stack.enter_context(watch.hooks(name, layer))
        for mode in (counter, _Operations(watch.note), _Functions(watch.note)):
            stack.enter_context(mode)
        try:
            output = model(*inputs)
        except Exception as error:
            raise ArgumentError(
                f"example_input: the model's forward failed on it ({type(error).__name__}: {error}). Expected a "
                "tensor, or a tuple of one tensor for each positional argument of forward."
            ) from error
    watch.note_output(output)
    return Trace(
        counter.get_total_flops() // 2,
        {name: _positions(outputs, layers[name]) for name, outputs in watch.outputs.items()},
        dict(watch.adjacent()),
        frozenset(watch.borrowed),
    )


@dataclass
class _Watch:
    """Who uses which tensor; every output stays alive, so that no other tensor can get its identity."""

    layers: Mapping[str, Factorisable]
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    borrowed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._running: list[str] = []
        self._producer: dict[int, str] = {}
        self._users: dict[str, set[str]] = defaultdict(set)
        self._inputs: dict[str, list[str]] = defaultdict(list)
        self._owner = {id(p): name for name, layer in self.layers.items() for p in layer.parameters()}

    @contextmanager
    def hooks(self, name: str, layer: nn.Module) -> Iterator[None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._inputs[name].append(self._producer.get(id(args[0]), "") if args else "")
            self._running.append(name)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            self._running.pop()
            self._producer[id(output)] = name
            self.outputs[name].append(output)

        # Innermost, so that what other hooks do with the tensors counts as a use outside of the layer.
        handles = layer.register_forward_pre_hook(before), layer.register_forward_hook(after, prepend=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self, arguments: Any, harmless: bool) -> None:
        user = self._running[-1] if self._running else ""
        for leaf in tree_leaves(arguments):
            producer, owner = self._producer.get(id(leaf)), self._owner.get(id(leaf))
            if producer is not None and not harmless:
                self._users[producer].add(user)
            if owner is not None and owner != user:
                self.borrowed.add(owner)

    def note_output(self, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.note(leaf, harmless=False)
            elif not isinstance(leaf, int | float | str | None):
                # An object of the user's own may hold any tensor.
                for users in (self._users[name] for name in self.outputs):
                    users.add("")

    def adjacent(self) -> Iterator[tuple[str, str]]:
        for name, outputs in self.outputs.items():
            users = self._users[name]
            for user in users - {""}:
                if users == {user} and self._inputs[user] == [name] * len(outputs):
                    yield name, user


class _Functions(TorchFunctionMode):
    """Sees the calls of torch's Python functions, reading of a shape included."""

    def __init__(self, note: Callable[[Any, bool], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), func in _HARMLESS)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Sees the operations, also those that no Python function of torch calls, as in compiled extensions."""

    def __init__(self, note: Callable[[Any, bool], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), False)
        return func(*args, **(kwargs or {}))


def _positions(outputs: Sequence[Tensor], layer: Factorisable) -> int:
    return sum(output.numel() for output in outputs) // channels(layer, "output")
