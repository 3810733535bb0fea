"""The result folder: a compressed model as plan.json, model.safetensors, report.json and report.html."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pcafast.errors import ArgumentError
from pcafast.plan import Plan
from pcafast.plan.document import check_fingerprint, fingerprint, read_content, write_together
from pcafast.report import render

PLAN = "plan.json"
WEIGHTS = "model.safetensors"
REPORT = "report.json"
PAGE = "report.html"

# In the metadata of the weights: the names that stand for the same tensor as another name.
_TIES = "ties"


def save(model: nn.Module, plan: Plan, folder: str | Path, report: Mapping[str, Any] | None = None) -> None:
    """Write a compressed model: its plan, its weights and a report, all of them or none.

    Args:
        model: what ``plan.apply`` returned, retrained or not.
        plan: the plan; its tensors are not written, as the weights make them needless.
        folder: made if it is not there.
        report: anything that JSON can hold, such as accuracies before and after; what was asked and reached, and what
            was skipped, is taken from the plan if it is not there. ``pcafast.report.render`` makes the page of it.

    Raises:
        ArgumentError: the model's state holds something other than tensors, or the report something but JSON.
        FileError: the folder cannot be written.
    """
    folder = Path(folder)
    planned = {"asked": plan.asked, "reached": plan.reached, "skipped": plan.skipped}
    content = {"format": "pcafast report", "version": 1, **planned, **(report or {})}
    try:
        report_text = json.dumps(content, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"report: expected what JSON can hold ({error}).") from error
    weights = serialised(model)
    write_together(
        {
            folder / WEIGHTS: weights,
            folder / REPORT: report_text.encode(),
            folder / PAGE: render(content).encode(),
            folder / PLAN: plan.to_json({WEIGHTS: fingerprint(weights)}).encode(),
        }
    )


def load(fresh_model: nn.Module, folder: str | Path) -> nn.Module:
    """The compressed model from the folder that ``save`` wrote.

    Args:
        fresh_model: the model as it was built before compression, with whatever weights; it is unchanged, and the
            result has its device and mode.
        folder: where ``save`` wrote.

    Raises:
        ArgumentError: the model is not of the kind that was compressed.
        FileError: a file is missing, damaged, of another version, or not of this result.
    """
    folder = Path(folder)
    content = read_content(folder / PLAN)
    check_fingerprint(folder / WEIGHTS, content)
    plan = Plan(content.actions, content.asked, content.reached, content.skipped, tensors=None)
    model = plan.apply_structure(fresh_model)
    with safe_open(folder / WEIGHTS, "pt") as file:
        ties: dict[str, str] = json.loads(file.metadata()[_TIES])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights |= {name: weights[original] for name, original in ties.items()}
    _check_fit(model, weights)
    model.load_state_dict(weights)
    _tie(model, ties)
    return model


def serialised(model: nn.Module) -> bytes:
    """The content of the file that holds the model's weights.

    Raises:
        ArgumentError: the model's state holds something other than tensors.
    """
    first_name: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"model: expected a state of tensors only, got a {type(tensor).__name__} as {name!r}.")
        original = first_name.setdefault(id(tensor), name)
        if original == name:
            # A copy, since safetensors refuses tensors that are views of the same memory.
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format).cpu()
        else:
            ties[name] = original
    return safetensors.torch.save(tensors, {_TIES: json.dumps(ties)})


def _check_fit(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    if unmatched := state.keys() ^ weights.keys():
        name = min(unmatched)
        place = "the saved one" if name in weights else "the fresh one"
        raise ArgumentError(
            f"fresh_model: it is not the kind of model that was compressed: of the two, only {place} has a tensor "
            f"{name!r}{f' (and {len(unmatched) - 1} more differ)' if len(unmatched) > 1 else ''}."
        )
    for name, tensor in weights.items():
        if (tensor.shape, tensor.dtype) != (state[name].shape, state[name].dtype):
            raise ArgumentError(
                f"fresh_model: expected tensor {name!r} to be of shape {tuple(tensor.shape)} and {tensor.dtype} as in "
                f"the saved model, found {tuple(state[name].shape)} and {state[name].dtype}."
            )


def _tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    state = model.state_dict(keep_vars=True)
    for name, original in ties.items():
        if state[name] is not state[original]:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, state[original])
