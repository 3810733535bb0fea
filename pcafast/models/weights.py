"""Reading a checkpoint into a model: strictly, wholly or not at all, without running code from the file."""

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from pcafast.errors import ArgumentError, FileError

_TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin", ".tar")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a .pt, .pth, .th, .bin or .safetensors checkpoint into the model, in place.

    The state dict may lie under `state_dict` or `model`, and every key may start with `module.`.

    Raises:
        ArgumentError: the checkpoint is of another network; the model keeps the weights it had.
        FileError: the file is absent, truncated, or holds Python objects other than tensors.
    """
    path = Path(path)
    state = _state_dict(_read(path), path)
    before = copy.deepcopy(model.state_dict())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        # By now torch has copied every tensor that did fit.
        model.load_state_dict(before)
        raise ArgumentError(
            f"weights {path} are of another network than this {type(model).__name__}: "
            f"{_differences(before, state) or error}. Build the model these weights were trained with, "
            "with the same num_classes, or name another checkpoint."
        ) from error


def _read(path: Path) -> Any:
    if path.suffix not in (*_TORCH_SUFFIXES, ".safetensors"):
        raise FileError(f"weights {path}: expected a file ending in {', '.join(_TORCH_SUFFIXES)} or .safetensors.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(f"cannot read weights {path}: {error.strerror or error}.") from error
    except pickle.UnpicklingError as error:
        raise FileError(
            f"cannot read weights {path}: it is no PyTorch checkpoint, or holds Python objects other than "
            "tensors, and loading those could run code from the file. Save model.state_dict() alone."
        ) from error
    except SafetensorError as error:
        raise FileError(f"cannot read weights {path}: truncated or no safetensors file ({error}).") from error
    except Exception as error:  # torch meets damaged bytes with KeyError, IndexError, EOFError, ...
        raise FileError(
            f"cannot read weights {path}: truncated or no PyTorch checkpoint. Copy or download it again."
        ) from error


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
    state = content
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            state = content[key]
            break
    if not (
        isinstance(state, dict)
        and all(isinstance(key, str) for key in state)
        and any(isinstance(value, Tensor) for value in state.values())
    ):
        keys = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise FileError(
            f"weights {path} hold no state dict, neither at the top nor under 'state_dict' or 'model'; "
            f"found {keys or 'nothing'}. Save model.state_dict()."
        )
    if all(key.startswith("module.") for key in state):
        consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def _differences(model: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    # torch fills in the batch counters that checkpoints of before 2018 lack.
    missing = [key for key in model if key not in file and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in file if key not in model]
    misshaped = [
        f"{key} {_shape(file[key])} for {_shape(model[key])}"
        for key in model
        if key in file and _shape(file[key]) != _shape(model[key])
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    return "; ".join(
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
