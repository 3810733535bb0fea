"""Accuracy and MACs along the steps: the chart, and the table that holds every figure of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from pcafast.report.drawing import across, down, polyline, round_numbers, stairs
from pcafast.report.numbers import NO_BREAK, Shown, count, finite, percent, plain
from pcafast.report.words import words

# With more stages than this, only the last of a run of equal ones gets a marker; the line goes through all.
_MAX_MARKERS = 60
_MAX_STEP_LABELS = 10
_COLUMNS: dict[str, Callable[[object], Shown]] = {
    "accuracy": percent,
    "score": plain,
    "loss": plain,
    "macs": count,
    "params": count,
}


@dataclass(frozen=True)
class Stage:
    """A row of the table; note holds the figures that have no column."""

    step: str
    name: str
    shape: int
    values: list[Shown | None]
    note: str


@dataclass(frozen=True)
class Marker:
    """A point of the chart; x and y in percent."""

    x: float
    y: float
    shape: int
    text: str


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in percent from the left or the top."""

    place: float
    text: str


@dataclass(frozen=True)
class Line:
    """One quantity over the stages, as paths: the line or area, the grid, and the level of the original."""

    title: str
    text: str
    path: str
    grid: str
    ticks: list[Tick]
    markers: list[Marker]
    reference: str = ""


@dataclass(frozen=True)
class Steps:
    """The section.

    Attributes:
        stages: the rows of the table, whose columns have these titles.
        lines: the charts, one above the other.
        labels: the steps, in the middle of their stages.
        borders: path of the lines between steps.
        legend: the stages there are, by the index of their shape.
    """

    stages: list[Stage]
    titles: list[str]
    lines: list[Line]
    labels: list[Tick]
    borders: str
    legend: list[str]


def steps(history: Sequence[Mapping[str, Any]]) -> Steps:
    """The section of a history, whose first stage is the original network."""
    columns = [key for key in _COLUMNS if any(entry.get(key) is not None for entry in history)]
    legend = list(dict.fromkeys(entry["stage"] for entry in history))
    stages = [_stage(entry, legend.index(entry["stage"]), columns) for entry in history]
    labels, borders = _step_labels(history)
    lines = [_quality(history, stages), _macs(history)]
    titles = [words(key) for key in columns]
    return Steps(stages, titles, [line for line in lines if line], labels, borders, legend)


def _stage(entry: Mapping[str, Any], shape: int, columns: Sequence[str]) -> Stage:
    name = entry["stage"] + (f", epoch{NO_BREAK}{entry['epoch']}" if entry.get("epoch") is not None else "")
    named = {"step", "stage", "epoch", *_COLUMNS}
    rest = [f"{words(key, begin=False)} {plain(value).text}" for key, value in entry.items() if key not in named]
    values = [_COLUMNS[key](entry[key]) if entry.get(key) is not None else None for key in columns]
    return Stage(plain(entry.get("step")).text, name, shape, values, ", ".join(rest))


def _quality(history: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> Line | None:
    """What the networks are judged by."""
    key = "score" if any("score" in entry for entry in history) else "accuracy"
    show = _COLUMNS[key]
    values = {index: value for index, entry in enumerate(history) if (value := finite(entry.get(key))) is not None}
    if not values:
        return None
    known = list(values.values())
    ticks = round_numbers(min(known), max(known))
    low, high = ticks[0], ticks[-1]
    points = {index: ((index + 0.5) / len(history), (high - value) / (high - low)) for index, value in values.items()}
    markers = [
        Marker(100 * x, 100 * y, stages[index].shape, f"{stages[index].name}: {show(values[index]).text}")
        for index, (x, y) in points.items()
        if _has_marker(history, index)
    ]
    return Line(
        words(key),
        f"{words(key)} from {show(known[0]).text} to {show(known[-1]).text}",
        polyline(points.values()),
        across((high - tick) / (high - low) for tick in ticks),
        [Tick(100 * (high - tick) / (high - low), _tick_text(tick, key)) for tick in ticks],
        markers,
        across([points[0][1]]) if 0 in points else "",
    )


def _macs(history: Sequence[Mapping[str, Any]]) -> Line | None:
    values = [finite(entry.get("macs")) for entry in history]
    whole = values[0]
    if not whole:
        return None
    shares = [1.0]
    for value in values[1:]:
        shares.append(shares[-1] if value is None else value / whole)
    high = max(shares)
    ticks = [0.0, 0.5, 1.0]
    return Line(
        "MACs, share of the original",
        f"MACs from {percent(shares[0], 1).text} to {percent(shares[-1], 1).text} of the original",
        stairs(0, ((1 - share / high, (index + 1) / len(shares)) for index, share in enumerate(shares)), 1),
        across(1 - tick / high for tick in ticks),
        [Tick(100 * (1 - tick / high), percent(tick, 0).text) for tick in ticks],
        [],
    )


def _has_marker(history: Sequence[Mapping[str, Any]], index: int) -> bool:
    if len(history) <= _MAX_MARKERS or index == len(history) - 1:
        return True
    here, following = history[index], history[index + 1]
    return (here.get("step"), here["stage"]) != (following.get("step"), following["stage"])


def _step_labels(history: Sequence[Mapping[str, Any]]) -> tuple[list[Tick], str]:
    groups = [(step, len(list(entries))) for step, entries in groupby(history, key=lambda entry: entry.get("step"))]
    ends = list(accumulate(length / len(history) for _, length in groups))
    middles = [
        Tick(100 * end - 50 * length / len(history), plain(step).text)
        for end, (step, length) in zip(ends, groups, strict=True)
    ]
    return middles[:: math.ceil(len(groups) / _MAX_STEP_LABELS)], down(ends[:-1])


def _tick_text(tick: float, key: str) -> str:
    if key != "accuracy":
        return plain(tick).text
    digits = next((digits for digits in (0, 1) if math.isclose(100 * tick, round(100 * tick, digits))), 2)
    return percent(tick, digits).text
