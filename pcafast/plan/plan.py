"""A plan: what will be done to a model, as data that can be printed, saved, edited by hand and applied."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from pcafast.errors import ArgumentError, PcafastError
from pcafast.plan.actions import Action
from pcafast.plan.document import Content, check_fingerprint, fingerprint, read_content, to_json, write_together

# Carries out actions of one kind on a model, in place; without tensors it sets up shapes only.
Applier = Callable[[nn.Module, Sequence[Any], Mapping[str, Tensor] | None], None]

_APPLIERS: dict[str, Applier] = {}


def register_applier(kind: str) -> Callable[[Applier], Applier]:
    """Decorator for the function that carries out the actions of a kind: a plan itself does not know how."""

    def register(applier: Applier) -> Applier:
        _APPLIERS[kind] = applier
        return applier

    return register


@dataclass
class Plan:
    """What was decided for a model.

    Attributes:
        actions: what to do, in this order.
        asked: the method and its target.
        reached: counts of the whole model before and after.
        skipped: layers that are left alone, and why.
        tensors: the numbers that the actions need, such as bases; None if the plan came without them.
    """

    actions: Sequence[Action] = field(default_factory=list)
    asked: dict[str, Any] = field(default_factory=dict)
    reached: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] | None = field(default_factory=dict, repr=False)

    def apply(self, model: nn.Module) -> nn.Module:
        """A new model of standard modules; the given one is unchanged.

        Raises:
            ArgumentError: the model is not the one that the plan was made for.
        """
        if self.tensors is None:
            raise PcafastError(
                "the plan holds no tensors, only the structure, as in a result folder: "
                "pcafast.load(fresh_model, folder) rebuilds that model. Plan.save keeps the tensors beside the plan."
            )
        return self._carried_out(model, self.tensors)

    def apply_structure(self, model: nn.Module) -> nn.Module:
        """As ``apply``, but what is computed from tensors is left zero, for weights that are loaded afterwards."""
        return self._carried_out(model, None)

    def _carried_out(self, model: nn.Module, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        result = deepcopy(model)
        for kind, actions in groupby(self.actions, key=lambda action: action.kind):
            _APPLIERS[kind](result, list(actions), tensors)
        return result

    def then(self, later: "Plan") -> "Plan":
        """Both plans as one, the later having been made for what this one makes of a model.

        It has the structure only: what is computed from tensors comes with the weights of the result.
        """
        reached = {
            quantity: {"before": first["before"], "after": last["after"], "share": last["after"] / first["before"]}
            for quantity, first in self.reached.items()
            if (last := later.reached.get(quantity))
        }
        actions = [*self.actions, *later.actions]
        return Plan(actions, self.asked, reached, later.skipped, tensors=None)

    def to_json(self, files: Mapping[str, str] | None = None) -> str:
        """The plan without its tensors; ``files`` are the SHA-256 of the files saved with it, by name."""
        return to_json(Content(self.asked, self.reached, self.skipped, dict(files or {}), list(self.actions)))

    __str__ = to_json

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, and its tensors into a .safetensors file of the same name beside it."""
        path = Path(path)
        if path.suffix == ".safetensors":
            raise ArgumentError(f"path: expected one ending in .json, since the tensors go beside it, got {path}.")
        contents, files = {}, {}
        if self.tensors is not None:
            beside = path.with_suffix(".safetensors")
            contents[beside] = safetensors.torch.save(self.tensors)
            files[beside.name] = fingerprint(contents[beside])
        write_together({**contents, path: self.to_json(files).encode()})

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan, and its tensors where ``save`` wrote them.

        Raises:
            FileError: a file is missing, damaged, of another version, or not the one saved with this plan.
        """
        path = Path(path)
        content = read_content(path)
        beside = path.with_suffix(".safetensors")
        tensors = None
        if beside.name in content.files:
            check_fingerprint(beside, content)
            tensors = safetensors.torch.load_file(beside)
        return cls(content.actions, content.asked, content.reached, content.skipped, tensors)
