"""Networks by name: the built-in ones, torchvision's, and any callable the user names."""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from pcafast.errors import ArgumentError
from pcafast.models.densenet_cifar import CifarDenseNet
from pcafast.models.digits_cnn import DigitsCNN
from pcafast.models.googlenet_cifar import CifarGoogLeNet
from pcafast.models.lenet5 import LeNet5
from pcafast.models.mnist_cnn import MnistCNN
from pcafast.models.resnet_cifar import CifarResNet
from pcafast.models.vgg_cifar import CifarVGG16
from pcafast.models.weights import load_weights

__all__ = ["available", "build", "load_weights"]

_BUILT_IN: dict[str, Callable[..., nn.Module]] = {
    "densenet40": partial(CifarDenseNet, 40),
    "digits_cnn": DigitsCNN,
    "googlenet": CifarGoogLeNet,
    "lenet5": LeNet5,
    "mnist_cnn": MnistCNN,
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "vgg16": partial(CifarVGG16, batch_norm=False),
    "vgg16_bn": partial(CifarVGG16, batch_norm=True),
}

# Of torchvision. In training mode these return more than the scores.
_WITH_AUXILIARY_CLASSIFIERS = ("googlenet", "inception_v3")


def available() -> list[str]:
    """The names of the built-in networks."""
    return sorted(_BUILT_IN)


def build(spec: str, *, num_classes: int | None = None, weights: str | Path | None = None) -> nn.Module:
    """Build a network, with fresh random weights unless a checkpoint is given. Nothing is downloaded.

    Args:
        spec: a built-in name (see `available`), `torchvision:NAME`, or `package.module:function`, any
            callable that returns a module; the current directory is importable. The built-in ones are for 32x32
            images and smaller; torchvision has vgg16, densenet121, googlenet and others for larger ones. Its googlenet
            and inception_v3 come without auxiliary classifiers, since with them a forward in training mode returns more
            than the scores.
        num_classes: outputs of the last layer; None leaves the network's own number. A user's callable
            gets it as a keyword, and only when it is given.
        weights: checkpoint to load, see `load_weights`.

    Raises:
        ArgumentError: there is no such network, it cannot be called so, or the checkpoint is of another.
        FileError: the checkpoint cannot be read.
    """
    if num_classes is not None and num_classes < 1:
        raise ArgumentError(f"num_classes must be at least 1, got {num_classes}.")
    options = {} if num_classes is None else {"num_classes": num_classes}
    place, colon, name = spec.partition(":")
    if not colon:
        model = _built_in(spec)(**options)
    elif place == "torchvision":
        model = _torchvision(name, options)
    else:
        model = _from_callable(place, name, options)
    if weights is not None:
        load_weights(model, weights)
    return model


def _built_in(name: str) -> Callable[..., nn.Module]:
    if name not in _BUILT_IN:
        raise ArgumentError(
            f"there is no built-in model {name!r}. There are {', '.join(available())}; "
            "torchvision:NAME takes one of torchvision's, package.module:function your own."
        )
    return _BUILT_IN[name]


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    from torchvision import models  # a second to import, which the built-in networks need not pay

    # Only the classifiers: the others fetch a trained backbone unless told otherwise.
    names = models.list_models(module=models)
    if name not in names:
        listed = difflib.get_close_matches(name, names) or names
        raise ArgumentError(f"torchvision has no classification model {name!r}. It has {', '.join(listed)}.")
    if name in _WITH_AUXILIARY_CLASSIFIERS:
        # The initialisation is torch's usual one; to choose none is a warning.
        options = {**options, "aux_logits": False, "init_weights": False}
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _from_callable(place: str, name: str, options: dict[str, int]) -> nn.Module:
    spec = f"{place}:{name}"
    module = _imported(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise ArgumentError(f"model {spec!r}: {place} has no callable {name!r}; it has {_callables(module)}.")
    try:
        inspect.signature(function).bind(**options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "no arguments"
        raise ArgumentError(f"model {spec!r} cannot be called with {given}: {error}.") from error
    try:
        model = function(**options)
    except Exception as error:
        raise ArgumentError(f"model {spec!r} failed: {type(error).__name__}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"model {spec!r} must return a torch.nn.Module, got {type(model).__name__}; "
            f"{place} has {_callables(module)}."
        )
    return model


def _imported(place: str) -> ModuleType:
    if not all(part.isidentifier() for part in place.split(".")):
        raise ArgumentError(
            f"expected a model as package.module:function, got {place!r} before the colon; there are also "
            f"torchvision:NAME and the built-in {', '.join(available())}."
        )
    here = str(Path.cwd())
    if here not in sys.path:
        # It stays there, since the user's forward may import more.
        sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise ArgumentError(
            f"the model's module {place!r} cannot be imported: {type(error).__name__}: {error}. It must be installed "
            f"or lie in the current directory, {here}; the built-in models are {', '.join(available())}."
        ) from error


def _callables(module: ModuleType) -> str:
    names = (
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    )
    return ", ".join(sorted(names)) or "no public callable"
