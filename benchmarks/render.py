"""Renders the tables of the documents from the result files.

In a document, a table stands between <!-- NAME --> and <!-- end -->, NAME being a function below, in operator_tables or
in cuda_tables. ``python benchmarks/render.py`` writes them anew; with ``--check`` it only says whether they are up to
date.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cuda_tables
import operator_tables
import results
from tables import paragraph, table

from pcafast.recipes import RECIPES, pca_cifar_resnet56

DOCUMENTS = [Path(__file__).parent.parent / "README.md", Path(__file__).parent / "README.md"]


def one_pass() -> str:
    """The sentence about one pass for all layers."""
    measured = results.read("one_pass")
    times = measured["one_by_one_seconds"] / measured["seconds"]
    return paragraph(
        f"The covariances of all {measured['layers']} layers of a ResNet-56 over {measured['images']} images take "
        f"{measured['seconds']:.1f} s in one pass (the forward alone {measured['forward_seconds']:.1f} s), and "
        f"{measured['one_by_one_seconds']:.0f} s layer by layer as in pca-compress, each forward ending at its layer: "
        f"{times:.0f} times as long (`benchmarks/one_pass.py`)."
    )


def collect_cost() -> str:
    """Time of a pass with statistics."""
    measured = results.read("collect_cost")
    rows = [[kind, f"{factor:.2f}"] for kind, factor in measured["times_plain"].items()]
    return table(["statistics collected", "time of forward and backward"], rows)


def demo() -> str:
    """The demo, over several seeds."""
    rows = [
        [
            seed,
            f"{run['trained']:.2%}",
            *(f"{run[method]:.2%}" for method in ("pca", "taylor", "rank")),
            f"{run['seconds']:.0f} s",
        ]
        for seed, run in results.read("demo").items()
    ]
    return table(["seed", "trained", "PCA", "Taylor", "rank", "whole command"], rows)


def pruning() -> str:
    """Accuracy after removing channels."""
    measured = results.read("pruning")["rows"]
    steps = list(measured["taylor"]["accuracy"])
    rows = [
        [
            name,
            *(f"{row['accuracy'][step]:.2%}" if step in row["accuracy"] else "" for step in steps),
            f"{row['macs']:.1%}",
            f"{row['speedup']:.2f}x",
        ]
        for name, row in measured.items()
    ]
    return table(["", *steps, "MACs", "speed"], rows)


def planning() -> str:
    """Time and result of planning."""
    rows = [
        [
            name,
            str(row["layers"]),
            f"{row['share_of_macs']:.2%}",
            f"{row['share_of_params']:.0%}",
            f"{row['seconds']:.1f} s",
        ]
        for name, row in results.read("planning").items()
    ]
    return table(["", "layers", "MACs", "params", "time"], rows)


def kills() -> str:
    """The sentence about killed runs."""
    measured = results.read("kills")
    return paragraph(
        f"Of {measured['kills']} runs of `pcafast compress` on a ResNet-20, all four methods, killed with -9 at random "
        f"moments and started again, {measured['identical']} ended with the same files as a run that was let alone "
        "(`benchmarks/kills.py`)."
    )


def handover() -> str:
    """The sentence about the optimizer's momenta."""
    runs = list(results.read("handover").values())
    kept, lost = (sum(run[how] for run in runs) / len(runs) for how in ("with momenta", "without"))
    return paragraph(
        f"Where a ResNet-20 in training is pruned to 80% of its MACs, the loss of the next 20 batches is {kept:.3f} on "
        f"average with the optimizer's momenta handed over and {lost:.3f} without ({len(runs)} seeds, "
        "`benchmarks/handover.py`)."
    )


def headline() -> str:
    """The sentences with the figures."""
    cost, network = results.read("collect_cost"), results.read("pca_cifar_resnet56")["resnet56"]
    lowest, pruned = network["budgets"][0], results.read("pruning")
    taylor = pruned["rows"]["taylor"]["accuracy"][f"{pruned['epochs']} epochs"]
    small, plain = lowest["rows"][pca_cifar_resnet56.BY_LOSSES]["accuracy"], network["original"]["accuracy"]
    pca = lowest["rows"][pca_cifar_resnet56.UNIFORM]["accuracy"]
    return paragraph(
        f"Covariance, Taylor scores and feature-map ranks of all layers of a ResNet-56 come out of one pass over "
        f"{cost['images']:,} images that takes {cost['times_plain']['all three']:.1f} times the plain forward and "
        f"backward, and the peak memory of a training step grows by {max(cost['allocated_growth'], 0):.1%}. With "
        f"low-rank layers of {lowest['share_of_macs']:.0%} of its MACs and no retraining, the network has {small:.1%} "
        f"accuracy on CIFAR-10, from {plain:.1%}, where PCA with the same share of every rank has {pca:.1%}; with half "
        f"its MACs by removing channels, and after {pruned['epochs']} epochs of retraining, {taylor:.1%}."
    )


def hessian() -> str:
    """How well predictors rank directions, per layer."""
    layers = results.read("hessian")["layers"]
    predictors = {"PCA": "v'Cov v", "sampled": "v'Hv, sampled (ranks)", "local": "v'Hv, local"}
    parts = {"random": "random directions", "all": "all"}
    cells = [
        [row["agreement_of_halves"]["random"], *(row[one]["spearman"][part] for part in parts for one in predictors)]
        for row in layers.values()
    ]
    means = [sum(column) / len(cells) for column in zip(*cells, strict=True)]
    rows = [
        [layer, str(row["dimensions"]), *(f"{cell:.2f}" for cell in line)]
        for (layer, row), line in zip(layers.items(), cells, strict=True)
    ]
    titles = [f"{title}, {part}" for part in parts.values() for title in predictors.values()]
    return table(
        ["layer", "width", "halves of the images, random directions", *titles],
        [*rows, ["mean", "", *(f"{one:.2f}" for one in means)]],
    )


def recipe(name: str) -> str:
    """What ``pcafast reproduce`` shows."""
    titles, rows, notes = RECIPES[name].table(results.read(name.replace("-", "_")))
    return "\n\n".join([table(titles, rows), *(paragraph(f"{note[:1].upper()}{note[1:]}.") for note in notes)])


TABLES: dict[str, Callable[[], str]] = {
    **operator_tables.TABLES,
    **cuda_tables.TABLES,
    **{
        file: partial(recipe, name)
        for name in RECIPES
        if (results.FOLDER / f"{(file := name.replace('-', '_'))}.json").exists()
    },
    **{
        function.__name__: function
        for function in (one_pass, hessian, pruning, planning, kills, handover, collect_cost, demo, headline)
    },
}


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
            name = document.relative_to(DOCUMENTS[0].parent)
            sys.exit(f"{name} is out of date: python benchmarks/render.py")
