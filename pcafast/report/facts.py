"""What is listed rather than drawn: what was asked and reached, settings, layers left alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pcafast.report.numbers import Shown, count, percent, plain
from pcafast.report.words import words


@dataclass(frozen=True)
class Reached:
    """A quantity before and after; allowed is the share that was asked for, where one was."""

    name: str
    before: Shown
    after: Shown
    share: Shown
    allowed: Shown | None


def reached(report: Mapping[str, Any]) -> list[Reached]:
    """The quantities of ``reached``, such as MACs."""
    budget = (report.get("asked") or {}).get("budget")
    allowed = budget if isinstance(budget, Mapping) else {}
    return [_reached(name, value, allowed.get(name)) for name, value in (report.get("reached") or {}).items()]


def _reached(name: str, value: Mapping[str, Any], allowed: object) -> Reached:
    return Reached(
        words(name),
        count(value.get("before")),
        count(value.get("after")),
        percent(value.get("share"), 1),
        None if allowed is None else percent(allowed, 1),
    )


def facts(values: Mapping[str, Any] | None) -> list[tuple[str, Shown]]:
    """Names and values in words, those of nested mappings under both names."""
    return [(words(name), shown) for name, shown in _flat(values or {})]


def left_alone(skipped: Mapping[str, Any] | None) -> list[tuple[str, list[str]]]:
    """The layers by reason, the most frequent reason first."""
    layers: dict[str, list[str]] = {}
    for layer, reason in (skipped or {}).items():
        layers.setdefault(str(reason), []).append(str(layer))
    return sorted(layers.items(), key=lambda item: -len(item[1]))


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Shown]]:
    for name, value in values.items():
        if name == "budget" and isinstance(value, Mapping):
            shares = [f"{percent(share, 1).text} of the {words(key, begin=False)}" for key, share in value.items()]
            yield name, Shown(", ".join(shares), "")
        elif isinstance(value, Mapping):
            yield from ((f"{name}_{key}", shown) for key, shown in _flat(value))
        else:
            yield name, _shown(value)


def _shown(value: object) -> Shown:
    if isinstance(value, bool):
        return Shown("yes" if value else "no", "")
    if isinstance(value, list | tuple):
        return Shown(", ".join(_shown(item).text for item in value) or "none", "")
    return plain(value)
