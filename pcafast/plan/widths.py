"""How many channels every module has left, and what the model then costs."""

from collections.abc import Callable, Collection, Mapping
from functools import partial

from torch import Tensor, nn

from pcafast.plan.budget import Quantity
from pcafast.plan.slices import inputs_of, is_mixing, outputs_of, params_at, shape_of, weights_at
from pcafast.plan.ties import Place
from pcafast.plan.units import Units

Counts = Mapping[Place, int]
"""Numbers of channels, by place."""

CostOf = Callable[[int, int], int]
"""A module's cost by the outputs and inputs it has left."""


class Sliced:
    """What can lose channels: modules, and parameters of no known module, by name, in the model's order.

    Args:
        model: whose they are.
        found: what can be removed of it.
        positions: for layers that multiply, how often they do, over the whole example input.

    Attributes:
        mixing: names of the linear layers and convolutions.
    """

    def __init__(self, model: nn.Module, found: Units, positions: Mapping[str, int]) -> None:
        names = {place.name for unit in found.units for place in unit}
        self._modules = {name: module for name, module in model.named_modules() if name in names}
        self._parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
        self._dims = found.parameter_dims
        self._positions = positions
        self.mixing = {name for name, module in self._modules.items() if is_mixing(module)}

    def widths(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs by name; no inputs where these are the outputs."""
        own = {
            name: (outputs_of(module), inputs_of(module) if is_mixing(module) else 0)
            for name, module in self._modules.items()
        }
        return own | {name: (parameter.shape[self._dims[name]], 0) for name, parameter in self._parameters.items()}

    def shape(self, name: str) -> list[int]:
        """By which the module or parameter is recognised."""
        return list(self._parameters[name].shape) if name in self._parameters else shape_of(self._modules[name])

    def dim(self, name: str) -> int:
        """The dimension of a bare parameter that holds the channels."""
        return self._dims.get(name, 0)

    def has_bias(self, name: str) -> bool:
        """Whether it has a bias to add to."""
        return getattr(self._modules[name], "bias", None) is not None

    def costs(self, quantity: Quantity, *, among: Collection[str] = ()) -> dict[str, CostOf]:
        """The cost of each, if any.

        Args:
            quantity: what is counted.
            among: layers whose channels are counted.
        """
        if quantity == "channels":
            return dict.fromkeys(among, _outputs)
        if quantity == "macs":
            running = self.mixing & self._positions.keys()
            return {name: partial(_macs, self._modules[name], self._positions[name]) for name in running}
        own: dict[str, CostOf] = {name: partial(params_at, module) for name, module in self._modules.items()}
        return own | {name: partial(_numbers, one, self._dims[name]) for name, one in self._parameters.items()}


class Widths:
    """Widths that shrink and grow, with the cost of the model kept up to date.

    Args:
        widths: outputs and inputs of all that can lose channels.
        costs: what each of them costs by its widths, in one quantity.
        whole: the cost of the model as it is, of which these are a part.
    """

    def __init__(self, widths: Mapping[str, tuple[int, int]], costs: Mapping[str, CostOf], whole: int) -> None:
        self.cost = whole
        self._costs = costs
        self._left = dict(widths)

    def outputs(self, name: str) -> int:
        """The output channels that it has left."""
        return self._left[name][0]

    def saving(self, counts: Counts) -> int:
        """What removing so many channels would save."""
        after = self._without(counts)
        return sum(
            self._costs[name](*self._left[name]) - self._costs[name](*widths)
            for name, widths in after.items()
            if name in self._costs
        )

    def remove(self, counts: Counts) -> None:
        """Remove so many channels; negative numbers put them back."""
        self.cost -= self.saving(counts)
        self._left |= self._without(counts)

    def _without(self, counts: Counts) -> dict[str, tuple[int, int]]:
        after: dict[str, tuple[int, int]] = {}
        for (name, side), count in counts.items():
            outputs, inputs = after.get(name, self._left[name])
            after[name] = (outputs - count, inputs) if side == "output" else (outputs, inputs - count)
        return after


def _outputs(outputs: int, _: int) -> int:
    return outputs


def _macs(module: nn.Module, positions: int, outputs: int, inputs: int) -> int:
    assert is_mixing(module)
    return positions * weights_at(module, outputs, inputs)


def _numbers(parameter: Tensor, dim: int, outputs: int, _: int) -> int:
    return parameter.numel() // parameter.shape[dim] * outputs
