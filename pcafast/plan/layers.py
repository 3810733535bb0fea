"""Which layers can be factorised, and what they cost before and after."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeGuard

from torch import nn

from pcafast.statistics.statistic import Side

FactorSide = Literal["output", "input", "both"]
Factorisable = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# These hand the weights of their linear layers to fused kernels.
_BYPASSING_PARENTS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


class Cost(NamedTuple):
    """Multiply-adds per position, and parameters."""

    weights: int
    params: int


@dataclass(frozen=True)
class Layer:
    """A layer, y = Wx + b, that is to become two: a second factor times a first one, each of them per group.

    Attributes:
        positions: pixels or tokens of its output over the whole example input; 0 if that is not known.
        consumer: the name and the layer that takes in the second factor, if there is one.
    """

    name: str
    module: Factorisable
    side: Side
    positions: int = 0
    consumer: tuple[str, Factorisable] | None = None

    @property
    def channels(self) -> int:
        """Channels, or entries of patches, per group on the side whose covariance is used: the full rank."""
        return channels(self.module, self.side) // groups(self.module)

    def whole(self) -> Cost:
        """The cost of the layer, with its consumer, as they are."""
        parts = [self.module] + ([self.consumer[1]] if self.consumer else [])
        weights = sum(part.weight.numel() for part in parts)
        return Cost(weights, weights + sum(part.bias.numel() for part in parts if part.bias is not None))

    def factorised(self, rank: int) -> Cost:
        """The cost at a rank per group; the consumer, if any, becomes the second factor."""
        second = self.consumer[1] if self.consumer else self.module
        inner, outputs = groups(self.module) * rank, len(second.weight)
        weights = inner * self.module.weight[0].numel() + outputs * inner // groups(second)
        return Cost(weights, weights + inner + outputs)

    def largest_cheaper_rank(self) -> int:
        """The largest rank per group that costs less than the layer in MACs and in parameters; 0 if none does.

        It is enough to compare parameters: the factors have more biases than the layer, so if they have fewer
        parameters, they have fewer weights; and where the second is fused, every rank saves weights.
        """
        whole = self.whole().params
        cheaper = (rank for rank in range(self.channels - 1, 0, -1) if self.factorised(rank).params < whole)
        return next(cheaper, 0)


def channels(module: Factorisable, side: Side) -> int:
    """Channels of the layer's output, or entries of the patches that it takes in, over all groups."""
    return len(module.weight) if side == "output" else groups(module) * module.weight[0].numel()


def groups(module: Factorisable) -> int:
    """Groups of a convolution; 1 for Linear."""
    return 1 if isinstance(module, nn.Linear) else module.groups


def is_factorisable(module: nn.Module) -> TypeGuard[Factorisable]:
    """Whether the type is known; subclasses may do something else in their forward."""
    return type(module) in _TYPES


def is_pointwise(module: Factorisable) -> bool:
    """Whether each output position depends on one input position: Linear, or an unpadded 1x1 convolution."""
    if isinstance(module, nn.Linear):
        return True
    unpadded = isinstance(module.padding, str) or not any(module.padding)
    return unpadded and all(size == 1 for size in module.kernel_size)


def can_absorb(module: Factorisable, producer: Factorisable) -> bool:
    """Whether the module can be multiplied by the second factor of the layer before it."""
    if type(module) is not type(producer) or not is_pointwise(module):
        return False
    stride_one = isinstance(module, nn.Linear) or all(step == 1 for step in module.stride)
    return stride_one and groups(producer) % groups(module) == 0


def obstacles(model: nn.Module) -> dict[str, str]:
    """For each module with a weight that cannot be replaced: why."""
    named = list(model.named_modules(remove_duplicate=False))
    times = Counter(id(module) for _, module in named)
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    children = {
        f"{name}.{child}".removeprefix(".")
        for name, parent in named
        if isinstance(parent, _BYPASSING_PARENTS)
        for child, _ in parent.named_children()
    }
    return {
        name: reason
        for name, module in named
        if (reason := _obstacle(module, times[id(module)], owners, name in children))
    }


def _obstacle(module: nn.Module, names: int, owners: Counter[int], bypassed: bool) -> str | None:
    if not is_factorisable(module):
        return f"a {type(module).__name__} cannot be factorised"
    if "forward" in vars(module):
        return "its forward was replaced"
    parameters = dict(module.named_parameters(recurse=False))
    if "weight" not in parameters or not parameters.keys() <= {"weight", "bias"}:
        return "its weight is computed from other parameters"
    if type(module.weight) is not nn.Parameter or not module.weight.is_floating_point():
        return f"its weight is a {type(module.weight).__name__} of {module.weight.dtype}"
    if names > 1:
        return "it has several names in the model"
    if any(owners[id(parameter)] > 1 for parameter in parameters.values()):
        return "it shares its weight or bias with another layer"
    if bypassed:
        return "its parent uses its weight directly"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which would be lost"
    return None
