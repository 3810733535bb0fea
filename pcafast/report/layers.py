"""The layers, one row each: channels or rank, and MACs, before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pcafast.report.numbers import Shown, count, finite, percent, plain


@dataclass(frozen=True)
class Size:
    """One measure of a layer; the bars are lengths in percent, before and after."""

    before: Shown
    after: Shown
    bars: tuple[float, float] | None
    changed: bool


@dataclass(frozen=True)
class Row:
    """One layer; kept is the share of its own MACs, of_whole its share of the model's before."""

    layer: str
    type: str
    width: Size
    macs: Size | None
    kept: Shown | None
    of_whole: Shown | None


def rows(items: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Bars of width are relative to the layer's own, those of MACs to the most expensive layer's."""
    before = [_macs(item, "before") or 0 for item in items]
    largest = max([*before, *(_macs(item, "after") or 0 for item in items)], default=0)
    return [_row(item, largest, sum(before)) for item in items]


def width_title(items: Sequence[Mapping[str, Any]]) -> str:
    """What the width is of these layers."""
    units = dict.fromkeys(str(item.get("unit") or "channels") for item in items)
    return " or ".join(units).capitalize()


def _row(item: Mapping[str, Any], largest: float, total: float) -> Row:
    before, after = finite(item.get("before")), finite(item.get("after"))
    own = max(before or 0, after or 0)
    width = Size(plain(item.get("before")), plain(item.get("after")), _bars(before, after, own), before != after)
    macs = kept = of_whole = None
    if isinstance(pair := item.get("macs"), Mapping):
        old, new = _macs(item, "before"), _macs(item, "after")
        macs = Size(count(pair.get("before")), count(pair.get("after")), _bars(old, new, largest), old != new)
        if old and new is not None:
            kept = percent(new / old, 0)
            of_whole = percent(old / total, 1)
    return Row(item["layer"], str(item.get("type") or ""), width, macs, kept, of_whole)


def _macs(item: Mapping[str, Any], side: str) -> float | None:
    pair = item.get("macs")
    return finite(pair.get(side)) if isinstance(pair, Mapping) else None


def _bars(before: float | None, after: float | None, whole: float) -> tuple[float, float] | None:
    if before is None or after is None or whole <= 0:
        return None
    return 100 * before / whole, 100 * after / whole
