"""Small charts of a layer's sorted values: the eigenvalues and their cut, the scores and who stays.

Every value is a bar of a staircase; runs of kept bars become one path that is drawn filled, runs of the others one that
is drawn hollow, so they are told apart without colour.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pcafast.report.drawing import across, down, stairs
from pcafast.report.numbers import Shown, finite, percent, plain, power_of_ten

# More cannot be told apart in a chart as small as these, and a page of 160 of them should stay small.
_MAX_BARS = 64
# Smaller eigenvalues, relative to the largest, are rounding errors of the covariance.
_LOWEST_DECADE = -8


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        kept: path of what is kept; empty if nothing is.
        removed: path of the rest.
        cut: path of the cut; empty where kept and removed interleave, or nothing is removed.
        facts: what was kept, in words.
        edges: the values at the upper and the lower edge, where they are labelled.
        grid: path of the lines at whole powers of ten.
    """

    layer: str
    kept: str
    removed: str
    cut: str
    facts: list[str]
    edges: tuple[Shown, Shown] | None = None
    grid: str = ""


@dataclass(frozen=True)
class _Bar:
    start: float
    end: float
    height: float
    kept: bool


def spectra(items: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """One panel per layer, all on the same log scale relative to the largest eigenvalue of the layer."""
    spectra = [_numbers(item["eigenvalues"]) for item in items]
    relative = [_relative(values) for values in spectra]
    decades = _decades([ratio for ratios in relative for ratio in ratios if ratio > 0])
    return [
        _spectrum(item, values, ratios, decades) for item, values, ratios in zip(items, spectra, relative, strict=True)
    ]


def scores(items: Sequence[Mapping[str, Any]]) -> dict[str, list[Panel]]:
    """By criterion one panel per layer, each on its own linear scale, as that shows the order within the layer."""
    panels: dict[str, list[Panel]] = {}
    for item in items:
        panels.setdefault(str(item.get("criterion") or ""), []).append(_score(item))
    return panels


def _spectrum(item: Mapping[str, Any], values: list[float], relative: list[float], decades: int) -> Panel:
    rank, largest, total = item["rank"], max(values, default=0.0), sum(values)
    heights = [_log_height(ratio, decades) for ratio in relative]
    flags = [index < rank for index in range(len(values))]
    facts = [f"rank {rank} of {len(item['eigenvalues'])}"]
    if total > 0:
        facts.append(f"{percent(sum(values[:rank]) / total, 1).text} of variance")
    facts += _left_out(item["eigenvalues"], values)
    edges = Shown("1", f"{largest!r}"), Shown(power_of_ten(decades), f"{largest * 10.0**decades!r}")
    grid = across(decade / decades for decade in range(-1, decades, -1))
    return Panel(item["layer"], *_paths(_thinned(heights, flags), 1), _cut(flags), facts, edges, grid)


def _relative(values: Sequence[float]) -> list[float]:
    largest = max(values, default=0.0)
    return [value / largest if largest > 0 else 0.0 for value in values]


def _decades(ratios: list[float]) -> int:
    """The power of ten at the lower edge: nearly all eigenvalues lie above, a few tiny ones do not flatten the rest."""
    typical = sorted(ratios)[len(ratios) // 20] if ratios else 1.0
    return max(_LOWEST_DECADE, min(-1, math.floor(math.log10(typical))))


def _log_height(ratio: float, decades: int) -> float:
    return max(0.0, 1 - math.log10(ratio) / decades) if ratio > 0 else 0.0


def _score(item: Mapping[str, Any]) -> Panel:
    kept = set(item["kept"])
    indexed = [
        (number, index in kept) for index, value in enumerate(item["values"]) if (number := finite(value)) is not None
    ]
    # Of equal scores the kept ones first.
    indexed.sort(reverse=True)
    values = [value for value, _ in indexed]
    top, bottom = max([0.0, *values]), min([0.0, *values])
    span = (top - bottom) or 1.0
    flags = [flag for _, flag in indexed]
    bars = _thinned([(value - bottom) / span for value in values], flags)
    facts = [f"{len(kept)} of {len(item['values'])} kept"]
    facts += [f"highest {plain(values[0], 3).text}"] if values else []
    facts += _left_out(item["values"], values)
    return Panel(item["layer"], *_paths(bars, 1 + bottom / span), _cut(flags), facts)


def _cut(kept: Sequence[bool]) -> str:
    count = sum(kept)
    clean = all(kept[:count])
    return down([count / len(kept)]) if clean and 0 < count < len(kept) else ""


def _numbers(values: Sequence[object]) -> list[float]:
    return [number for value in values if (number := finite(value)) is not None]


def _left_out(values: Sequence[object], drawn: Sequence[float]) -> list[str]:
    missing = len(values) - len(drawn)
    return [f"{missing} not finite, not drawn"] if missing else []


def _thinned(heights: Sequence[float], kept: Sequence[bool]) -> list[_Bar]:
    """Bars of the same total widths; where there are too many, neighbours share their mean height, kept ones first."""
    count = len(heights)
    groups = min(count, _MAX_BARS)
    bars = []
    for group in range(groups):
        start, end = group * count // groups, (group + 1) * count // groups
        height = sum(heights[start:end]) / (end - start)
        border = start + sum(kept[start:end])
        bars += [
            _Bar(low / count, high / count, height, flag)
            for low, high, flag in ((start, border, True), (border, end, False))
            if low < high
        ]
    return bars


def _paths(bars: Sequence[_Bar], ground: float) -> tuple[str, str]:
    """The paths of kept and of removed bars."""
    paths = {True: "", False: ""}
    for kept, group in groupby(bars, key=lambda bar: bar.kept):
        run = list(group)
        paths[kept] += stairs(run[0].start, ((1 - bar.height, bar.end) for bar in run), ground)
    return paths[True], paths[False]
