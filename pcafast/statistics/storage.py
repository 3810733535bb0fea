"""Statistics in one .safetensors file: the tensors of all states, and a header that says what they belong to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from pcafast.errors import FileError, PcafastError
from pcafast.files import write_atomically
from pcafast.statistics.statistic import KINDS, Statistic

FORMAT = "pcafast statistics"
VERSION = "1"

Collections = dict[str, dict[str, Statistic]]


def save_statistics(statistics: Mapping[str, Mapping[str, Statistic]], path: str | Path) -> None:
    """Write collected statistics to one file.

    Args:
        statistics: by name of the statistic and of the layer, as ``collect`` gives them.
        path: ending in .safetensors.

    Raises:
        FileError: the file cannot be written; what was there before still is.
    """
    entries = [(name, layer, one) for name, layers in statistics.items() for layer, one in layers.items()]
    index = [[name, layer, type(one).__name__, one.settings] for name, layer, one in entries]
    tensors = {
        f"{number}/{state}": tensor.contiguous().cpu()
        for number, (_, _, one) in enumerate(entries)
        for state, tensor in one.state_dict().items()
    }
    header = {"format": FORMAT, "version": VERSION, "index": json.dumps(index)}
    content = safetensors.torch.save(tensors, header)
    write_atomically({Path(path): lambda temporary: temporary.write_bytes(content)})


def load_statistics(path: str | Path) -> Collections:
    """Read what ``save_statistics`` wrote: {statistic: {layer: Statistic}}.

    Raises:
        FileError: the file is absent, truncated, of another format or of another version.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise FileError(f"cannot read statistics from {path}: {error}. The file may be truncated.") from error
    if header.get("format") != FORMAT:
        raise FileError(f"{path} is not a file of pcafast statistics.")
    if header.get("version") != VERSION:
        raise FileError(
            f"{path} holds statistics of version {header.get('version')} and this pcafast reads version {VERSION}: "
            "collect them anew."
        )
    try:
        return _restore(json.loads(header["index"]), tensors)
    except (KeyError, TypeError, ValueError, PcafastError) as error:
        raise FileError(f"{path} is damaged: {error}") from error


def _restore(index: list[tuple[str, str, str, dict[str, Any]]], tensors: Mapping[str, Tensor]) -> Collections:
    collections: Collections = {}
    for number, (name, layer, kind, settings) in enumerate(index):
        one = KINDS[kind](**settings)
        one.layer = layer
        prefix = f"{number}/"
        one.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
        collections.setdefault(name, {})[layer] = one
    return collections
