"""Renders the tables of the documents from the result files.

In a document, a table stands between <!-- NAME --> and <!-- end -->, NAME being one of the functions below.
``python benchmarks/render.py`` writes them anew; with ``--check`` it only says whether they are up to date.
"""

import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import results

DOCUMENTS = [Path(__file__).parent.parent / "README.md"]


def low_rank() -> str:
    """Accuracy after PCA."""
    measured = results.read("low_rank")
    rows = [[what] for what in next(iter(measured.values()))["rows"]]
    for network in measured.values():
        original = network["rows"]["original"]
        for line, figures in zip(rows, network["rows"].values(), strict=True):
            shares = (figures[what] / original[what] for what in ("macs", "milliseconds_for_64"))
            line += [f"{figures['accuracy']:.2%}", *(f"{share:.0%}" for share in shares)]
    titles = [title for name in measured for title in (name.replace("resnet", "ResNet-"), "MACs", "CPU time")]
    return table(["", *titles], rows)


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
    text = (
        f"Of {measured['kills']} runs of `pcafast compress` on a ResNet-20, all four methods, killed with -9 at random "
        f"moments and started again, {measured['identical']} ended with the same files as a run that was let alone "
        "(`benchmarks/kills.py`)."
    )
    return textwrap.fill(text, 120)


def handover() -> str:
    """The sentence about the optimizer's momenta."""
    runs = list(results.read("handover").values())
    kept, lost = (sum(run[how] for run in runs) / len(runs) for how in ("with momenta", "without"))
    text = (
        f"Where a ResNet-20 in training is pruned to 80% of its MACs, the loss of the next 20 batches is {kept:.3f} on "
        f"average with the optimizer's momenta handed over and {lost:.3f} without ({len(runs)} seeds, "
        "`benchmarks/handover.py`)."
    )
    return textwrap.fill(text, 120)


def rank_speed() -> str:
    """Time per map, and what others take of it."""
    rows = []
    for row in results.read("operators")["rank"]:
        images, channels, height, width = row["shape"]
        per_map = {peer: seconds / (images * channels) for peer, seconds in row["seconds"].items()}
        ours = per_map.pop("pcafast")
        others = [f"{microseconds(time)}, {time / ours:.1f}x" for time in per_map.values()]
        rows.append([f"{height}x{width}", microseconds(ours), *others])
    matrix_rank = "`torch.linalg.matrix_rank`"
    return table(["map", "pcafast", f"{matrix_rank}, batched", f"{matrix_rank}, one by one"], rows)


def taylor_speed() -> str:
    """How many times longer the expression takes, and torch.compile of it."""
    return ratios("taylor", ("expression", "torch.compile"))


def moments_speed() -> str:
    """How many times longer torch's expressions take."""
    return ratios("moments", ("expression",))


def ratios(operator: str, peers: tuple[str, ...]) -> str:
    """Of the peers' times to pcafast's: shapes down, dtypes and layouts across."""
    cells: dict[str, dict[str, str]] = {}
    for row in results.read("operators")[operator]:
        seconds = row["seconds"]
        times = [f"{seconds[peer] / seconds['pcafast']:.1f}x" for peer in peers if peer in seconds]
        shape = "x".join(map(str, row["shape"]))
        cells.setdefault(shape, {})[f"{row['dtype']}, {row['layout']}"] = ", ".join(times)
    return table(["activation", *next(iter(cells.values()))], [[shape, *row.values()] for shape, row in cells.items()])


def cuda_estimates() -> str:
    """What the CUDA kernels of rank take by count."""
    rows = [
        [f"{size}x{size}", f"{row['seconds'] * 1e9:,.1f} ns", row["waits_for"]]
        for size, row in results.read("cuda_estimates")["rank"].items()
    ]
    return table(["map", "time per map", "unit at its limit"], rows)


def hrank() -> str:
    """The sentence about HRank's procedure."""
    measured = results.read("hrank")
    ours, theirs = measured["pcafast_seconds"], measured["hrank_seconds"]
    text = (
        f"The rank scores of all {measured['places']} layers of a ResNet-56 over {measured['images']} images, on the "
        f"CPU (threads: {measured['threads']}): {theirs:.0f} s by HRank's procedure, a pass for every layer and an "
        f"SVD for every map, and {ours:.1f} s by one pass with `collect`, {theirs / ours:.0f} times less. Of "
        f"{measured['maps']:,} maps the two disagree about {measured['differing']}; by SVD in float64, HRank has "
        f"{measured['hrank_wrong']} of these wrong and pcafast {measured['pcafast_wrong']} "
        "(`PCAFAST_DATA=folder python benchmarks/hrank.py`)."
    )
    return textwrap.fill(text, 120)


def headline() -> str:
    """The sentences with the figures."""
    cost, network = results.read("collect_cost"), results.read("low_rank")["resnet56"]
    rows, pruned = network["rows"], results.read("pruning")
    taylor = pruned["rows"]["taylor"]["accuracy"][f"{pruned['epochs']} epochs"]
    small, plain = rows["ranks by budget, batch norm re-estimated"]["accuracy"], rows["original"]["accuracy"]
    text = (
        f"Covariance, Taylor scores and feature-map ranks of all layers of a ResNet-56 come out of one pass over "
        f"{cost['images']:,} images that takes {cost['times_plain']['all three']:.1f} times the plain forward and "
        f"backward, and the peak memory of a training step grows by {max(cost['allocated_growth'], 0):.1%}. Factorised "
        f"by PCA to {network['share_of_macs']:.0%} of its MACs, with batch norms re-estimated but no retraining, the "
        f"network has {small:.1%} accuracy on CIFAR-10, from {plain:.1%}; with half its MACs by removing channels, and "
        f"after {pruned['epochs']} epochs of retraining, {taylor:.1%}."
    )
    return textwrap.fill(text, 120)


def microseconds(seconds: float) -> str:
    time = seconds * 1e6
    return f"{time:.2f} us" if time < 10 else f"{time:,.0f} us"


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, rule, *rows])


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(low_rank, pruning, planning, kills, handover, collect_cost, demo, headline),
        *(rank_speed, taylor_speed, moments_speed, hrank, cuda_estimates),
    )
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
            sys.exit(f"{document.name} is out of date: python benchmarks/render.py")
