"""The ablation of low-rank layers: factors of the same shapes that know nothing of the data."""

import torch
from torch import nn

from pcafast.apply.modules import find
from pcafast.errors import ArgumentError
from pcafast.modes import device_of
from pcafast.plan import LowRank, Plan
from pcafast.plan.layers import is_factorisable


def random_factors(model: nn.Module, plan: Plan, *, seed: int = 0) -> nn.Module:
    """The model of a low-rank plan with factors of the same shapes drawn at random, as torch initialises layers.

    What directions are worth shows against these, trained equally.
    """
    result = plan.apply_structure(model)
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for action in plan.actions:
            if not isinstance(action, LowRank):
                raise ArgumentError(
                    f"plan: expected low-rank layers only, got a {action.kind} action on {action.layer!r}."
                )
            for name in filter(None, (action.layer, action.fuse_into)):
                for part in filter(is_factorisable, find(result, name).modules()):
                    part.reset_parameters()
    return result
