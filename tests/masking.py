"""What a pruned network is to compute, told by the whole one."""

import torch
from torch import Tensor, nn

import pcafast


def randomised(model: nn.Module) -> nn.Module:
    """With batch norms that are not the identity, so that nothing about them can be forgotten."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.running_var):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2, generator=generator)
            for tensor in (module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
    return model.eval()


def scores_of(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(getattr(module, "out_features", None) or module.out_channels, generator=generator)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    }


def masked_outputs(model: nn.Module, plan: pcafast.Plan, x: Tensor) -> Tensor:
    """What the whole model puts out when removed channels are zero for each layer that mixes channels.

    Written from the forward's point of view: a removed channel, whatever its norm adds to it, is not there for anyone.
    """
    gone = {action.layer: action for action in plan.actions}
    handles = []

    def zero_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept = gone[names[module]].inputs
        mask = torch.zeros(args[0].shape[-1 if isinstance(module, nn.Linear) else 1], dtype=args[0].dtype)
        mask[kept] = 1
        return (args[0] * mask.view(-1, *[1] * (0 if isinstance(module, nn.Linear) else args[0].ndim - 2)),)

    names = {module: name for name, module in model.named_modules()}
    for name, action in gone.items():
        module = model.get_submodule(name)
        if action.inputs is not None:
            handles.append(module.register_forward_pre_hook(zero_inputs))
    try:
        with torch.no_grad():
            return model(x)
    finally:
        for handle in handles:
            handle.remove()
