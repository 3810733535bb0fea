"""Random weights to start training from."""

from torch import nn


def he_normal(model: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers as He et al. 2015 do (arXiv 1502.01852, section 2.2)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
