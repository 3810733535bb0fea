"""Following a layer's output through the model, to its batch norm and its activation.

These may be modules or mere function calls in a ``forward``, and either way end in torch functions; so those are
what is watched, and a value is recognised by its being the very tensor that came before.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
_STEP_OF = {function: step for step, functions in _STEPS.items() for function in functions}


class Follower(ABC):
    """Follows one value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @abstractmethod
    def before(self, step: Step) -> bool:
        """The value is about to take a step; returns whether to tell of the result."""

    @abstractmethod
    def after(self, step: Step, function: Function, result: Tensor) -> bool:
        """The step was taken; returns whether to follow the result."""

    @abstractmethod
    def end(self) -> None:
        """The model's forward is over, and the value has taken no further step."""


class ReachTap(Follower):
    """Calls ``reached`` once, with the value at the tap or at the last step before the end or before passing it."""

    def __init__(self, value: Tensor, layer: str, tap: Tap, reached: Callable[[Tensor], None]) -> None:
        super().__init__(value)
        self._layer, self._tap, self._reached = layer, tap, reached
        self._version = 0 if value.is_inference() else value._version

    def before(self, step: Step) -> bool:
        """Past the batch norm there is no turning back: what follows may overwrite the value."""
        if self._tap == "norm" and step != "norm":
            self._reached(self.value)
            return False
        return True

    def after(self, step: Step, function: Function, result: Tensor) -> bool:
        """Done at the tap."""
        if step == self._tap:
            self._reached(result)
            return False
        self._version = 0 if result.is_inference() else result._version
        return True

    def end(self) -> None:
        """The model has no such tap after this layer, so the last value it had is the one."""
        if not self.value.is_inference() and self.value._version != self._version:
            raise PcafastError(
                f"No {self._tap} follows layer {self._layer!r}, and what does follow overwrites its output in place. "
                'Use tap="layer" there.'
            )
        self._reached(self.value)


class SwapForRelu(Follower):
    """If a ReLU follows, keeps its result instead of its input.

    Autograd keeps the result in any case, so this costs no memory, and a * g is the same.
    """

    def __init__(self, value: Tensor, kept: KeptActivation) -> None:
        super().__init__(value)
        self._kept = kept

    def before(self, step: Step) -> bool:
        """Only an activation is of interest, and only as the first step."""
        return step == "activation"

    def after(self, step: Step, function: Function, result: Tensor) -> bool:
        """Swap."""
        if function in _RELU_LIKE:
            self._kept.replace(result)
        return False

    def end(self) -> None:
        """No ReLU: the value itself stays."""


class FollowValues(TorchFunctionMode):
    """While active, tells the followers what becomes of their values."""

    def __init__(self) -> None:
        super().__init__()
        # By identity; the followers hold their values, so that no other tensor can take over an id.
        self._followers: dict[int, list[Follower]] = {}

    def add(self, follower: Follower) -> None:
        """Start following."""
        self._followers.setdefault(id(follower.value), []).append(follower)

    def end(self) -> None:
        """The forward is over for all values that are still being followed."""
        remaining, self._followers = self._followers, {}
        for followers in remaining.values():
            for follower in followers:
                follower.end()

    def clear(self) -> None:
        """Forget all followers."""
        self._followers = {}

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function; if it is a step, tell the followers of its arguments."""
        kwargs = kwargs or {}
        if func is Tensor.backward and args[0].requires_grad:
            return self._backward(args[0], **kwargs)
        step = _STEP_OF.get(func) if self._followers else None
        if step is None:
            return func(*args, **kwargs)
        moving = [
            follower
            for argument in (*args[:2], *kwargs.values())
            for follower in self._leaving(argument)
            if follower.before(step)
        ]
        result = func(*args, **kwargs)
        for follower in moving:
            if follower.after(step, func, result):
                follower.value = result
                self.add(follower)
        return result

    def _backward(self, loss: Tensor, gradient: Any, retain_graph: Any, create_graph: Any, inputs: Any) -> None:
        # A mode is off while it handles a function, but inside of this one activation checkpointing runs forwards
        # whose values are to be followed. Given an edge in place of a tensor, torch does not ask the mode again.
        edge = torch.autograd.graph.get_gradient_edge(loss)
        with self:
            torch.autograd.backward(edge, gradient, retain_graph, create_graph, inputs=inputs)

    def _leaving(self, argument: Any) -> Iterator[Follower]:
        """The followers of a value, those included that are added while others hear of its next step."""
        while followers := self._followers.pop(id(argument), None):
            yield from followers
