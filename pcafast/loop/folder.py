"""The folder of a run: whose it is, and how far it has come."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pcafast.errors import ArgumentError
from pcafast.loop import checkpoint
from pcafast.loop.checkpoint import CHECKPOINT, Checkpoint
from pcafast.result import PAGE, PLAN, REPORT, WEIGHTS

Identity = Mapping[str, Any]


def claim(folder: Path, identity: Identity) -> Checkpoint | dict[str, Any] | None:
    """What the folder holds of the run of this identity: its checkpoint, or the report of its result, or nothing yet.

    Raises:
        ArgumentError: there is another run in the folder, another result, or something else in the way.
        FileError: the checkpoint is damaged.
    """
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"out: expected a folder, and {folder} is a file.")
    if (folder / CHECKPOINT).exists():
        found = checkpoint.read(folder)
        _expect_same(folder, "an unfinished run", found.identity, identity)
        return found
    present = [name for name in (PLAN, WEIGHTS, REPORT, PAGE) if (folder / name).exists()]
    if not present:
        return None
    report = read_report(folder)
    if report is None:
        raise ArgumentError(
            f"out: {folder} holds {', '.join(present)}, but not as the result of such a run. Choose another folder, or "
            "delete what is in the way."
        )
    _expect_same(folder, "the result", report, identity)
    return report


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in the folder; None if there is none, or not that of a run."""
    try:
        report = json.loads((folder / REPORT).read_text())
        if report["format"] == "pcafast report" and isinstance(report["asked"], dict):
            return dict(report)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def _expect_same(folder: Path, what: str, found: Mapping[str, Any], identity: Identity) -> None:
    differences = list(_differences(_flat(found, identity), _flat(identity, identity)))
    if differences:
        raise ArgumentError(
            f"out: {folder} holds {what} of another command: {'; '.join(differences)}. Choose another folder, delete "
            "this one, or repeat the command that it was made by."
        )


def _flat(found: Mapping[str, Any], identity: Identity) -> dict[str, Any]:
    sections = {key: found.get(key) for key in identity}
    asked: dict[str, Any] = sections.pop("asked") or {}
    return {**asked, **sections}


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{name} {key}".strip())
    elif old != new:
        yield f"{name} was {_shown(old)} and is now {_shown(new)}"


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) < 80 else f"{text[:60]} ..."
