"""Following a layer's output through the model, to its batch norm and its activation.

These may be modules or mere function calls in a ``forward``, and either way end in torch functions; so those are
what is watched, and a value is recognised by its being the very tensor that came before.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pcafast.collect.kept import KeptActivation
from pcafast.errors import PcafastError
from pcafast.statistics.statistic import Tap

Function = Callable[..., Any]
Step = Literal["norm", "activation", "pass"]

# Activations that keep a value or have no gradient there: a * g is the same with a taken after them.
_RELU_LIKE: frozenset[Function] = frozenset(
    (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.hardtanh_)
)
_STEPS: dict[Step, tuple[Function, ...]] = {
    "norm": (F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, torch.batch_norm, torch.layer_norm),
    "activation": (
        *_RELU_LIKE,
        *(F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus),
        *(F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, F.logsigmoid, F.prelu, F.rrelu, F.softsign),
        *(torch.sigmoid, torch.tanh, torch.selu, torch.prelu, torch.celu),
        *(Tensor.sigmoid, Tensor.sigmoid_, Tensor.tanh, Tensor.tanh_),
    ),
    # What leaves a channel a channel: the value is followed further.
    "pass": (
        *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, Tensor.contiguous),
    ),
}
_BACKWARDS: frozenset[Function] = frozenset((Tensor.backward, torch.autograd.backward, torch.autograd.grad))
_STEP_OF = {function: step for step, functions in _STEPS.items() for function in functions}


class Follower(ABC):
    """Follows one value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @abstractmethod
    def before(self, step: Step, function: Function, in_place: bool) -> bool:
        """The value is about to take a step; returns whether to tell of the result."""

    @abstractmethod
    def after(self, step: Step, result: Tensor) -> bool:
        """The step was taken; returns whether to follow the result."""

    @abstractmethod
    def elsewhere(self) -> None:
        """The value was given to a function that is no step."""

    @abstractmethod
    def end(self) -> None:
        """The model's forward is over, and the value has taken no further step."""


class ReachTap(Follower):
    """Calls ``reached`` once, with the value at the tap or at the last step before the end or before passing it."""

    def __init__(self, value: Tensor, layer: str, tap: Tap, reached: Callable[[Tensor], None]) -> None:
        super().__init__(value)
        self._layer, self._tap, self._reached = layer, tap, reached
        self._version = _version(value)

    def before(self, step: Step, function: Function, in_place: bool) -> bool:
        """Past the batch norm there is no turning back: what follows may overwrite the value."""
        if self._tap == "norm" and step != "norm":
            self._reached(self.value)
            return False
        return True

    def after(self, step: Step, result: Tensor) -> bool:
        """Done at the tap."""
        if step == self._tap:
            self._reached(result)
            return False
        self._version = _version(result)
        return True

    def elsewhere(self) -> None:
        """The tap may still come."""

    def end(self) -> None:
        """The model has no such tap after this layer, so the last value it had is the one."""
        if _version(self.value) != self._version:
            raise PcafastError(
                f"No {self._tap} follows layer {self._layer!r}, and what does follow overwrites its output in place. "
                'Use tap="layer" there.'
            )
        self._reached(self.value)


class CopyBeforeOverwriting(Follower):
    """If a step overwrites the value in place, a copy made just before is kept instead."""

    def __init__(self, value: Tensor, kept: KeptActivation) -> None:
        super().__init__(value)
        self._kept = kept

    def before(self, step: Step, function: Function, in_place: bool) -> bool:
        """Copy."""
        if in_place:
            self._kept.replace(self.value.clone())
        return not in_place

    def after(self, step: Step, result: Tensor) -> bool:
        """Some steps return the value as it is, such as dropout in evaluation mode."""
        return result is self.value

    def elsewhere(self) -> None:
        """No matter."""

    def end(self) -> None:
        """The value itself stays."""


class SwapForRelu(CopyBeforeOverwriting):
    """If a ReLU and nothing else takes the value, its result is kept instead.

    Autograd keeps the result in any case, so this costs no memory, and a * g is the same.
    """

    def __init__(self, value: Tensor, kept: KeptActivation, values: "FollowValues") -> None:
        super().__init__(value, kept)
        self._values = values
        self._sole_use, self._rectified = True, False

    def before(self, step: Step, function: Function, in_place: bool) -> bool:
        """Only a ReLU is of interest; before anything else overwrites the value it has to be copied."""
        self._rectified = function in _RELU_LIKE and self._sole_use
        return self._rectified or super().before(step, function, in_place)

    def after(self, step: Step, result: Tensor) -> bool:
        """Swap."""
        if not self._rectified:
            return super().after(step, result)
        self._kept.replace(result)
        if result is not self.value:
            self._values.swapped(self.value, self._kept)
        return False

    def elsewhere(self) -> None:
        """The gradient is not the ReLU's alone."""
        self._sole_use = False


class FollowValues(TorchFunctionMode):
    """While active, tells the followers what becomes of their values."""

    def __init__(self) -> None:
        super().__init__()
        # By identity; the followers hold their values, so that no other tensor can take over an id.
        self._followers: dict[int, list[Follower]] = {}
        # Values whose ReLU's result is kept in their stead; weakly, since that is to save their memory.
        self._swapped: dict[int, tuple[weakref.ref[Tensor], KeptActivation]] = {}

    def add(self, follower: Follower) -> None:
        """Start following."""
        self._followers.setdefault(id(follower.value), []).append(follower)

    def swapped(self, value: Tensor, kept: KeptActivation) -> None:
        """Put the value back if it has another use after all."""
        self._swapped[id(value)] = (weakref.ref(value), kept)

    def end(self) -> None:
        """The forward is over for all values that are still being followed."""
        while self._followers:
            _, followers = self._followers.popitem()
            for follower in followers:
                follower.end()
        # These may still be used, in the loss for example.
        self._swapped = {key: entry for key, entry in self._swapped.items() if entry[0]() is not None}

    def clear(self) -> None:
        """Forget all followers."""
        self._followers, self._swapped = {}, {}

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function, telling the followers of its arguments."""
        kwargs = kwargs or {}
        if func in _BACKWARDS:
            return self._backward(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if not (self._followers or self._swapped) or name == "__get__":  # reading a shape is no use
            return func(*args, **kwargs)
        arguments = [*_tensors(args), *_tensors(kwargs.values())]
        for argument in arguments:
            self._put_back(argument)
        step = _STEP_OF.get(func)
        if step is None:
            for argument in arguments:
                for follower in self._followers.get(id(argument), ()):
                    follower.elsewhere()
            return func(*args, **kwargs)
        # Where a function takes a flag for it, it is the last.
        in_place = name.endswith("_") or bool(kwargs.get("inplace")) or args[-1] is True
        moving = [
            follower
            for argument in arguments
            for follower in self._leaving(argument)
            if follower.before(step, func, in_place)
        ]
        result = func(*args, **kwargs)
        for follower in moving:
            if follower.after(step, result):
                follower.value = result
                self.add(follower)
        return result

    def _put_back(self, argument: Tensor) -> None:
        value, kept = self._swapped.get(id(argument), (None, None))
        if kept is not None and value is not None and value() is argument:
            kept.replace(argument)
            del self._swapped[id(argument)]

    def _leaving(self, argument: Tensor) -> Iterator[Follower]:
        """The followers of a value, those included that are added while others hear of its next step."""
        while followers := self._followers.pop(id(argument), None):
            yield from followers

    def _backward(self, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a backward with the mode on, since activation checkpointing runs forwards in it.

        A mode is off while it handles a function. Given graph edges in place of tensors, torch does not ask it again.
        """
        leaves = [leaf for leaf in tree_leaves((args, kwargs.get("inputs"))) if isinstance(leaf, Tensor)]
        if not all(leaf.requires_grad for leaf in leaves):
            return func(*args, **kwargs)  # which says what is wrong
        args = [tree_map_only(Tensor, get_gradient_edge, argument) for argument in args]
        kwargs = {**kwargs}
        if kwargs.get("inputs") is not None:
            kwargs["inputs"] = tree_map_only(Tensor, get_gradient_edge, kwargs["inputs"])
        if func is Tensor.backward:
            func, kwargs["grad_tensors"] = torch.autograd.backward, kwargs.pop("gradient")
        with self:
            return func(*args, **kwargs)


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments, and in the lists among them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from (item for item in argument if isinstance(item, Tensor))


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version
