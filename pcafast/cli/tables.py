"""Tables that the commands print."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.table import Table

from pcafast.errors import PcafastWarning
from pcafast.loop import Costs, Evaluation

console = Console()

LATENCY_BATCH = 64
"""Images in the batch whose latency is measured."""


@contextmanager
def notes_shown() -> Iterator[None]:
    """Inside the block pcafast's warnings are shown as notes, without the place in the code that they come from."""
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, PcafastWarning):
            Console(stderr=True).print(f"note: {message}", highlight=False, markup=False, soft_wrap=True)
        else:
            usual(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PcafastWarning)
        warnings.showwarning = show
        yield


def comparison(rows: dict[str, tuple[Evaluation, Costs]]) -> Table:
    """Accuracy and costs of a model, one row for each of its states; ratios are to the first."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    first = next(iter(rows.values()))[1]
    for title in ("accuracy", "params", "MACs", f"latency of {first.batch_size}"):
        table.add_column(title, justify="right")

    def share(value: float, of: float) -> str:
        return f" ({value / of:.0%})" if len(rows) > 1 else ""

    for name, (evaluation, costs) in rows.items():
        table.add_row(
            name,
            f"{evaluation.accuracy:.2%}",
            f"{costs.params:,}{share(costs.params, first.params)}",
            f"{costs.macs:,}{share(costs.macs, first.macs)}",
            f"{costs.seconds * 1000:.2f} ms{share(costs.seconds, first.seconds)}",
        )
    return table
