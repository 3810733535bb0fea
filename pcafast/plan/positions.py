"""How often each layer multiplies."""

from typing import Any

import torch
from torch import Tensor, nn

from pcafast.modes import evaluating
from pcafast.plan.slices import Mixing, inputs_of, is_mixing, is_transposed, outputs_of


def positions(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """For linear layers and convolutions that run: the pixels or tokens of their outputs, over the batch and all calls.

    Of transposed convolutions, which multiply every input by the whole weight, those of their inputs.
    """
    found: dict[str, int] = {}

    def count(module: Mixing, name: str, x: Tensor, output: Tensor) -> None:
        here = x.numel() // inputs_of(module) if is_transposed(module) else output.numel() // outputs_of(module)
        found[name] = found.get(name, 0) + here

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: count(module, name, args[0], output))
        for name, module in model.named_modules()
        if is_mixing(module)
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
