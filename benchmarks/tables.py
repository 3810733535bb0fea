"""Markdown for the documents."""

import textwrap


def table(titles: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """A table, whose first columns are texts and all others numbers."""
    rule = [*["---"] * texts, *["---:"] * (len(titles) - texts)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, rule, *rows])


def paragraph(text: str) -> str:
    """Broken into lines."""
    return textwrap.fill(text, 120)


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    time = seconds * 1e6
    if time < 10:
        return f"{time:.2f} us"
    return f"{time:,.0f} us" if time < 2000 else f"{time / 1e3:,.1f} ms"


def size(count: float) -> str:
    """Of so many bytes."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} KB"


def sizes(shape: list[int]) -> str:
    """As 2x3x4."""
    return "x".join(map(str, shape))
