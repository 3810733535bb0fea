"""The JSON form of a plan: versioned, one action per line, checked on reading."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pcafast.errors import ArgumentError, FileError
from pcafast.files import write_atomically
from pcafast.plan.actions import KINDS, Action

FORMAT = "pcafast plan"
VERSION = 1


class Content(NamedTuple):
    """What a plan's JSON says; ``files`` are the SHA-256 of the files that belong to it, by name."""

    asked: dict[str, Any]
    reached: dict[str, Any]
    skipped: dict[str, str]
    files: dict[str, str]
    actions: list[Action]


def fingerprint(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def to_json(content: Content) -> str:
    """The text of a plan file."""
    head = {"format": FORMAT, "version": VERSION, **content._asdict()}
    del head["actions"]
    lines = ",\n".join(f"    {json.dumps(_encoded(action))}" for action in content.actions)
    return json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "actions": [\n{lines}\n  ]\n}}\n'


def read_content(path: Path) -> Content:
    """What a plan file says.

    Raises:
        FileError: it cannot be read, is not JSON, not a plan, of another version, or a field is missing or wrong.
    """
    return from_json(_read(path).decode(errors="replace"), path)


def check_fingerprint(path: Path, content: Content) -> None:
    """See that a file is the one that was saved with the plan.

    Raises:
        FileError: it cannot be read, or is another.
    """
    if fingerprint(_read(path)) != content.files.get(path.name):
        raise FileError(
            f"{path} is not the file that was saved with its plan: it is damaged, cut off, or comes from another "
            "result; copy all files of one result together."
        )


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write files of which all or none are to be there."""
    write_atomically({path: partial(Path.write_bytes, data=data) for path, data in contents.items()})


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error


def from_json(text: str, source: Path) -> Content:
    """What the text of a plan file says; ``source`` is where it comes from, for messages.

    Raises:
        FileError: it is not a plan, of another version, or a field is missing or wrong.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError(f"{source} is not a plan: it is not JSON ({error}); it may have been cut off.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FileError(f'{source} is not a plan: expected JSON with "format": "{FORMAT}".')
    if found.get("version") != VERSION:
        raise FileError(
            f"{source} is a plan of version {found.get('version')!r}, and this pcafast reads version {VERSION}: "
            "read it with the pcafast that wrote it, or make the plan again."
        )
    sections = {name: _section(found, name, source) for name in ("asked", "reached", "skipped", "files")}
    actions = found.get("actions")
    if not isinstance(actions, list):
        raise FileError(f'{source} is not a plan: expected a list under "actions", got {actions!r}.')
    return Content(**sections, actions=[_decoded(entry, source) for entry in actions])


def _section(found: Mapping[str, Any], name: str, source: Path) -> dict[str, Any]:
    section = found.get(name)
    if not isinstance(section, dict):
        raise FileError(f'{source} is not a plan: expected an object under "{name}", got {section!r}.')
    return section


def _encoded(action: Action) -> dict[str, Any]:
    return {"kind": action.kind, **asdict(action)}


def _decoded(entry: Any, source: Path) -> Action:
    fields = dict(entry) if isinstance(entry, dict) else {}
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise FileError(f"{source}: expected actions of kind {', '.join(KINDS)}, got {entry!r}.")
    try:
        return KINDS[kind](**fields)
    except (TypeError, ArgumentError) as error:
        raise FileError(f"{source}: the {kind} action {fields.get('layer')!r} cannot be read: {error}") from error
