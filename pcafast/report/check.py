"""Refuses what is not a report, before anything is drawn of it."""

from collections.abc import Mapping
from typing import Any

from pcafast.errors import ArgumentError

_MAPPINGS = ("environment", "data", "asked", "reached", "before", "after", "skipped")

# What each item of a list must have.
_ITEMS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "history": {"stage": str},
    "layers": {"layer": str},
    "spectra": {"layer": str, "eigenvalues": (list, tuple), "rank": int},
    "scores": {"layer": str, "values": (list, tuple), "kept": (list, tuple)},
}


def check(report: Mapping[str, Any]) -> None:
    """Check the kinds of what a report holds; absent or None is right everywhere.

    Raises:
        ArgumentError: names the part, what was expected and what came.
    """
    for key in _MAPPINGS:
        value = report.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise ArgumentError(f"report: expected {key!r} to be a mapping, got {_name(value)}.")
    for key, value in (report.get("reached") or {}).items():
        if not isinstance(value, Mapping):
            raise ArgumentError(f"report: expected {key!r} of 'reached' to be a mapping, got {_name(value)}.")
    for key in ("warnings", *_ITEMS):
        value = report.get(key)
        if value is not None and not isinstance(value, list | tuple):
            raise ArgumentError(f"report: expected {key!r} to be a list, got {_name(value)}.")
    for key, needed in _ITEMS.items():
        for index, item in enumerate(report.get(key) or ()):
            _check_item(f"{key}[{index}]", item, needed)


def _check_item(place: str, item: object, needed: Mapping[str, type | tuple[type, ...]]) -> None:
    if not isinstance(item, Mapping):
        raise ArgumentError(f"report: expected {place!r} to be a mapping, got {_name(item)}.")
    for key, kind in needed.items():
        if not isinstance(item.get(key), kind):
            expected = "a list" if isinstance(kind, tuple) else f"of type {kind.__name__}"
            raise ArgumentError(f"report: expected {key!r} of {place!r} to be {expected}, got {_name(item.get(key))}.")


def _name(value: object) -> str:
    return "none" if value is None else f"the {type(value).__name__} {value!r:.50}"
