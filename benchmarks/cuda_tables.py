"""The tables of the CUDA kernels: measured where a GPU has run these very kernels (gpu.py), else estimated."""

import statistics
from collections.abc import Callable
from typing import Any

import results
from gpu import kernels_digest
from h200 import Least
from tables import duration, paragraph, sizes, table

Row = dict[str, Any]
Found = dict[str, Any]

SMALLEST = 1 << 20
"""Bytes of a batch: a kernel is done with less before the device is full."""
NOT_MEASURED = "not measured"
TOOLS = ("benchmarks/h200.py", "benchmarks/kernel_loops.py", "benchmarks/launches.py", "benchmarks/cuda_estimates.py")
"""What makes the estimates, beside the kernels."""


def measured() -> Found:
    """By section, what gpu.py found; empty if it has not run on these kernels."""
    if not (results.FOLDER / "gpu.json").exists():
        return {}
    sections = results.read("gpu")
    if sections["kernels_digest"] != kernels_digest():
        return {}
    return {name: one["found"] for name, one in sections.items() if isinstance(one, dict) and "found" in one}


def estimates_digest() -> str:
    """Of all that estimates depend on, but the compiler."""
    return kernels_digest(*TOOLS, "tests/machine_code.py", "tests/cuda_compiler.py")


def estimated() -> Found:
    """What cuda_estimates.py found, which a test keeps to these kernels."""
    return results.read("cuda_estimates")


def cuda_status() -> str:
    """The sentence of the README."""
    found = measured()
    table = "[benchmarks/README.md](benchmarks/README.md)"
    if "kernels" in found:
        return paragraph(f"The CUDA kernels, timed on one {found['kernels']['name']}, are in {table}.")
    return paragraph(
        "The CUDA kernels as they are now have not been timed on a GPU. Their source runs on the CPU in the tests, "
        f"against the same references; what their machine code lets one expect of an H200 is in {table}."
    )


def cuda_source() -> str:
    """The sentence that says what the figures are."""
    found = measured()
    if "kernels" in found:
        return paragraph(f"Measured on one {found['kernels']['name']} (`gpu.json`).")
    return paragraph(
        "The kernels as they are now have not run on a GPU: **all times below are estimates** (`cuda_estimates.json`), "
        "mostly too short ones, since latencies, launches and the merge into the state are left out."
    )


def cuda_roofline() -> str:
    """How near each kernel comes to its least time, the worst first."""
    found, lines = measured(), {}
    for row in estimated()["rows"]:
        if row["least"]["moved_bytes"] >= SMALLEST:
            lines.setdefault((row["operator"], row["kernel"]), []).append((row, *times_of(row, found)))
    cells = []
    for (operator, kernel), some in lines.items():
        shares = [least / seconds for _, least, seconds in some]
        (row, least, seconds), worst = some[shares.index(min(shares))], min(shares)
        batch = f"{sizes(row['shape'])}, stride {row['stride']}" if row.get("stride", 1) > 1 else sizes(row["shape"])
        times = [batch, duration(least), duration(seconds), row["limited_by"]]
        cells.append((worst, [f"`{kernel}`", operator.replace("_", " "), *times, f"{worst:.0%}", share(shares)]))
    titles = ["kernel", "operator", "worst batch", "least time", "time", "limited by", "share", "mean share"]
    return table(titles, [line for _, line in sorted(cells, key=lambda one: one[0])], texts=3)


def share(shares: list[float]) -> str:
    return f"{statistics.geometric_mean(shares):.0%} of {len(shares)}"


def times_of(row: Row, found: Found) -> tuple[float, float]:
    """Least time and time in seconds: of the GPU that was measured, or of an H200 by its datasheet."""
    if not {"roofline", row["operator"]} <= found.keys():
        return row["least_seconds"], row["seconds"]
    ceilings = found["roofline"]
    exact = max(ceilings["float32_matmul_flops"], ceilings["tf32_matmul_flops"] / 3)
    flops = {"bfloat16": ceilings["bfloat16_matmul_flops"], "float32": exact}
    flops["float64"] = ceilings["float64_multiply_add_flops"]
    least = Least(**row["least"]).seconds(ceilings["copy_bytes_per_second"], flops)
    return least, seconds_of(row, found[row["operator"]])


def seconds_of(row: Row, section: list[Row]) -> float:
    """Of the same input in a section of gpu.json."""
    if row["operator"] == "rank":
        one = next(one for one in section if one["side"] == row["shape"][-1])
        return float(one["pcafast"]["microseconds_per_map"] * row["shape"][1] / 1e6)
    keys = ("shape", "stride", "dtype", "layout")
    one = next(one for one in section if all(one.get(key) == row.get(key) for key in keys))
    times = one["milliseconds"]
    return float(times.get("operator", times["pcafast"]) / 1e3)


def cuda_kernels() -> str:
    """What the compiler made of the kernels that read a batch."""
    used = {row["kernel"]: row["widest_load"] for row in estimated()["rows"]}
    rows = []
    for one in estimated()["kernels"]:
        if one["kernel"] not in used:
            continue
        load = f"`{used[one['kernel']]}`" if used[one["kernel"]] else ""
        matrix = ", ".join(one["matrix"])
        numbers = [one["registers"], one["shared"] + one["dynamic_shared"], one["spill_stores"] + one["spill_loads"]]
        fill = [one["threads"], one["blocks_per_multiprocessor"], f"{one['occupancy']:.0%}"]
        rows.append([f"`{one['kernel']}`", load, matrix, *map(str, [*numbers, *fill])])
    titles = ["kernel", "widest load in its loops", "matrix instruction", "registers", "shared memory", "spilled bytes"]
    return table([*titles, "threads", "blocks", "occupancy"], rows, texts=3)


def cuda_targets() -> str:
    """The targets, and what was measured of them."""
    found = measured()
    rows = []
    for what, target, section, figure in TARGETS:
        rows.append([what, target, figure(found[section]) if section in found else NOT_MEASURED])
    return table(["", "target", "measured"], rows, texts=3)


def ratios(section: list[Row], *peers: str, fits: Callable[[Row], bool] = lambda _: True) -> list[float]:
    """Of the fastest of these peers' times, or of all peers', to pcafast's."""
    found = []
    for row in filter(fits, section):
        milliseconds = dict(row["milliseconds"])
        function = milliseconds.pop("pcafast")
        ours = milliseconds.pop("operator", function)
        found.append(min(milliseconds[peer] for peer in peers or milliseconds) / ours)
    return found


def mean_and_least(factors: list[float]) -> str:
    return f"{statistics.geometric_mean(factors):.2f}x, least {min(factors):.2f}x"


def larger(row: Row) -> bool:
    return bool(row["shape"][0] > 1)


def roofline_share(section: list[Row]) -> str:
    shares = [row["share_of_roofline"] for row in section]
    return f"{statistics.geometric_mean(shares):.0%}, least {min(shares):.0%}"


def bandwidth_share(section: list[Row]) -> str:
    shares = [row["share_of_copy_bandwidth"] for row in section if larger(row)]
    return f"{statistics.geometric_mean(shares):.0%}, least {min(shares):.0%}"


def rank_ratio(peer: str, *sides: int) -> Callable[[list[Row]], str]:
    def figure(section: list[Row]) -> str:
        factors = [
            row[peer]["microseconds_per_map"] / row["pcafast"]["microseconds_per_map"]
            for row in section
            if row["side"] in sides
        ]
        return mean_and_least(factors)

    return figure


def of_resnet18(row: Row) -> bool:
    return bool(row["network"] == "ResNet-18")


def hook_times(section: Found) -> str:
    return ", ".join(f"{kind} {times['python']:.0f} us" for kind, times in section["hook_microseconds"].items())


TARGETS: list[tuple[str, str, str, Callable[[Any], str]]] = [
    (
        *("covariance against the fastest recipe of torch calls", "1.5x, never below 1.0x", "covariance"),
        lambda section: mean_and_least(ratios(section)),
    ),
    (
        *("covariance against a permuted copy and its product", "3x", "covariance"),
        lambda section: mean_and_least(ratios(section, "permute, matmul")),
    ),
    ("covariance, share of the roofline", "75%", "covariance", roofline_share),
    (
        *("patch covariance, 3x3 of ResNet-18, against unfolding", "8x", "patch_covariance"),
        lambda section: mean_and_least(ratios(section, "unfold, matmul", fits=of_resnet18)),
    ),
    (
        *("Taylor against pytorch-pruning's expression", "2.5x", "taylor"),
        lambda section: mean_and_least(ratios(section, "expression", fits=larger)),
    ),
    ("Taylor, share of copy bandwidth", "85%", "taylor", bandwidth_share),
    ("rank 32x32 against `torch.linalg.matrix_rank`, batched", "30x", "rank", rank_ratio("batched", 32)),
    ("rank 16x16 and 8x8, batched", "30x", "rank", rank_ratio("batched", 8, 16)),
    ("rank 32x32 against one SVD per map", "2,000x", "rank", rank_ratio("one by one", 32)),
    ("rank 56x56 to 224x224, batched", "10x", "rank", rank_ratio("batched", 56, 112, 224)),
    (
        *("rank scores of ResNet-56, 640 images, against HRank's procedure", "1,000x", "hrank"),
        lambda section: f"{section['estimated_speedup']:,.0f}x",
    ),
    (
        *("training step of ResNet-50 with Taylor", "1.05 times", "training"),
        lambda section: f"{section['times_plain']['taylor']:.3f} times",
    ),
    (
        *("training step of ResNet-50 with covariance", "1.20 times", "training"),
        lambda section: f"{section['times_plain']['covariance']:.3f} times",
    ),
    (
        *("its peak memory, with both", "1.02 times", "training"),
        lambda section: f"{1 + section['growth_of_peak']['both']:.3f} times",
    ),
    ("Python of one hook call", "20 us", "training", hook_times),
]

TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (cuda_status, cuda_source, cuda_targets, cuda_roofline, cuda_kernels)
}
