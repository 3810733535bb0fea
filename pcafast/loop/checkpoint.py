"""The one file from which a run goes on: weights, optimizer, plan so far, and what has been measured."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pcafast.errors import ArgumentError, FileError
from pcafast.files import write_atomically
from pcafast.plan import Plan
from pcafast.plan.document import from_json
from pcafast.result import PAGE, PLAN, REPORT, WEIGHTS

CHECKPOINT = "checkpoint.safetensors"

_FORMAT, _VERSION = "pcafast checkpoint", 1
_MODEL, _TRAINER = "model.", "trainer."


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        history: one entry for every stage that is done.
        plan: all steps' plans so far, joined; None before the first.
        figures: of the first step, by layer: the numbers that its method decided on.
        warnings: all that were issued.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    plan: Plan | None = None
    figures: dict[str, list[float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """What ``read`` found.

    Attributes:
        identity: what the run was asked for.
        environment: what it was made with.
        model: the state of the model.
        trainer: the state of its trainer; empty if it was not being trained.
    """

    identity: dict[str, Any]
    environment: dict[str, Any]
    progress: Progress
    model: dict[str, Tensor]
    trainer: dict[str, Tensor]


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Put a checkpoint into the folder in the place of the one before.

    Raises:
        FileError: the folder cannot be written.
    """
    tensors = {_MODEL + name: tensor for name, tensor in checkpoint.model.items()}
    tensors |= {_TRAINER + name: tensor for name, tensor in checkpoint.trainer.items()}
    # Copies, since safetensors refuses tensors that are views of the same memory.
    tensors = {name: one.detach().cpu().clone(memory_format=torch.contiguous_format) for name, one in tensors.items()}
    progress = checkpoint.progress
    plan = None if progress.plan is None else progress.plan.to_json()
    content = json.dumps(
        {
            "identity": checkpoint.identity,
            "environment": checkpoint.environment,
            "progress": {**vars(progress), "plan": plan},
        }
    )
    head = {"format": _FORMAT, "version": str(_VERSION), "content": content}
    data = safetensors.torch.save(tensors, {**head, "sha256": fingerprint(tensors, content)})
    write_atomically({folder / CHECKPOINT: partial(Path.write_bytes, data=data)})


def read(folder: Path) -> Checkpoint:
    """The checkpoint in the folder.

    Raises:
        FileError: it cannot be read, is damaged, or was written by another version.
    """
    path = folder / CHECKPOINT
    mend = f"Delete it to begin the run anew, or put a copy of {CHECKPOINT} back."
    try:
        with safe_open(path, "pt") as file:
            head: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} cannot be read: it is damaged or cut off ({error}). {mend}") from error
    if head.get("format") != _FORMAT or head.get("version") != str(_VERSION):
        raise FileError(
            f"{path}: expected a checkpoint of version {_VERSION}, found {head.get('format', 'something else')} of "
            f"version {head.get('version', 'unknown')}. Go on with the pcafast that wrote it. {mend}"
        )
    if fingerprint(tensors, head["content"]) != head["sha256"]:
        raise FileError(f"{path} is damaged: its content is not what was written. {mend}")
    content = json.loads(head["content"])
    progress = Progress(**content["progress"])
    if progress.plan is not None:
        progress.plan = _plan(content["progress"]["plan"], path)
    model = {name.removeprefix(_MODEL): one for name, one in tensors.items() if name.startswith(_MODEL)}
    trainer = {name.removeprefix(_TRAINER): one for name, one in tensors.items() if name.startswith(_TRAINER)}
    return Checkpoint(content["identity"], content["environment"], progress, model, trainer)


def _plan(text: str, source: Path) -> Plan:
    content = from_json(text, source)
    return Plan(content.actions, content.asked, content.reached, content.skipped, tensors=None)


def remove(folder: Path) -> None:
    """Take the checkpoint away, and what a killed process left half-written beside it."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    for name in (CHECKPOINT, PLAN, WEIGHTS, REPORT, PAGE):
        for half in folder.glob(f".{name}.*"):
            half.unlink(missing_ok=True)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state.

    Raises:
        ArgumentError: it holds something other than tensors.
    """
    state = model.state_dict()
    for name, one in state.items():
        if not isinstance(one, Tensor):
            raise ArgumentError(f"model: expected a state of tensors only, got a {type(one).__name__} as {name!r}.")
    return state


def fingerprint(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 of tensors with their names, types and shapes, and of a text."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
