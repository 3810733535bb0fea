"""Numbers for people: a short text, and the exact value beside it."""

import math
from typing import NamedTuple

NO_BREAK = "\N{NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"
_TIMES = "\N{MULTIPLICATION SIGN}"

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_COUNTS = ((1e12, "T"), (1e9, "G"), (1e5, "M"), (1e4, "k"))
_UNIT_SIZES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


class Shown(NamedTuple):
    """What is printed, and the exact value for the tooltip."""

    text: str
    exact: str


def finite(value: object) -> float | None:
    """The value if it is a number that can be drawn, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def percent(share: object, digits: int = 2) -> Shown:
    """0.9339 as 93.39 %; what would be rounded to nothing is said to be less than the last digit."""
    number = finite(share)
    if number is None:
        return _odd(share)
    least = 10.0**-digits
    below = 0 < 100 * number < least / 2
    text = f"<{NO_BREAK}{_fixed(least, digits)}" if below else _fixed(100 * number, digits)
    return Shown(f"{text}{NO_BREAK}%", _exact(number))


def count(value: object) -> Shown:
    """855770 as 0.86 M, 125747840 as 125.7 M."""
    number = finite(value)
    if number is None:
        return _odd(value)
    unit = next((unit for least, unit in _COUNTS if abs(number) >= least), None)
    if unit is None:
        return Shown(plain(number).text, _exact(number))
    scaled = number / _UNIT_SIZES[unit]
    return Shown(f"{_fixed(scaled, 2 if abs(scaled) < 10 else 1)}{NO_BREAK}{unit}", _exact(number))


def seconds(value: object) -> Shown:
    """0.0123 as 12.3 ms."""
    return _scaled(value, _SECONDS, "s")


def byte_size(value: object) -> Shown:
    """3400000 as 3.4 MB."""
    return _scaled(value, _BYTES, "bytes")


def plain(value: object, digits: int = 4) -> Shown:
    """A number without a unit: whole ones in full, others to so many significant digits."""
    number = finite(value)
    if number is None:
        return _odd(value)
    if isinstance(number, int) or (number.is_integer() and abs(number) < 1e15):
        return Shown(_fixed(number, 0), _exact(number))
    mantissa, _, exponent = f"{number:.{digits}g}".partition("e")
    text = mantissa.replace("-", _MINUS)
    if exponent:
        text += f"{NO_BREAK}{_TIMES}{NO_BREAK}{power_of_ten(int(exponent))}"
    return Shown(text, _exact(number))


def power_of_ten(exponent: int) -> str:
    """-5 as 10⁻⁵."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _scaled(value: object, units: tuple[tuple[float, str], ...], base: str) -> Shown:
    number = finite(value)
    if number is None:
        return _odd(value)
    size, unit = next(((size, unit) for size, unit in units if abs(number) >= size), (1.0, base))
    scaled = number / size
    digits = 0 if unit == "bytes" or abs(scaled) >= 99.95 else 1
    return Shown(f"{_fixed(scaled, digits)}{NO_BREAK}{unit}", f"{_exact(number)}{NO_BREAK}{base}")


def _fixed(number: float, digits: int) -> str:
    text = f"{number:,.{digits}f}"
    return text.replace("-", _MINUS) if text.strip("-0.,") else text.lstrip("-")


def _exact(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else repr(number)


def _odd(value: object) -> Shown:
    return Shown("\N{EN DASH}" if value is None else str(value), "")
