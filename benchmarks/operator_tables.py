"""The tables of operators: their times against others', the processor's peak, memory."""

import json
from collections.abc import Callable, Iterable
from statistics import geometric_mean
from typing import Any

import results
from tables import duration, paragraph, size, sizes, table

Row = dict[str, Any]

RECIPES = ("permute, matmul", "bmm, sum", "addmm per image", "einsum")
UNFOLDING = {
    "unfold, matmul": "unfold, transpose, product",
    "unfold, ssyrk": "unfold and scipy's `ssyrk`",
    "curvlinops": "curvlinops",
    "kfac-pytorch": "kfac-pytorch",
}
MATRIX_RANK = "`torch.linalg.matrix_rank`"


def speed() -> str:
    """How many times as long others take: over all inputs, and at least."""
    rows = [
        *covariance_summary(),
        *patch_summary(),
        *(
            summary("rank", f"maps of {sides}", f"{MATRIX_RANK}, {peer}", rows_of("rank", fits), peer)
            for sides, fits in {
                "8x8 to 32x32": lambda row: row["shape"][2] <= 32,
                "56x56 to 224x224": lambda row: row["shape"][2] > 32,
            }.items()
            for peer in ("batched", "one by one")
        ),
        summary(
            *("Taylor", "activations larger than cache", "pytorch-pruning's expression"),
            *(rows_of("taylor", lambda row: row["shape"][0] > 1), "expression"),
        ),
        summary("moments", "activations", "torch's expressions", rows_of("moments"), "expression"),
    ]
    return table(["operator", "on", "against", "geometric mean", "least"], rows, texts=3)


def covariance_summary() -> list[list[str]]:
    """By network and layout."""
    lines = []
    for network in names("covariance", "network"):
        on = f"outputs of convolutions, {network}"
        some = rows_of("covariance", lambda row, network=network: row["network"] == network)
        lines.append(summary("covariance", on, "the fastest recipe of torch calls", some, *RECIPES))
        lines.append(summary("covariance", on, "a permuted copy and its product", some, RECIPES[0]))
    return lines


def patch_summary() -> list[list[str]]:
    """By network against pca-compress's way, and over all networks against the others."""
    every, (first, *others) = names("patch covariance", "network"), UNFOLDING
    chosen = [*(([network], 1, first) for network in every), *((every, 1, peer) for peer in others)]
    chosen += [(every, 2, peer) for peer in UNFOLDING]
    lines = []
    for networks, stride, peer in chosen:
        rows = [row for row in rows_of("patch covariance") if row["stride"] == stride and row["network"] in networks]
        if all(peer in row["seconds"] for row in rows):
            on = f"3x3 convolutions of stride {stride}, {networks[0] if len(networks) == 1 else 'all networks'}"
            lines.append(summary("patch covariance", on, UNFOLDING[peer], rows, peer))
    return lines


def summary(operator: str, on: str, against: str, rows: list[Row], *peers: str) -> list[str]:
    """A line of the summary: the ratios to the fastest of the peers."""
    factors = [fastest(row, peers)[1] for row in rows]
    return [operator, on, against, times(geometric_mean(factors)), times(min(factors))]


def fastest(row: Row, peers: Iterable[str]) -> tuple[str, float]:
    """Which of the peers it is, and how many times pcafast's its time is."""
    seconds = row["seconds"]
    peer = min((one for one in peers if one in seconds), key=seconds.__getitem__)
    return peer, seconds[peer] / seconds["pcafast"]


def rows_of(operator: str, fits: Callable[[Row], bool] = lambda _: True) -> list[Row]:
    """Those of the last run of ``pcafast bench`` that fit."""
    return [row for row in results.read("operators")[operator] if fits(row)]


def names(operator: str, key: str) -> list[str]:
    """The values of a key, in order."""
    return list(dict.fromkeys(row[key] for row in rows_of(operator)))


def times(factor: float) -> str:
    return f"{factor:.1f}x" if factor >= 1.05 else f"{factor:.2f}x"


def share_of_peak(row: Row, rows: list[Row]) -> str:
    """Necessary multiply-adds per second, over those of a large product of matrices, the fastest in the run."""

    def rate(one: Row, side: str) -> float:
        return float(one["multiply_adds"][side] / one["seconds"][side])

    return f"{rate(row, 'pcafast') / max(rate(one, 'sgemm') for one in rows):.0%}"


def covariance_speed() -> str:
    """A line for each layer: both layouts side by side."""
    lines: dict[tuple[str, str], list[str]] = {}
    layouts, rows = names("covariance", "layout"), rows_of("covariance")
    for row in rows:
        peer, factor = fastest(row, RECIPES)
        cells = [
            *(duration(row["seconds"]["pcafast"]), share_of_peak(row, rows), f"{times(factor)} ({peer})"),
            times(fastest(row, RECIPES[:1])[1]),
        ]
        lines.setdefault((row["network"], sizes(row["shape"])), []).extend(cells)
    titles = [title for layout in layouts for title in (f"pcafast, {layout}", "of peak", "fastest recipe", RECIPES[0])]
    return table(["network", "batch", *titles], [[*key, *cells] for key, cells in lines.items()], texts=2)


def patch_covariance_speed() -> str:
    """A line for each layer."""
    lines, rows = [], rows_of("patch covariance")
    for row in rows:
        seconds, absent = row["seconds"], row.get("absent", {})
        others = [
            f"{duration(seconds[peer])}, {times(fastest(row, [peer])[1])}" if peer in seconds else absent[peer]
            for peer in UNFOLDING
        ]
        cells = [row["network"], sizes(row["shape"]), str(row["stride"]), duration(seconds["pcafast"])]
        lines.append([*cells, share_of_peak(row, rows), *others])
    return table(["network", "batch", "stride", "pcafast", "of peak", *UNFOLDING], lines, texts=2)


def covariance_memory() -> str:
    """Beside the batch, state and what an update needs."""
    return memory("covariance")


def patch_covariance_memory() -> str:
    """Beside the batch, state and what an update needs."""
    return memory("patch covariance")


def memory(operator: str) -> str:
    rows = results.read("memory")[operator]
    sides = [side for side in rows[0]["bytes"] if side != "pcafast, 2 threads"]
    sides[1:1] = ["pcafast, 2 threads"]
    cells = [
        [
            sizes(row["shape"]),
            *(f"{size(row['bytes'][side]['state'])} + {size(row['bytes'][side]['extra'])}" for side in sides),
        ]
        for row in rows
    ]
    return table(["batch", *sides], cells)


def memory_summary() -> str:
    """The sentence about the largest batch of patches."""
    row = results.read("memory")["patch covariance"][0]
    ours, theirs = (row["bytes"][side] for side in ("pcafast", "unfold, matmul"))
    return paragraph(
        f"To take in a batch of {sizes(row['shape'])}, the covariance of 3x3 patches needs {size(ours['extra'])} "
        f"beside the batch and its state of {size(ours['state'])}; unfolding and multiplying needs "
        f"{size(theirs['extra'])} (`benchmarks/memory.py`)."
    )


def rank_speed() -> str:
    """Time per map, and what others take of it."""
    rows = []
    for row in rows_of("rank"):
        images, channels, height, width = row["shape"]
        per_map = {peer: seconds / (images * channels) for peer, seconds in row["seconds"].items()}
        ours = per_map.pop("pcafast")
        others = [f"{duration(time)}, {time / ours:.1f}x" for time in per_map.values()]
        rows.append([f"{height}x{width}", duration(ours), *others])
    return table(["map", "pcafast", f"{MATRIX_RANK}, batched", f"{MATRIX_RANK}, one by one"], rows)


def taylor_speed() -> str:
    """How many times longer the expression takes, and torch.compile of it."""
    return ratios("taylor", ("expression", "torch.compile"))


def moments_speed() -> str:
    """How many times longer torch's expressions take."""
    return ratios("moments", ("expression",))


def ratios(operator: str, peers: tuple[str, ...]) -> str:
    """Of the peers' times to pcafast's: shapes down, dtypes and layouts across."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows_of(operator):
        seconds = row["seconds"]
        factors = [f"{seconds[peer] / seconds['pcafast']:.1f}x" for peer in peers if peer in seconds]
        cells.setdefault(sizes(row["shape"]), {})[f"{row['dtype']}, {row['layout']}"] = ", ".join(factors)
    return table(["activation", *next(iter(cells.values()))], [[shape, *row.values()] for shape, row in cells.items()])


def hrank() -> str:
    """The sentence about HRank's procedure."""
    measured = results.read("hrank")
    ours, theirs = measured["pcafast_seconds"], measured["hrank_seconds"]
    return paragraph(
        f"The rank scores of all {measured['places']} layers of a ResNet-56 over {measured['images']} images, on the "
        f"CPU (threads: {measured['threads']}): {theirs:.0f} s by HRank's procedure, a pass for every layer and an "
        f"SVD for every map, and {ours:.1f} s by one pass with `collect`, {theirs / ours:.0f} times less. Of "
        f"{measured['maps']:,} maps the two disagree about {measured['differing']}; by SVD in float64, HRank has "
        f"{measured['hrank_wrong']} of these wrong and pcafast {measured['pcafast_wrong']} "
        "(`PCAFAST_DATA=folder python benchmarks/hrank.py`)."
    )


def environments() -> str:
    """What made each result file, and where."""
    rows = []
    for path in sorted(results.FOLDER.glob("*.json")):
        file = json.loads(path.read_text())
        made = file["environment"]
        device = made["gpu"] or made["processor"]
        rows.append([f"`{path.name}`", f"`{file['command']}`", device, made["torch"], str(made["threads"])])
    return table(["file", "command", "on", "torch", "threads"], rows, texts=4)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(speed, covariance_speed, patch_covariance_speed, covariance_memory, patch_covariance_memory, memory_summary),
        *(rank_speed, taylor_speed, moments_speed, hrank, environments),
    )
}
