"""Renders the tables of the documents from the result files.

In a document, a table stands between <!-- NAME --> and <!-- end -->, NAME being one of the functions below.
``python benchmarks/render.py`` writes them anew; with ``--check`` it only says whether they are up to date.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import results

DOCUMENTS = [Path(__file__).parent.parent / "README.md"]


def low_rank() -> str:
    """Accuracy after PCA."""
    measured = results.read("low_rank")
    rows = [[what] for what in next(iter(measured.values()))["rows"]]
    for network in measured.values():
        original = network["rows"]["original"]["macs"]
        for line, figures in zip(rows, network["rows"].values(), strict=True):
            line += [f"{figures['accuracy']:.2%}", f"{figures['macs'] / original:.1%}"]
    titles = [title for name in measured for title in (name.replace("resnet", "ResNet-"), "MACs")]
    return table(["", *titles], rows)


def collect_cost() -> str:
    """Time of a pass with statistics."""
    measured = results.read("collect_cost")
    rows = [[kind, f"{factor:.2f}"] for kind, factor in measured["times_plain"].items()]
    return table(["statistics collected", "time of forward and backward"], rows)


def headline() -> str:
    """The sentences with the figures."""
    cost, accuracy = results.read("collect_cost"), results.read("low_rank")
    best = {
        name: max(row["accuracy"] for what, row in network["rows"].items() if what != "original")
        for name, network in accuracy.items()
    }
    plain, small = accuracy["resnet56"]["rows"]["original"]["accuracy"], best["resnet56"]
    return (
        f"Covariance, Taylor scores and feature-map ranks of all layers of a ResNet-56 come out of one pass over "
        f"{cost['images']:,} images that takes {cost['times_plain']['all three']:.1f} times the plain forward and "
        f"backward, and the peak memory of a training step grows by {max(cost['allocated_growth'], 0):.1%}. Factorised "
        f"by PCA to {accuracy['resnet56']['share_of_macs']:.0%} of its MACs, without any retraining, the network still "
        f"has {small:.1%} accuracy on CIFAR-10, from {plain:.1%}."
    )


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, rule, *rows])


TABLES: dict[str, Callable[[], str]] = {function.__name__: function for function in (low_rank, collect_cost, headline)}


def rendered(text: str) -> str:
    """The document with its tables made anew."""
    return re.sub(
        r"(<!-- (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for document in DOCUMENTS:
        before = document.read_text()
        after = rendered(before)
        if "--check" not in sys.argv:
            document.write_text(after)
        elif before != after:
            sys.exit(f"{document.name} is out of date: python benchmarks/render.py")
