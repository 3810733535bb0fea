"""A progress bar with the time left, for whatever takes longer than a moment."""

import sys
import threading
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")

PATIENCE = 1.0
"""Seconds of work before a bar appears."""


def track(items: Iterable[Item], description: str) -> Iterator[Item]:
    """The items, with a progress bar on standard error (if that is a terminal) once they take a while."""
    if not sys.stderr.isatty():
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    progress = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(description, total=total)
    # By a timer, since the first item may be the one that takes long.
    patience = threading.Timer(PATIENCE, progress.start)
    patience.start()
    try:
        for item in items:
            yield item
            progress.advance(task)
    finally:
        patience.cancel()
        progress.stop()
