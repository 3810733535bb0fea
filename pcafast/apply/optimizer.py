"""Handing an optimizer over from a model to the smaller one that a plan made of it."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from pcafast.errors import ArgumentError
from pcafast.plan import LowRank, Plan


def rebind_optimizer(
    optimizer: Optimizer, plan: Plan, model: nn.Module, small: nn.Module, *, keep_state: bool = True
) -> None:
    """Let an optimizer of the model go on with the smaller model, in place, so that schedulers of it go on too.

    Parameters stay in their groups, with the groups' options; those that are new, such as factors, join the group of
    the layer they come from. What the optimizer remembers of a pruned parameter, such as momenta, is cut like the
    parameter; it is forgotten of a factorised one, and where it has another shape than the parameter, as Adafactor's.
    Parameters of other models stay as they are.

    Args:
        optimizer: of ``torch.optim``, other than LBFGS, or of that kind.
        plan: that was applied.
        model: that it was applied to.
        small: that it returned.
        keep_state: False forgets the state of all parameters of the model.

    Raises:
        ArgumentError: the optimizer owns no parameter of the model, or the models are not those of the plan. The
            optimizer is as it was.
    """
    if isinstance(optimizer, LBFGS):
        raise ArgumentError(
            "optimizer: expected one that treats parameters apart; LBFGS sees them as one vector, which cannot be cut. "
            "Make a new one: torch.optim.LBFGS(small.parameters())."
        )
    old = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in old.items()}
    new = dict(small.named_parameters())
    owned = {names[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in names}
    if not owned:
        raise ArgumentError(
            "optimizer: expected one that owns the parameters of the model, and it owns none of them. Was it made for "
            "another model, or for a copy of this one?"
        )
    _check_small(plan.apply_structure(model), small)
    joining = _joining(old, new)
    states = _cut_states(optimizer, plan, model, new) if keep_state else {}
    groups = []
    for group in optimizer.param_groups:
        parameters: list[Tensor] = []
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                parameters.append(parameter)
            else:
                parameters += [new[one] for one in (name, *joining.get(name, ())) if one in new]
        groups.append(parameters)
    for parameter in old.values():
        optimizer.state.pop(parameter, None)
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = parameters
    for name, state in states.items():
        optimizer.state[new[name]] = state


def _check_small(expected: nn.Module, small: nn.Module) -> None:
    shapes, found = ({name: tuple(p.shape) for name, p in one.named_parameters()} for one in (expected, small))
    if shapes != found:
        name = min(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise ArgumentError(
            f"small: expected the model that plan.apply returned, with a parameter {name!r} of shape "
            f"{shapes.get(name, 'none')}, found {found.get(name, 'none')}."
        )


def _joining(old: Mapping[str, nn.Parameter], new: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """For parameters of the model, those of the smaller one that come out of the same layer under a new name."""
    joining: dict[str, list[str]] = {}
    for name in new.keys() - old.keys():
        layer = name.rpartition(".")[0]
        while layer and f"{layer}.weight" not in old:
            layer = layer.rpartition(".")[0]
        if layer:
            joining.setdefault(f"{layer}.weight", []).append(name)
            if f"{layer}.bias" in old:
                joining.setdefault(f"{layer}.bias", [])
    return {name: sorted(names) for name, names in joining.items()}


def _cut_states(
    optimizer: Optimizer, plan: Plan, model: nn.Module, new: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """The states of parameters that the plan did not compute anew, cut as the plan cuts the parameters."""
    remade = {
        name for action in plan.actions if isinstance(action, LowRank) for name in (action.layer, action.fuse_into)
    }
    states = {
        name: dict(optimizer.state[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state and name.rpartition(".")[0] not in remade
    }
    for key in {key for state in states.values() for key in state}:
        # The plan is carried out on a model that has the states in the place of its parameters.
        shadow = deepcopy(model)
        shaped = {}
        for name, parameter in list(shadow.named_parameters()):
            value = states.get(name, {}).get(key)
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                parent, _, attribute = name.rpartition(".")
                setattr(shadow.get_submodule(parent), attribute, nn.Parameter(value.detach().clone(), False))
                shaped[name] = value
        cut = dict(plan.apply_structure(shadow).named_parameters()) if shaped else {}
        for name in shaped:
            states[name][key] = cut[name].detach()
    old = dict(model.named_parameters())
    return {
        name: state
        for name, state in states.items()
        if name in new and (old[name].shape == new[name].shape or _has_shape(state, new[name]))
    }


def _has_shape(state: Mapping[str, Any], parameter: nn.Parameter) -> bool:
    return all(value.shape == parameter.shape for value in state.values() if isinstance(value, Tensor) and value.ndim)
