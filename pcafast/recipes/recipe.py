"""What the file of a recipe holds."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

Results = dict[str, Any]
"""What JSON can hold."""


class Table(NamedTuple):
    """The first column says what the row is of; the others are figures."""

    titles: list[str]
    rows: list[list[str]]
    notes: list[str]


class Recipe(Protocol):
    """A module of this package."""

    SUMMARY: str
    """One line for the list of recipes."""

    @property
    def run(self) -> Callable[..., Results]:
        """The experiment on the data in a folder, its first argument; the others, by keyword, are its options."""

    @property
    def table(self) -> Callable[[Results], Table]:
        """What its results look like."""
