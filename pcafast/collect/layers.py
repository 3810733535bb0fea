"""Which layers to watch, and how their activations are laid out."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from pcafast.errors import ArgumentError

LayerChoice = type[nn.Module] | str | Callable[[str, nn.Module], bool] | Iterable[type[nn.Module] | str]

CONVOLUTIONS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
"""Convolutions and the number of their spatial dimensions."""


def choose_layers(model: nn.Module, choice: LayerChoice | None) -> dict[str, nn.Module]:
    """The chosen layers by name, in the order of the model's definition.

    Args:
        model: whose submodules to choose from.
        choice: None for all convolutions and linear layers; a module type; a name or pattern with ``*`` and ``?``
            (``layer1.*.conv?``); several types and patterns; or a function of name and module.

    Raises:
        ArgumentError: a pattern or the whole choice matches no layer; the message lists the names there are.
    """
    # A module with several names has all of them here, so that any may be asked for; it is watched once.
    named = dict(model.named_modules(remove_duplicate=False))
    if choice is None:
        chosen = {name for name, module in named.items() if isinstance(module, (nn.Linear, *CONVOLUTIONS))}
        description = "convolution or linear layer"
    elif isinstance(choice, str | type):
        chosen, description = _matching(named, choice), repr(choice)
    elif callable(choice):
        chosen, description = {name for name, module in named.items() if choice(name, module)}, f"{choice}"
    else:
        chosen, description = set().union(*(_matching(named, one) for one in choice)), repr(choice)
    if not chosen:
        raise ArgumentError(f"layers: no layer of the model matches {description}. {_existing(named)}")
    first_names = {id(named[name]): name for name in reversed(named) if name in chosen}
    return {name: named[name] for name in named if first_names.get(id(named[name])) == name}


def _matching(named: dict[str, nn.Module], choice: type[nn.Module] | str) -> set[str]:
    if isinstance(choice, type):
        return {name for name, module in named.items() if isinstance(module, choice)}
    names = {name for name in named if fnmatchcase(name, choice)}
    if not names:
        raise ArgumentError(f"layers: no layer of the model matches {choice!r}. {_existing(named)}")
    return names


def _existing(named: dict[str, nn.Module]) -> str:
    leaves = [name for name, module in named.items() if not any(module.children())]
    shown = ", ".join(leaves[:40]) + (f" and {len(leaves) - 40} more" if len(leaves) > 40 else "")
    return f"Its layers are: {shown or 'none'}."


def channel_dim(layer: nn.Module, otherwise: int) -> int:
    """The dimension of the layer's input and output that holds the channels; ``otherwise`` if its type does not say."""
    if isinstance(layer, tuple(CONVOLUTIONS)):
        return 1
    return -1 if isinstance(layer, nn.Linear | nn.LayerNorm | nn.RMSNorm | nn.Embedding) else otherwise
