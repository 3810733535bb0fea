"""Paths of SVG drawings, from fractions of their width and (downwards) of their height."""

import math
from collections.abc import Iterable

SIZE = 1000
"""Units in the width and in the height of every drawing."""


def stairs(start: float, steps: Iterable[tuple[float, float]], ground: float) -> str:
    """The outline of bars side by side that stand on the ground, each given by its level and by where it ends."""
    path = f"M{_units(start)} {_units(ground)}"
    for level, end in steps:
        path += f"V{_units(level)}H{_units(end)}"
    return f"{path}V{_units(ground)}Z"


def polyline(points: Iterable[tuple[float, float]]) -> str:
    """A line through all points."""
    return "M" + "L".join(f"{_units(x)} {_units(y)}" for x, y in points)


def across(levels: Iterable[float]) -> str:
    """Lines over the whole width."""
    return "".join(f"M0 {_units(level)}H{SIZE}" for level in levels)


def down(places: Iterable[float]) -> str:
    """Lines over the whole height."""
    return "".join(f"M{_units(place)} 0V{SIZE}" for place in places)


def round_numbers(low: float, high: float) -> list[float]:
    """Two to six evenly spaced round numbers, the first not above low and the last not below high."""
    span = max(high - low, 1e-3 * max(abs(low), abs(high))) or 1.0
    size = 10.0 ** math.floor(math.log10(span / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= span / 4)
    # To rounding: 0.3 / 0.1 is just below 3.
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [index * step for index in range(first if last > first else first - 1, last + 1)]


def _units(fraction: float) -> int:
    return round(SIZE * fraction)
