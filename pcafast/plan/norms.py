"""Which batch norm takes in a layer's output as it is."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pcafast.modes import evaluating
from pcafast.plan.slices import is_mixing


def following_norms(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, str]:
    """For layers whose output goes into a batch norm with running statistics: the name of that.

    A layer that is called several times has one only if that is so each time.
    """
    outputs: list[tuple[str, Tensor]] = []
    found: dict[str, set[str]] = {}

    def after(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            found.setdefault(name, set())
            outputs.append((name, output))  # kept, so that no other tensor gets its identity

    def before(name: str, args: tuple[Any, ...]) -> None:
        for layer in {layer for layer, output in outputs if args and output is args[0]}:
            found[layer].add(name)

    calls: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if is_mixing(module):
            handles.append(module.register_forward_hook(lambda *given, name=name: after(name, given[-1])))
        elif isinstance(module, _BatchNorm) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: before(name, args)))
    try:
        with evaluating(model), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, _ in outputs:
        calls[name] = calls.get(name, 0) + 1
    return {name: next(iter(norms)) for name, norms in found.items() if len(norms) == 1 and calls[name] == 1}
